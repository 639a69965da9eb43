/* Models of a guest's driver and of a device, written from the specification and sharing nothing with
 * the code under test. Driver and device may be in threads of their own: what one says to the other
 * goes through the rings, with acquire and release.
 */
#ifndef VHOST_BRIDGE_RING_MODEL_H
#define VHOST_BRIDGE_RING_MODEL_H

#include "../../native/shadow.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUEST 0x40000000ull
#define IOVA 0x200000000ull
#define MEMORY (4u << 20)
#define TABLES (1u << 20)   /* indirect tables, 1 KiB for each request */
#define READ_ONLY (2u << 20) /* data that the device reads: 1 KiB for each request */
#define WRITABLE (3u << 20)
#define SLOTS 512
#define CHAIN 16
#define INDIRECT (1ull << 28)
#define EVENT_IDX (1ull << 29)
#define PACKED (1ull << 34)
#define IN_ORDER (1ull << 35)

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t a, b;
};

struct piece {
	uint64_t addr;
	uint32_t len;
	int write;
};

struct request {
	int busy, with_device, complete;
	unsigned count, slots, id, length;
	unsigned long number;
	struct piece pieces[CHAIN];
};

extern unsigned char *memory, *ring, *buffer;
extern unsigned size, driver_at, device_at;
extern uint64_t features;
extern struct request requests[SLOTS];
extern unsigned char log_bits[(GUEST + MEMORY) / 4096 / 8];
extern _Thread_local unsigned long long state; /* of chance */
extern unsigned long submitted, returned;
extern struct vb_shadow *shadow;
extern struct vb_shadow_layout layout;
extern struct vb_shadow_setup setup;
extern uint16_t seen_available, device_used;
extern int queue[SLOTS], queued; /* requests that the device has */
extern unsigned heads[SLOTS];
extern long last_number; /* of the request that the device fetched last */

unsigned rnd(unsigned below);
int is_packed(void);
uint16_t get16(const unsigned char *from);

/* The driver. restart: with an empty ring, as if nothing was ever sent. */
void restart_driver(void);
void submit(void);
void reap(void);
/* Requests that the device completed, and the driver does not see yet. */
unsigned done_but_not_given(void);
/* Requests that it was given back, whether or not it has looked, are complete; others are not. */
void forget_what_was_not_given(void);

/* The device. */
void device_takes(void);
void device_completes(void);
void new_device(void);

/* argv: NAME MODE SEED ROUNDS packed|split SIZE FEATURES */
void make_model(int argc, char **argv);
/* Vrings that are made from now on record what is in flight. */
void use_inflight_buffer(void);
void free_model(void);
void make_shadow(uint32_t base);
void drop_shadow(void);

#endif
