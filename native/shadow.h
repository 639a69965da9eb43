/* Shadow vrings: requests pass from a guest's vring to a device's through a thread of ours, which
 * so knows what is in flight and what the device wrote.
 *
 * The guest's ring is split or packed, the device's always split: every device has split rings.
 * Both sides are hostile: what they write is read once, checked and kept in private memory.
 * Functions that return int64_t give a negative errno on failure. Unless said otherwise they may
 * be called while the thread runs, from one other thread at a time.
 */
#ifndef VHOST_BRIDGE_SHADOW_H
#define VHOST_BRIDGE_SHADOW_H

#include <stddef.h>
#include <stdint.h>

/* Guest memory as it is mapped here. */
struct vb_region {
	uint64_t guest_address;
	uint64_t size;
	uint64_t address;
};

struct vb_shadow_setup {
	uint64_t features;	  /* negotiated with the guest */
	uint64_t descriptor_area; /* guest addresses of its vring */
	uint64_t driver_area;
	uint64_t device_area;
	uint64_t memory; /* vb_shadow_memory() zeroed bytes for the device's vring, mapped here */
	uint64_t iova;	 /* and where the device sees them */
	uint64_t inflight; /* its region of the front-end's in-flight buffer, mapped here; 0: none */
	uint32_t inflight_size; /* entries of that, at least size */
	uint32_t size;	 /* descriptors of the guest's vring */
	uint32_t base;	 /* where it goes on, as vhost encodes it */
	uint32_t slots;	 /* descriptors of the device's vring: a power of two, at least size */
	uint32_t pool;	 /* descriptors for indirect tables; 0 without INDIRECT_DESC */
	/* Borrowed eventfds; -1 where there is none. */
	int kick;	 /* the guest kicks us */
	int call;	 /* we call the guest */
	int device_kick; /* we kick the device */
	int device_call; /* the device calls us */
	int broken;	 /* signalled once when the vring breaks */
};

struct vb_shadow_stats {
	uint64_t requests; /* given back to the guest */
	uint64_t bytes;	   /* of their buffers */
	uint64_t kicks;	   /* sent to the device */
	uint64_t calls;	   /* sent to the guest */
	uint32_t inflight; /* with the device now */
};

/* Where the parts of the device's vring lie in its memory. */
struct vb_shadow_layout {
	uint32_t driver_area;
	uint32_t device_area;
	uint32_t pool;
	uint32_t size; /* of all */
};

struct vb_shadow;

void vb_shadow_layout(uint32_t slots, uint32_t pool, struct vb_shadow_layout *layout);

/* NULL: no memory, a vring that does not lie in the regions, or a base outside it. Broken already: an
 * in-flight buffer that is none. Not thread-safe. */
struct vb_shadow *vb_shadow_new(const struct vb_shadow_setup *setup, const struct vb_region *regions,
				size_t count);
void vb_shadow_free(struct vb_shadow *shadow);

/* Make the thread, which waits. Nothing of the vrings is touched. Idempotent. */
int64_t vb_shadow_prepare(struct vb_shadow *shadow);
/* Start the thread, which can't fail once it is made. When it returns, what was available is in the
 * device's vring. */
int64_t vb_shadow_start(struct vb_shadow *shadow);
/* Fetch nothing more from the guest; what the device completes is still given back. When it
 * returns, the last request is in the device's vring. */
void vb_shadow_hold(struct vb_shadow *shadow);
/* The device stands still: end the thread, then give back what it completed. Idempotent. */
int64_t vb_shadow_stop(struct vb_shadow *shadow);

/* After stop: where another vring goes on, as vhost encodes it. -EBUSY: requests in flight were
 * overtaken by others, so that no position leaves out exactly the completed ones. */
int64_t vb_shadow_base(struct vb_shadow *shadow);
/* After stop: let the in-flight buffer agree with that position; nothing is in flight any more. */
void vb_shadow_unfetch(struct vb_shadow *shadow);
/* After stop: where a vring goes on that finds what is in flight in the in-flight buffer. */
int64_t vb_shadow_position(struct vb_shadow *shadow);
/* After stop: how many requests are in flight. */
int64_t vb_shadow_inflight(struct vb_shadow *shadow);
/* Bytes of one vring's region of an in-flight buffer: a multiple of 64. */
uint64_t vb_inflight_size(uint32_t size, int packed);
/* For how many descriptors a region of so many bytes has room. */
uint32_t vb_inflight_entries(uint64_t bytes, int packed);

/* After stop, when the device is gone: another one begins at the start of its vring, which lies at
 * iova now, with all that is in flight, in the order fetched. broken: as in the setup. */
void vb_shadow_renew(struct vb_shadow *shadow, uint64_t iova, int broken);
/* After stop: should the vring break nothing is signalled, until renew. */
void vb_shadow_mute(struct vb_shadow *shadow);

/* -EFAULT: the vring is not in this memory; nothing changed. */
int64_t vb_shadow_set_memory(struct vb_shadow *shadow, const struct vb_region *regions,
			     size_t count);
/* Mark every page that is written: one bit a page of 4 KiB, from guest address 0. NULL: stop it.
 * When it returns the log before is not touched any more. */
void vb_shadow_set_log(struct vb_shadow *shadow, uint8_t *log, uint64_t bytes);
/* Mark what is written to the used ring too, as if it was at this guest address; ~0: don't. */
void vb_shadow_set_used_log(struct vb_shadow *shadow, uint64_t guest_address);
void vb_shadow_set_kick(struct vb_shadow *shadow, int fd);
void vb_shadow_set_call(struct vb_shadow *shadow, int fd);

void vb_shadow_stats(struct vb_shadow *shadow, struct vb_shadow_stats *stats);
/* Why the vring broke; NULL while it did not. */
const char *vb_shadow_broken(struct vb_shadow *shadow);

/* Mark size bytes at a guest address; what lies behind the log's end is left out. */
void vb_log_mark(uint8_t *log, uint64_t bytes, uint64_t guest_address, uint64_t size);

/* One round without the thread, for tests: true if anything moved. */
int vb_shadow_step(struct vb_shadow *shadow);

#endif
