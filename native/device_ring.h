/* The driver's side of a device's vring: a split one in memory of ours that the device writes to.
 * What was put there is kept in private memory too; of the device's only used entries are read. */
#ifndef VHOST_BRIDGE_DEVICE_RING_H
#define VHOST_BRIDGE_DEVICE_RING_H

#include "vring.h"

#define NO_SLOT UINT16_MAX
/* Indirect tables are given out in pieces of so many descriptors. */
#define POOL_PIECE 4

/* A request with the device, by the index of its first descriptor. */
struct inflight {
	bool busy;
	bool done; /* the device gave it back, and it waits for those before it */
	uint16_t older;
	uint16_t newer;
	uint16_t id; /* the guest's */
	uint16_t slots;
	uint16_t entry; /* in the in-flight buffer */
	uint32_t position;
	uint32_t length; /* that the device wrote, as it says */
	uint32_t count;	 /* of descriptors, in the ring or in the pool */
	uint32_t table;	 /* in the pool; ~0: in the ring */
	uint64_t sequence;
};

struct device_ring {
	bool event_idx;
	uint16_t available; /* free-running indices */
	uint16_t kicked;
	uint16_t used;
	uint16_t first_free;
	uint16_t oldest; /* in flight */
	uint16_t newest;
	uint32_t free;
	uint32_t size;
	uint32_t inflight;
	uint32_t pool;	      /* descriptors for indirect tables */
	uint32_t pool_cursor; /* in pieces */
	uint64_t sequence;    /* of the next request */
	uint64_t pool_iova;
	struct descriptor *descriptors;
	uint8_t *driver;
	uint8_t *device;
	struct descriptor *tables;
	uint16_t *next;		  /* of free descriptors, and of chains */
	uint8_t *pieces;	  /* of the pool: taken or not */
	struct buffer *buffers;	  /* by descriptor, as it was put there */
	struct buffer *in_tables; /* by descriptor of the pool */
	struct inflight *requests;
};

bool device_ring_init(struct device_ring *ring, uint32_t size, uint32_t pool, bool event_idx,
		      uint8_t *memory, uint64_t iova);
void device_ring_free(struct device_ring *ring);
/* For another device, which sees the ring at iova: it has all requests, and completed none. */
void device_ring_renew(struct device_ring *ring, uint64_t iova);

/* The request's head; NO_SLOT: there is no room now. */
uint16_t device_ring_add(struct device_ring *ring, const struct buffer *buffers, uint32_t count);
/* From now on the device sees it. */
void device_ring_show(struct device_ring *ring, uint16_t head);
/* 1: head and length; 0: there is none. -1: the device broke the rules. */
int device_ring_take(struct device_ring *ring, uint16_t *head, uint32_t *length, const char **why);
/* The i-th buffer of a request in flight. */
const struct buffer *device_ring_buffer(const struct device_ring *ring, uint16_t *at, uint16_t head,
					uint32_t i);
/* Forget a request that is complete. */
void device_ring_remove(struct device_ring *ring, uint16_t head);

bool device_ring_wants_kick(struct device_ring *ring);
void device_ring_ignore_calls(struct device_ring *ring);
/* True: something was used meanwhile, for which no call may come. */
bool device_ring_want_calls(struct device_ring *ring);

#endif
