/* The device's side of a guest's vring (virtio 1.4, sections 2.7 and 2.8). */
#include "guest_ring.h"

#include <stdlib.h>
#include <string.h>

enum { MIN_CHAIN = 1024 }; /* Linux makes indirect tables longer than the ring */

bool request_init(struct request *request, uint32_t size)
{
	request->room = size > MIN_CHAIN ? size : MIN_CHAIN;
	request->buffers = calloc(request->room, sizeof(*request->buffers));
	request->chain = calloc(size, sizeof(*request->chain));
	return request->buffers && request->chain;
}

void request_free(struct request *request)
{
	free(request->buffers);
	free(request->chain);
}

void guest_ring_init(struct guest_ring *ring, const struct vb_shadow_setup *setup)
{
	*ring = (struct guest_ring){
		.packed = setup->features & FEATURE_PACKED,
		.event_idx = setup->features & FEATURE_EVENT_IDX,
		.indirect = setup->features & FEATURE_INDIRECT,
		.size = setup->size,
		.descriptor_area = setup->descriptor_area,
		.driver_area = setup->driver_area,
		.device_area = setup->device_area,
		.log.guest_address = UINT64_MAX,
	};
}

static uint64_t device_area_size(const struct guest_ring *ring)
{
	return ring->packed ? 4 : 6 + 8 * (uint64_t)ring->size;
}

bool guest_ring_map(struct guest_ring *ring, const struct guest_memory *memory)
{
	uint64_t driver = ring->packed ? 4 : 6 + 2 * (uint64_t)ring->size;
	void *descriptors = map_guest(memory, ring->descriptor_area, 16 * (uint64_t)ring->size);
	void *driver_area = map_guest(memory, ring->driver_area, driver);
	void *device_area = map_guest(memory, ring->device_area, device_area_size(ring));

	if (!descriptors || !driver_area || !device_area)
		return false;
	if ((uintptr_t)descriptors % 8 || (uintptr_t)driver_area % 2 || (uintptr_t)device_area % 4)
		return false;
	ring->descriptors = descriptors;
	ring->driver = driver_area;
	ring->device = device_area;
	return true;
}

bool guest_ring_has(const struct guest_ring *ring, uint32_t base)
{
	return !ring->packed || ((base & 0x7FFF) < ring->size && (base >> 16 & 0x7FFF) < ring->size);
}

void guest_ring_start(struct guest_ring *ring, uint32_t base)
{
	ring->call_known = false;
	if (ring->packed) {
		ring->next = base & 0x7FFF;
		ring->available_wrap = base >> 15 & 1;
		ring->used = base >> 16 & 0x7FFF;
		ring->used_wrap = base >> 31;
	} else {
		ring->next = (uint16_t)base;
		ring->used = load16(ring->device + 2);
	}
}

uint32_t guest_ring_position(const struct guest_ring *ring)
{
	return ring->packed ? ring->next | (uint32_t)ring->available_wrap << 15 : ring->next;
}

uint32_t guest_ring_base(const struct guest_ring *ring, uint32_t position)
{
	if (!ring->packed)
		return position;
	return position | (uint32_t)ring->used << 16 | (uint32_t)ring->used_wrap << 31;
}

static void log_write(const struct guest_ring *ring, uint64_t base, uint64_t offset, uint64_t size)
{
	if (ring->log.log && ring->log.guest_address != UINT64_MAX)
		vb_log_mark(ring->log.log, ring->log.bytes, base + offset, size);
}

static int add_buffer(struct request *request, const struct guest_memory *memory,
		      const struct descriptor *descriptor, bool write, const char **why)
{
	if (request->count == request->room) {
		*why = "a descriptor chain is too long, or a loop";
		return -1;
	}
	if (!is_guest_memory(memory, descriptor->address, descriptor->length)) {
		*why = "a descriptor points outside guest memory";
		return -1;
	}
	request->buffers[request->count++] = (struct buffer){
		.address = descriptor->address,
		.length = descriptor->length,
		.write = write,
	};
	return 1;
}

static int read_table_entry(const struct guest_memory *memory, uint64_t address,
			    struct descriptor *entry, const char **why)
{
	const struct descriptor *at = map_guest(memory, address, sizeof(*at));

	if (!at) {
		*why = "an indirect descriptor table lies outside guest memory";
		return -1;
	}
	/* Nothing says that tables are aligned. */
	if ((uintptr_t)at % 8)
		memcpy(entry, (const char *)at, sizeof(*entry));
	else
		*entry = load_descriptor(at);
	return 1;
}

/* Split tables are chained by next, packed ones are read in order. */
static int walk_table(const struct guest_ring *ring, const struct guest_memory *memory,
		      struct request *request, uint64_t address, uint32_t length, const char **why)
{
	uint32_t entries = length / 16, seen = 0, index = 0;

	if (!ring->indirect || !length || length % 16) {
		*why = ring->indirect ? "an indirect descriptor table has an odd length"
				      : "an indirect descriptor without INDIRECT_DESC";
		return -1;
	}
	for (;;) {
		struct descriptor entry;
		uint16_t flags;

		if (read_table_entry(memory, address + 16 * (uint64_t)index, &entry, why) < 0)
			return -1;
		flags = ring->packed ? entry.second : entry.first;
		if (!ring->packed && flags & DESC_INDIRECT) {
			*why = "an indirect descriptor inside an indirect table";
			return -1;
		}
		if (add_buffer(request, memory, &entry, flags & DESC_WRITE, why) < 0)
			return -1;
		if (++seen > entries) {
			*why = "an indirect descriptor table has a loop";
			return -1;
		}
		if (ring->packed ? seen == entries : !(flags & DESC_NEXT))
			return 1;
		index = ring->packed ? index + 1 : entry.second;
		if (index >= entries) {
			*why = "an indirect descriptor table leads outside itself";
			return -1;
		}
	}
}

static int walk_split(const struct guest_ring *ring, const struct guest_memory *memory,
		      struct request *request, const char **why)
{
	uint16_t index = request->id, flags;

	for (uint32_t seen = 0;; seen++) {
		struct descriptor descriptor;

		if (index >= ring->size || seen >= ring->size) {
			*why = index >= ring->size ? "a descriptor index is out of range"
						   : "a descriptor chain is a loop";
			return -1;
		}
		descriptor = load_descriptor(&ring->descriptors[index]);
		flags = descriptor.first;
		if (flags & DESC_INDIRECT) {
			if (flags & DESC_NEXT) {
				*why = "an indirect descriptor that has a next one";
				return -1;
			}
			return walk_table(ring, memory, request, descriptor.address,
					  descriptor.length, why);
		}
		if (add_buffer(request, memory, &descriptor, flags & DESC_WRITE, why) < 0)
			return -1;
		if (!(flags & DESC_NEXT))
			return 1;
		index = descriptor.second;
	}
}

static int fetch_split(struct guest_ring *ring, const struct guest_memory *memory,
		       struct request *request, const char **why)
{
	uint16_t pending = load16_acquire(ring->driver + 2) - ring->next;

	if (!pending)
		return 0;
	if (pending > ring->size) {
		*why = "the available index is out of range";
		return -1;
	}
	request->id = load16(ring->driver + 4 + 2 * (ring->next & (ring->size - 1)));
	request->slots = 1;
	if (walk_split(ring, memory, request, why) < 0)
		return -1;
	ring->next++;
	return 1;
}

static bool is_available(const struct guest_ring *ring, uint16_t flags)
{
	return guest_ring_available(flags, ring->available_wrap);
}

/* The chain as it stands in the ring, or stood there when it was fetched. */
static int walk_packed(const struct guest_ring *ring, const struct guest_memory *memory,
		       struct request *request, const char **why)
{
	for (uint32_t i = 0; i < request->slots; i++) {
		const struct descriptor *descriptor = &request->chain[i];
		uint16_t flags = descriptor->second;

		request->id = descriptor->first;
		if (flags & DESC_INDIRECT) {
			if (request->slots > 1) {
				*why = "an indirect descriptor inside a chain";
				return -1;
			}
			return walk_table(ring, memory, request, descriptor->address,
					  descriptor->length, why);
		}
		if (add_buffer(request, memory, descriptor, flags & DESC_WRITE, why) < 0)
			return -1;
	}
	return 1;
}

static int fetch_packed(struct guest_ring *ring, const struct guest_memory *memory,
			struct request *request, const char **why)
{
	uint32_t place = ring->next, slots = 0;
	uint16_t flags = load16_acquire(&ring->descriptors[place].second);
	struct descriptor *descriptor;

	if (!is_available(ring, flags))
		return 0;
	do {
		if (slots == ring->size) {
			*why = "a descriptor chain is a loop";
			return -1;
		}
		descriptor = &request->chain[slots];
		*descriptor = load_descriptor(&ring->descriptors[place]);
		/* Of the first one the flags count that said it is available. */
		if (!slots)
			descriptor->second = flags;
		slots++;
		place = place + 1 == ring->size ? 0 : place + 1;
	} while (descriptor->second & DESC_NEXT);
	request->slots = (uint16_t)slots;
	if (walk_packed(ring, memory, request, why) < 0)
		return -1;
	if (place <= ring->next)
		ring->available_wrap = !ring->available_wrap;
	ring->next = (uint16_t)place;
	return 1;
}

int guest_ring_fetch(struct guest_ring *ring, const struct guest_memory *memory,
		     struct request *request, const char **why)
{
	request->count = 0;
	request->position = guest_ring_position(ring);
	if (ring->packed)
		return fetch_packed(ring, memory, request, why);
	return fetch_split(ring, memory, request, why);
}

int guest_ring_refetch(const struct guest_ring *ring, const struct guest_memory *memory,
		       struct request *request, const char **why)
{
	request->count = 0;
	return ring->packed ? walk_packed(ring, memory, request, why)
			    : walk_split(ring, memory, request, why);
}

void guest_ring_unfetch(struct guest_ring *ring, const struct request *request)
{
	if (ring->packed) {
		ring->next = request->position & 0x7FFF;
		ring->available_wrap = request->position >> 15 & 1;
	} else {
		ring->next = (uint16_t)request->position;
	}
}

static void give_split(struct guest_ring *ring, uint16_t id, uint32_t length)
{
	uint64_t offset = 4 + 8 * (uint64_t)(ring->used & (ring->size - 1));

	store_used((struct used_element *)(ring->device + offset),
		   (struct used_element){.id = id, .length = length});
	store16_release(ring->device + 2, ++ring->used);
	log_write(ring, ring->log.guest_address, offset, 8);
	log_write(ring, ring->log.guest_address, 2, 2);
}

static void give_packed(struct guest_ring *ring, uint16_t id, uint16_t slots, uint32_t length)
{
	struct descriptor *at = &ring->descriptors[ring->used];
	uint16_t flags = ring->used_wrap ? DESC_AVAIL | DESC_USED : 0;
	uint64_t offset = 16 * (uint64_t)ring->used;

	if (length)
		flags |= DESC_WRITE;
	store32(&at->length, length);
	store16(&at->first, id);
	store16_release(&at->second, flags);
	guest_ring_advance(ring, &ring->used, &ring->used_wrap, slots);
	/* A packed ring has no used ring: it is the descriptors that are written. */
	log_write(ring, ring->descriptor_area, offset, 16);
}

void guest_ring_give(struct guest_ring *ring, uint16_t id, uint16_t slots, uint32_t length)
{
	if (ring->packed)
		give_packed(ring, id, slots, length);
	else
		give_split(ring, id, length);
}

void guest_ring_ignore_kicks(struct guest_ring *ring)
{
	if (ring->packed) {
		store16(ring->device + 2, EVENT_DISABLE);
		log_write(ring, ring->log.guest_address, 2, 2);
	} else if (!ring->event_idx) {
		store16(ring->device, USED_NO_NOTIFY);
		log_write(ring, ring->log.guest_address, 0, 2);
	}
}

bool guest_ring_want_kicks(struct guest_ring *ring)
{
	uint64_t event = 4 + 8 * (uint64_t)ring->size;

	if (ring->packed) {
		if (ring->event_idx)
			store16(ring->device, (uint16_t)guest_ring_position(ring));
		store16_release(ring->device + 2, ring->event_idx ? EVENT_DESC : EVENT_ENABLE);
		log_write(ring, ring->log.guest_address, 0, 4);
	} else if (ring->event_idx) {
		store16(ring->device + event, ring->next);
		log_write(ring, ring->log.guest_address, event, 2);
	} else {
		store16(ring->device, 0);
		log_write(ring, ring->log.guest_address, 0, 2);
	}
	full_fence();
	if (ring->packed)
		return is_available(ring, load16(&ring->descriptors[ring->next].second));
	return load16(ring->driver + 2) != ring->next;
}

static bool wants_packed_call(const struct guest_ring *ring, uint16_t before, bool known)
{
	uint16_t flags = load16_acquire(ring->driver + 2), event, place;
	uint16_t now = ring->used;

	if (flags != EVENT_DESC || !ring->event_idx)
		return flags != EVENT_DISABLE;
	if (!known)
		return true;
	event = load16(ring->driver);
	place = event & 0x7FFF;
	if (event >> 15 != ring->used_wrap)
		place -= (uint16_t)ring->size;
	if (now <= before)
		before -= (uint16_t)ring->size;
	return passed_event(place, now, before);
}

bool guest_ring_wants_call(struct guest_ring *ring)
{
	uint16_t before = ring->called;
	bool known = ring->call_known;

	ring->called = ring->used;
	ring->call_known = true;
	full_fence();
	if (ring->packed)
		return wants_packed_call(ring, before, known);
	if (!ring->event_idx)
		return !(load16(ring->driver) & AVAIL_NO_INTERRUPT);
	if (!known)
		return true;
	return passed_event(load16(ring->driver + 4 + 2 * (uint64_t)ring->size), ring->used,
			    before);
}
