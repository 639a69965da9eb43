/* The in-flight buffer that a vhost-user front-end keeps for us: which requests of a guest's vring
 * were fetched and not given back. It outlives this process: the next one goes on with them.
 *
 * Layout and order of the stores are vhost-user's (docs/interop/vhost-user.rst of QEMU, "Inflight
 * I/O tracking"). The front-end may write to it at any time. So it is read when a vring begins, every
 * word once, and only written afterwards: what was written is kept in private memory too.
 */
#ifndef VHOST_BRIDGE_INFLIGHT_H
#define VHOST_BRIDGE_INFLIGHT_H

#include "guest_ring.h"

/* A request that was in flight when whoever recorded it ended. */
struct left_request {
	uint64_t counter;
	uint32_t position; /* of the ring when it was fetched; right only if none was overtaken */
	uint16_t entry;	   /* in the buffer; in split rings the head */
	uint16_t slots;
};

struct inflight_buffer {
	void *region; /* this vring's; NULL: nothing is recorded */
	bool packed;
	uint32_t size; /* entries, at least the vring's descriptors */
	uint64_t counter;
	uint16_t batch; /* split: given back last */
	uint16_t first_free; /* packed */
	uint32_t free;
	uint16_t *next; /* packed: by entry, of free ones and of chains; size is the end */
	uint16_t *last; /* by first entry of a chain */
	struct left_request *left; /* in the order fetched */
	uint32_t left_count;
	uint32_t left_taken;
	bool overtaken; /* later requests than some of these were given back */
};

bool inflight_init(struct inflight_buffer *buffer, void *region, uint32_t size, bool packed);
void inflight_free(struct inflight_buffer *buffer);

/* For a ring that was started: a fresh buffer is made ready. One that was in use has more to say than
 * the ring's base: the ring goes on behind what was fetched, and left has what is to be done again.
 * -1: it is not what a buffer of this ring can be. */
int inflight_begin(struct inflight_buffer *buffer, struct guest_ring *ring, const char **why);

/* What was left, as it was fetched, into a request; 0: there is no more. */
int inflight_refetch(struct inflight_buffer *buffer, const struct guest_ring *ring,
		     const struct guest_memory *memory, struct request *request, const char **why);

/* Before the device sees it. -1: more is in flight than the vring has descriptors. */
int inflight_fetched(struct inflight_buffer *buffer, struct request *request, const char **why);
/* Before and after the guest sees that it is used. */
void inflight_giving(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry,
		     uint16_t slots);
void inflight_given(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry);
/* It counts as not fetched. The last one that was fetched goes first. */
void inflight_unfetched(struct inflight_buffer *buffer, uint16_t entry, uint16_t slots);

#endif
