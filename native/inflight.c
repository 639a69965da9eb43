/* Recording in split rings, and what both layouts share. */
#include "inflight_layout.h"

#include "shadow.h"

#include <stdlib.h>

bool inflight_init(struct inflight_buffer *buffer, void *region, uint32_t size, bool packed)
{
	*buffer = (struct inflight_buffer){.region = region, .size = size, .packed = packed};
	if (!region)
		return true;
	buffer->next = calloc(size, sizeof(*buffer->next));
	buffer->last = calloc(size, sizeof(*buffer->last));
	buffer->left = calloc(size, sizeof(*buffer->left));
	return buffer->next && buffer->last && buffer->left;
}

void inflight_free(struct inflight_buffer *buffer)
{
	free(buffer->next);
	free(buffer->last);
	free(buffer->left);
}

uint64_t vb_inflight_size(uint32_t size, int packed)
{
	uint64_t bytes = packed ? sizeof(struct packed_region) + size * sizeof(struct packed_entry)
				: sizeof(struct split_region) + size * sizeof(struct split_entry);

	return (bytes + 63) / 64 * 64;
}

uint32_t vb_inflight_entries(uint64_t bytes, int packed)
{
	uint64_t header = packed ? sizeof(struct packed_region) : sizeof(struct split_region);
	uint64_t each = packed ? sizeof(struct packed_entry) : sizeof(struct split_entry);
	uint64_t entries = bytes > header ? (bytes - header) / each : 0;

	return entries > 32768 ? 32768 : (uint32_t)entries;
}

static int by_counter(const void *one, const void *other)
{
	const struct left_request *a = one, *b = other;

	if (a->counter != b->counter)
		return a->counter < b->counter ? -1 : 1;
	return a->entry - b->entry;
}

static void put_in_order(struct inflight_buffer *buffer)
{
	qsort(buffer->left, buffer->left_count, sizeof(*buffer->left), by_counter);
	if (buffer->left_count)
		buffer->counter = buffer->left[buffer->left_count - 1].counter + 1;
}

int inflight_begin(struct inflight_buffer *buffer, struct guest_ring *ring, const char **why)
{
	const struct split_region *header = buffer->region;
	uint16_t version, size;
	int result = 0;

	if (!buffer->region)
		return 0;
	/* They are at the same place in both layouts. */
	version = load16(&header->version);
	size = load16(&header->desc_num);
	if (version > VERSION) {
		*why = "the in-flight buffer has a version that is not known";
		return -1;
	}
	/* There may be room for more than whoever used it had. */
	if (version && size >= ring->size && size < buffer->size)
		buffer->size = size;
	if (version)
		result = buffer->packed ? packed_recover(buffer, ring, why)
					: split_recover(buffer, ring, why);
	else if (buffer->packed)
		packed_make(buffer, ring);
	else
		split_make(buffer, ring);
	put_in_order(buffer);
	if (result == 0 && version)
		buffer->overtaken = !(buffer->packed ? packed_place(buffer, ring)
						     : split_place(buffer, ring));
	return result;
}

void split_make(struct inflight_buffer *buffer, const struct guest_ring *ring)
{
	struct split_region *region = buffer->region;

	for (uint32_t i = 0; i < buffer->size; i++)
		store8_release(&region->entries[i].inflight, 0);
	store16(&region->desc_num, (uint16_t)buffer->size);
	store16(&region->last_batch_head, 0);
	store16_release(&region->used_idx, ring->used);
	store16_release(&region->version, VERSION);
}

/* What was given back last may still be noted as in flight: as much of the list as the ring's used
 * index is ahead. */
static int split_repair(struct inflight_buffer *buffer, const struct guest_ring *ring)
{
	struct split_region *region = buffer->region;
	uint16_t ahead = ring->used - load16(&region->used_idx);
	uint16_t at = load16(&region->last_batch_head);

	if (ahead > buffer->size)
		return -1;
	for (uint16_t i = 0; i < ahead; i++) {
		uint16_t next;

		if (at >= buffer->size)
			return -1;
		next = load16(&region->entries[at].next);
		store8_release(&region->entries[at].inflight, 0);
		at = next;
	}
	store16_release(&region->used_idx, ring->used);
	return 0;
}

int split_recover(struct inflight_buffer *buffer, struct guest_ring *ring, const char **why)
{
	struct split_region *region = buffer->region;
	bool fits = split_repair(buffer, ring) == 0;
	uint32_t count = 0;

	for (uint32_t i = 0; i < buffer->size; i++) {
		struct left_request *left = &buffer->left[count];

		if (!load8(&region->entries[i].inflight))
			continue;
		if (i >= ring->size)
			fits = false;
		*left = (struct left_request){.counter = load64(&region->entries[i].counter),
					      .entry = (uint16_t)i,
					      .slots = 1};
		count++;
	}
	/* A driver that began its ring anew left nothing. */
	if (!fits && count) {
		*why = "the in-flight buffer is not this vring's";
		return -1;
	}
	store16_release(&region->used_idx, ring->used);
	buffer->left_count = count;
	buffer->batch = load16(&region->last_batch_head);
	ring->next = (uint16_t)(ring->used + count);
	return 0;
}

/* Whether what is left are the last requests of the available ring, one after the other. */
bool split_place(struct inflight_buffer *buffer, const struct guest_ring *ring)
{
	uint32_t count = buffer->left_count;
	bool same = true;

	for (uint32_t i = 0; i < count; i++) {
		uint16_t position = (uint16_t)(ring->next - count + i);
		uint16_t head = load16(ring->driver + 4 + 2 * (position & (ring->size - 1)));

		buffer->left[i].position = position;
		same = same && head == buffer->left[i].entry;
	}
	return same;
}

int inflight_refetch(struct inflight_buffer *buffer, const struct guest_ring *ring,
		     const struct guest_memory *memory, struct request *request, const char **why)
{
	const struct left_request *left;

	if (buffer->left_taken == buffer->left_count)
		return 0;
	left = &buffer->left[buffer->left_taken];
	request->id = request->entry = left->entry;
	request->slots = left->slots;
	request->position = left->position;
	if (buffer->packed)
		packed_chain(buffer, request);
	return guest_ring_refetch(ring, memory, request, why);
}

int inflight_fetched(struct inflight_buffer *buffer, struct request *request, const char **why)
{
	struct split_region *region = buffer->region;

	if (!region)
		return 0;
	if (buffer->packed)
		return packed_fetched(buffer, request, why);
	request->entry = request->id;
	store64(&region->entries[request->entry].counter, buffer->counter++);
	store8_release(&region->entries[request->entry].inflight, 1);
	return 0;
}

void inflight_giving(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry,
		     uint16_t slots)
{
	struct split_region *region = buffer->region;

	if (!region)
		return;
	if (buffer->packed) {
		packed_giving(buffer, ring, entry, slots);
		return;
	}
	store16_release(&region->entries[entry].next, buffer->batch);
	store16_release(&region->last_batch_head, entry);
	buffer->batch = entry;
}

void inflight_given(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry)
{
	struct split_region *region = buffer->region;

	if (!region)
		return;
	if (buffer->packed) {
		packed_given(buffer, ring, entry);
		return;
	}
	store8_release(&region->entries[entry].inflight, 0);
	store16_release(&region->used_idx, ring->used);
}

void inflight_unfetched(struct inflight_buffer *buffer, uint16_t entry, uint16_t slots)
{
	struct split_region *region = buffer->region;

	if (!region)
		return;
	if (buffer->packed)
		packed_unfetched(buffer, entry, slots);
	else
		store8_release(&region->entries[entry].inflight, 0);
}
