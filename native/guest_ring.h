/* The device's side of a guest's vring, split or packed. */
#ifndef VHOST_BRIDGE_GUEST_RING_H
#define VHOST_BRIDGE_GUEST_RING_H

#include "guest_memory.h"
#include "vring.h"

/* What is written to the used ring, or to what a packed ring has instead, is logged. */
struct used_log {
	uint8_t *log;
	uint64_t bytes;
	uint64_t guest_address; /* ~0: nothing is logged */
};

struct guest_ring {
	bool packed;
	bool event_idx;
	bool indirect;
	bool available_wrap; /* packed */
	bool used_wrap;
	bool call_known; /* whether called is known */
	uint16_t next;	 /* fetched next: split free-running, packed a place in the ring */
	uint16_t used;	 /* given back next, likewise */
	uint16_t called; /* used, at the last call */
	uint32_t size;
	uint64_t descriptor_area;
	uint64_t driver_area;
	uint64_t device_area;
	struct descriptor *descriptors;
	uint8_t *driver;
	uint8_t *device;
	struct used_log log;
};

/* One request as it was fetched. Buffers are checked: they lie in guest memory. */
struct request {
	uint16_t id;	    /* what the guest knows it by */
	uint16_t slots;	    /* places that it takes in a packed ring */
	uint32_t position;  /* of the ring when it was fetched, see guest_ring_position */
	uint16_t entry;	    /* in the in-flight buffer */
	uint32_t count;	    /* buffers */
	uint32_t room;	    /* for buffers */
	struct buffer *buffers;
	struct descriptor *chain; /* packed: slots descriptors, as they stood in the ring */
};

/* Room for any request of a ring. False: no memory. */
bool request_init(struct request *request, uint32_t size);
void request_free(struct request *request);

/* Packed: whether a descriptor with these flags is available in the round of the wrap counter. */
static inline bool guest_ring_available(uint16_t flags, bool wrap)
{
	return !!(flags & DESC_AVAIL) == wrap && !!(flags & DESC_USED) != wrap;
}

/* Packed: a place and its wrap counter, so many descriptors on. */
static inline void guest_ring_advance(const struct guest_ring *ring, uint16_t *place, bool *wrap,
				      uint32_t slots)
{
	uint32_t to = *place + slots;

	if (to >= ring->size) {
		to -= ring->size;
		*wrap = !*wrap;
	}
	*place = (uint16_t)to;
}

/* As it is set up, not mapped yet. */
void guest_ring_init(struct guest_ring *ring, const struct vb_shadow_setup *setup);
bool guest_ring_map(struct guest_ring *ring, const struct guest_memory *memory);
/* Whether the places that a base names are in the ring. */
bool guest_ring_has(const struct guest_ring *ring, uint32_t base);
/* Where the ring goes on, as vhost encodes a base. */
void guest_ring_start(struct guest_ring *ring, uint32_t base);
uint32_t guest_ring_base(const struct guest_ring *ring, uint32_t position);
uint32_t guest_ring_position(const struct guest_ring *ring);

/* 1: fetched; 0: there is none. -1: the guest broke the rules, *why tells. */
int guest_ring_fetch(struct guest_ring *ring, const struct guest_memory *memory,
		     struct request *request, const char **why);
/* The same for a request that was fetched before: id is given, or slots and chain in packed rings. */
int guest_ring_refetch(const struct guest_ring *ring, const struct guest_memory *memory,
		       struct request *request, const char **why);
/* Back to before the request that was fetched last. */
void guest_ring_unfetch(struct guest_ring *ring, const struct request *request);
void guest_ring_give(struct guest_ring *ring, uint16_t id, uint16_t slots, uint32_t length);

void guest_ring_ignore_kicks(struct guest_ring *ring);
/* True: something became available meanwhile, for which no kick may come. */
bool guest_ring_want_kicks(struct guest_ring *ring);
/* Whether the guest wants a call for what was given since it was asked last. */
bool guest_ring_wants_call(struct guest_ring *ring);

#endif
