/* The bytes of an in-flight buffer, and what inflight.c and inflight_packed.c share. */
#ifndef VHOST_BRIDGE_INFLIGHT_LAYOUT_H
#define VHOST_BRIDGE_INFLIGHT_LAYOUT_H

#include "inflight.h"

enum { VERSION = 1 };

struct split_entry {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next;
	uint64_t counter;
};

struct split_region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct split_entry entries[];
};

struct packed_entry {
	uint8_t inflight;
	uint8_t padding;
	uint16_t next;
	uint16_t last;
	uint16_t num;
	uint64_t counter;
	uint16_t id;
	uint16_t flags;
	uint32_t length;
	uint64_t address;
};

struct packed_region {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t free_head;
	uint16_t old_free_head;
	uint16_t used_idx;
	uint16_t old_used_idx;
	uint8_t used_wrap;
	uint8_t old_used_wrap;
	uint8_t padding[10];
	struct packed_entry entries[];
};

_Static_assert(sizeof(struct split_entry) == 16, "split entry");
_Static_assert(sizeof(struct split_region) == 16, "split region");
_Static_assert(sizeof(struct packed_entry) == 32, "packed entry");
_Static_assert(sizeof(struct packed_region) == 32, "packed region");

void split_make(struct inflight_buffer *buffer, const struct guest_ring *ring);
int split_recover(struct inflight_buffer *buffer, struct guest_ring *ring, const char **why);
bool split_place(struct inflight_buffer *buffer, const struct guest_ring *ring);

void packed_make(struct inflight_buffer *buffer, const struct guest_ring *ring);
int packed_recover(struct inflight_buffer *buffer, struct guest_ring *ring, const char **why);
bool packed_place(struct inflight_buffer *buffer, const struct guest_ring *ring);
void packed_chain(const struct inflight_buffer *buffer, struct request *request);
int packed_fetched(struct inflight_buffer *buffer, struct request *request, const char **why);
void packed_giving(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry,
		   uint16_t slots);
void packed_given(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry);
void packed_unfetched(struct inflight_buffer *buffer, uint16_t entry, uint16_t slots);

#endif
