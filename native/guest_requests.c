/* Requests of a guest's vring: the guest is hostile, each is read once and checked. */
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

	if (!guest_ring_available(flags, ring->available_wrap))
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
