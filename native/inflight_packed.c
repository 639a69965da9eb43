/* Recording in packed rings: descriptors are copied, because the ring's are written over. */
#include "inflight_layout.h"

/* Where the ring's used side is. */
struct used_place {
	uint16_t index;
	bool wrap;
};

/* The place now and the one before change in one store: a wrap counter of one with the index of the
 * other would be a place that never was. */
static void store_places(struct packed_region *region, struct used_place now, struct used_place old)
{
	store64_release(&region->used_idx, now.index | (uint64_t)old.index << 16 |
						   (uint64_t)now.wrap << 32 |
						   (uint64_t)old.wrap << 40);
}

static struct used_place place_of(const struct guest_ring *ring)
{
	return (struct used_place){.index = ring->used, .wrap = ring->used_wrap};
}

void packed_make(struct inflight_buffer *buffer, const struct guest_ring *ring)
{
	struct packed_region *region = buffer->region;

	for (uint32_t i = 0; i < buffer->size; i++) {
		buffer->next[i] = (uint16_t)(i + 1);
		store8_release(&region->entries[i].inflight, 0);
		store16(&region->entries[i].next, buffer->next[i]);
	}
	buffer->first_free = 0;
	buffer->free = buffer->size;
	store16(&region->desc_num, (uint16_t)buffer->size);
	store16(&region->free_head, 0);
	store16(&region->old_free_head, 0);
	store_places(region, place_of(ring), place_of(ring));
	store16_release(&region->version, VERSION);
}

/* Whether the driver was shown the descriptor that was being given back. */
static bool was_given(const struct guest_ring *ring, struct used_place now, struct used_place old)
{
	uint16_t flags = load16_acquire(&ring->descriptors[old.index].second);

	return (now.index != old.index || now.wrap != old.wrap) && !guest_ring_available(flags, old.wrap);
}

/* Commit what was being given back, or undo it. -1: indices are out of range. */
static int commit_or_undo(struct inflight_buffer *buffer, struct guest_ring *ring)
{
	struct packed_region *region = buffer->region;
	uint64_t places = load64(&region->used_idx);
	struct used_place now = {.index = (uint16_t)places, .wrap = places >> 32 & 0xFF};
	struct used_place old = {.index = (uint16_t)(places >> 16), .wrap = places >> 40 & 0xFF};
	uint16_t free = load16(&region->old_free_head);

	if (now.index >= ring->size || old.index >= ring->size)
		return -1;
	if (was_given(ring, now, old)) {
		free = load16(&region->free_head);
		old = now;
	}
	store16_release(&region->old_free_head, free);
	store_places(region, old, old);
	store16_release(&region->free_head, free);
	ring->used = old.index;
	ring->used_wrap = old.wrap;
	buffer->first_free = free;
	return 0;
}

/* Entries on the free list are not in flight. -1: the list is a loop. */
static int clear_free(struct inflight_buffer *buffer)
{
	struct packed_region *region = buffer->region;
	uint16_t at = buffer->first_free;

	for (uint32_t seen = 0; at < buffer->size; seen++) {
		if (seen == buffer->size)
			return -1;
		store8_release(&region->entries[at].inflight, 0);
		at = load16(&region->entries[at].next);
	}
	return 0;
}

enum { TAKEN = 1 }; /* in last[], while chains are looked at: an entry belongs to one */

/* The entries of one chain. -1: it is none. */
static int follow_chain(struct inflight_buffer *buffer, uint16_t head, uint16_t slots, uint16_t *last)
{
	struct packed_region *region = buffer->region;
	uint16_t at = head;

	for (uint16_t i = 0; i < slots; i++) {
		if (at >= buffer->size || buffer->last[at] == TAKEN)
			return -1;
		buffer->last[at] = TAKEN;
		*last = at;
		at = buffer->next[at] = load16(&region->entries[at].next);
	}
	return slots ? 0 : -1;
}

static int find_left(struct inflight_buffer *buffer, const struct guest_ring *ring, uint32_t *slots)
{
	struct packed_region *region = buffer->region;

	*slots = 0;
	for (uint32_t i = 0; i < buffer->size; i++)
		buffer->last[i] = 0;
	for (uint32_t i = 0; i < buffer->size; i++) {
		struct left_request *left = &buffer->left[buffer->left_count];
		uint16_t last;

		if (!load8(&region->entries[i].inflight))
			continue;
		*left = (struct left_request){.counter = load64(&region->entries[i].counter),
					      .entry = (uint16_t)i,
					      .slots = load16(&region->entries[i].num)};
		if (follow_chain(buffer, left->entry, left->slots, &last) < 0)
			return -1;
		*slots += left->slots;
		buffer->left_count++;
	}
	return *slots <= ring->size ? 0 : -1;
}

/* From its end on: whenever this ends, what can be reached is free. */
static void make_free_list(struct inflight_buffer *buffer)
{
	struct packed_region *region = buffer->region;
	uint16_t first = (uint16_t)buffer->size;

	buffer->free = 0;
	for (uint32_t i = 0; i < buffer->size; i++) {
		if (buffer->last[i] == TAKEN)
			continue;
		buffer->next[i] = first;
		store16_release(&region->entries[i].next, first);
		first = (uint16_t)i;
		buffer->free++;
	}
	store16_release(&region->old_free_head, first);
	store16_release(&region->free_head, first);
	buffer->first_free = first;
}

static void find_ends(struct inflight_buffer *buffer)
{
	for (uint32_t i = 0; i < buffer->left_count; i++) {
		const struct left_request *left = &buffer->left[i];
		uint16_t at = left->entry;

		for (uint16_t seen = 1; seen < left->slots; seen++)
			at = buffer->next[at];
		buffer->last[left->entry] = at;
	}
}

int packed_recover(struct inflight_buffer *buffer, struct guest_ring *ring, const char **why)
{
	uint32_t slots;

	if (commit_or_undo(buffer, ring) < 0 || clear_free(buffer) < 0 ||
	    find_left(buffer, ring, &slots) < 0) {
		buffer->left_count = 0;
		*why = "the in-flight buffer is not this vring's";
		return -1;
	}
	make_free_list(buffer);
	find_ends(buffer);
	ring->next = ring->used;
	ring->available_wrap = ring->used_wrap;
	guest_ring_advance(ring, &ring->next, &ring->available_wrap, slots);
	return 0;
}

static struct descriptor copy_of(const struct packed_region *region, uint16_t entry)
{
	const struct packed_entry *at = &region->entries[entry];

	return (struct descriptor){
		.address = load64(&at->address),
		.length = load32(&at->length),
		.first = load16(&at->id),
		.second = load16(&at->flags),
	};
}

/* Whether a chain still stands at a place of the ring. What was being given back when its process
 * ended may have been written over, but for the flags. */
static bool stands_at(const struct inflight_buffer *buffer, const struct guest_ring *ring,
		      const struct left_request *left, uint16_t place)
{
	uint16_t at = left->entry;
	bool wrap = false;

	for (uint16_t i = 0; i < left->slots; i++, at = buffer->next[at]) {
		struct descriptor was = copy_of(buffer->region, at);
		struct descriptor is = load_descriptor(&ring->descriptors[place]);

		if (was.address != is.address || was.length != is.length ||
		    was.first != is.first || was.second != is.second)
			return false;
		guest_ring_advance(ring, &place, &wrap, 1);
	}
	return true;
}

/* Whether what is left stands in the ring one after the other, behind what was used. */
bool packed_place(struct inflight_buffer *buffer, const struct guest_ring *ring)
{
	uint16_t place = ring->used;
	bool wrap = ring->used_wrap, same = true;

	for (uint32_t i = 0; i < buffer->left_count; i++) {
		struct left_request *left = &buffer->left[i];

		left->position = place | (uint32_t)wrap << 15;
		same = same && stands_at(buffer, ring, left, place);
		guest_ring_advance(ring, &place, &wrap, left->slots);
	}
	return same;
}

void packed_chain(const struct inflight_buffer *buffer, struct request *request)
{
	uint16_t at = request->entry;

	for (uint16_t i = 0; i < request->slots; i++, at = buffer->next[at])
		request->chain[i] = copy_of(buffer->region, at);
}

int packed_fetched(struct inflight_buffer *buffer, struct request *request, const char **why)
{
	struct packed_region *region = buffer->region;
	uint16_t head = buffer->first_free, at = head;
	struct packed_entry *first;

	if (request->slots > buffer->free) {
		*why = "more requests are in flight than the vring has room for";
		return -1;
	}
	first = &region->entries[head];
	store16(&first->num, 0);
	store64(&first->counter, buffer->counter++);
	store8_release(&first->inflight, 1);
	for (uint16_t i = 0; i < request->slots; i++) {
		struct packed_entry *entry = &region->entries[at];

		if (i + 1 == request->slots) {
			store16_release(&first->last, at);
			buffer->last[head] = at;
		}
		store16_release(&first->num, (uint16_t)(i + 1));
		store64(&entry->address, request->chain[i].address);
		store32(&entry->length, request->chain[i].length);
		store16(&entry->flags, request->chain[i].second);
		store16(&entry->id, request->chain[i].first);
		at = buffer->next[at];
		store16_release(&region->free_head, at);
	}
	store16_release(&region->old_free_head, at);
	buffer->first_free = at;
	buffer->free -= request->slots;
	request->entry = head;
	return 0;
}

void packed_giving(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry,
		   uint16_t slots)
{
	struct packed_region *region = buffer->region;
	struct used_place now = place_of(ring);
	uint16_t last = buffer->last[entry];

	guest_ring_advance(ring, &now.index, &now.wrap, slots);
	buffer->next[last] = buffer->first_free;
	buffer->first_free = entry;
	buffer->free += slots;
	store16_release(&region->entries[last].next, buffer->next[last]);
	store16_release(&region->free_head, entry);
	store_places(region, now, place_of(ring));
}

void packed_given(struct inflight_buffer *buffer, const struct guest_ring *ring, uint16_t entry)
{
	struct packed_region *region = buffer->region;

	store8_release(&region->entries[entry].inflight, 0);
	store16_release(&region->old_free_head, buffer->first_free);
	store_places(region, place_of(ring), place_of(ring));
}

void packed_unfetched(struct inflight_buffer *buffer, uint16_t entry, uint16_t slots)
{
	struct packed_region *region = buffer->region;
	uint16_t last = buffer->last[entry];

	store8_release(&region->entries[entry].inflight, 0);
	buffer->next[last] = buffer->first_free;
	buffer->first_free = entry;
	buffer->free += slots;
	store16_release(&region->entries[last].next, buffer->next[last]);
	store16_release(&region->free_head, entry);
	store16_release(&region->old_free_head, entry);
}
