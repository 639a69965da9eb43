/* Guest memory: which guest addresses exist, and where they are mapped here. */
#ifndef VHOST_BRIDGE_GUEST_MEMORY_H
#define VHOST_BRIDGE_GUEST_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shadow.h"

struct guest_memory {
	struct vb_region *regions;
	size_t count;
};

/* The region that holds an address; NULL if none does. */
static inline const struct vb_region *find_region(const struct guest_memory *memory,
						  uint64_t guest_address)
{
	for (size_t i = 0; i < memory->count; i++) {
		const struct vb_region *region = &memory->regions[i];

		if (guest_address - region->guest_address < region->size)
			return region;
	}
	return NULL;
}

/* Where size bytes that lie in one region are mapped; NULL if they don't. */
static inline void *map_guest(const struct guest_memory *memory, uint64_t guest_address,
			      uint64_t size)
{
	const struct vb_region *region = find_region(memory, guest_address);
	uint64_t offset;

	if (!region)
		return NULL;
	offset = guest_address - region->guest_address;
	if (size > region->size - offset)
		return NULL;
	return (void *)(uintptr_t)(region->address + offset);
}

/* Whether all bytes of a buffer are guest memory; it may reach over regions that touch. */
static inline bool is_guest_memory(const struct guest_memory *memory, uint64_t guest_address,
				   uint64_t size)
{
	while (size) {
		const struct vb_region *region = find_region(memory, guest_address);
		uint64_t here;

		if (!region)
			return false;
		here = region->size - (guest_address - region->guest_address);
		if (size <= here)
			return true;
		size -= here;
		guest_address += here;
	}
	return true;
}

#endif
