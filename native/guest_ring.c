/* The device's side of a guest's vring (virtio 1.4, sections 2.7 and 2.8). */
#include "guest_ring.h"

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
		return guest_ring_available(load16(&ring->descriptors[ring->next].second),
					    ring->available_wrap);
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
