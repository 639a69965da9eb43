/* What the fuzzers of vrings share: the input, a hostile guest and a hostile device.
 *
 * Guest memory is two regions that touch, each a file between pages that nobody may touch. The
 * device's vring lies in private memory, which the sanitizers see to. */
#ifndef VHOST_BRIDGE_FUZZ_PEERS_H
#define VHOST_BRIDGE_FUZZ_PEERS_H

#include "../../native/shadow.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define GUEST 0x40000000ull
#define HALF_MAX 0x8000u

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

/* A shared file between two pages that nobody may touch. */
struct area {
	unsigned char *at;
	int fd;
	unsigned size;
	bool cut;
};

/* The guest's vring. The fuzzers fill in what is not the same in all programs. */
extern struct vb_shadow_setup setup;
extern struct area halves[2];
extern unsigned half;	    /* bytes of each */
extern unsigned ring_bytes; /* from the start of guest memory: most addresses are there */
extern uint16_t available;  /* the index that the guest of a split ring is at */

extern struct vb_shadow_layout layout;
extern unsigned char *device_memory;
extern uint16_t device_used;

void begin_input(const uint8_t *data, size_t size);
bool more_input(void);
/* 0 when there is none left. */
unsigned take(unsigned bytes);

struct area make_area(unsigned size);
void make_whole(struct area *area);
/* The file has so many bytes now, or is whole again. */
void cut_or_mend(struct area *area, unsigned bytes);

bool packed(void);
/* Zeroed guest memory of two times so many bytes: the same at each call. */
void begin_guest(unsigned bytes);
struct vb_region region(unsigned which);
/* Write to guest memory: not where its files are shorter. */
void put(unsigned offset, const void *data, unsigned size);
/* Where a guest address lies in guest memory. */
unsigned offset_of(uint64_t address);
uint64_t guest_address(void);
uint32_t length(void);
/* Where a guest puts an indirect table. */
unsigned table_at(unsigned kind);
/* Mostly what a driver does, so that the rest is reached; in a packed ring at this place. */
void guest_submits(unsigned place, bool wrap);
void guest_writes(void);

/* Remember guest memory, and see what was written to it since: nothing outside the ring but so many
 * bytes of this value. */
void take_memory_in(void);
void check_memory(unsigned more, uint8_t value);

/* The ring of setup.slots descriptors that the layout tells, zeroed. */
void begin_device(void);
void device_writes(void);
/* In a split ring: what it was given, or, now and then, what it never had. */
void device_completes(void);
void end_device(void);

#endif
