/* The driver's side of a split vring (virtio 1.4, section 2.7). */
#include "device_ring.h"

#include "shadow.h"

#include <stdlib.h>
#include <string.h>

#define IN_RING UINT32_MAX

static uint32_t round_up(uint32_t value, uint32_t to)
{
	return (value + to - 1) / to * to;
}

void vb_shadow_layout(uint32_t slots, uint32_t pool, struct vb_shadow_layout *layout)
{
	layout->driver_area = 16 * slots;
	layout->device_area = round_up(layout->driver_area + 6 + 2 * slots, 64);
	layout->pool = round_up(layout->device_area + 6 + 8 * slots, 64);
	layout->size = round_up(layout->pool + 16 * pool, 4096);
}

bool device_ring_init(struct device_ring *ring, uint32_t size, uint32_t pool, bool event_idx,
		      uint8_t *memory, uint64_t iova)
{
	struct vb_shadow_layout layout;

	vb_shadow_layout(size, pool, &layout);
	*ring = (struct device_ring){
		.event_idx = event_idx,
		.oldest = NO_SLOT,
		.newest = NO_SLOT,
		.free = size,
		.size = size,
		.pool = pool,
		.pool_iova = iova + layout.pool,
		.descriptors = (struct descriptor *)memory,
		.driver = memory + layout.driver_area,
		.device = memory + layout.device_area,
		.tables = (struct descriptor *)(memory + layout.pool),
		.next = calloc(size, sizeof(*ring->next)),
		.pieces = calloc(pool / POOL_PIECE + 1, 1),
		.buffers = calloc(size, sizeof(*ring->buffers)),
		.in_tables = calloc(pool + 1, sizeof(*ring->in_tables)),
		.requests = calloc(size, sizeof(*ring->requests)),
	};
	if (!ring->next || !ring->pieces || !ring->buffers || !ring->in_tables || !ring->requests) {
		device_ring_free(ring);
		return false;
	}
	for (uint32_t i = 0; i < size; i++)
		ring->next[i] = (uint16_t)(i + 1);
	return true;
}

void device_ring_free(struct device_ring *ring)
{
	free(ring->next);
	free(ring->pieces);
	free(ring->buffers);
	free(ring->in_tables);
	free(ring->requests);
}

/* Pieces that lie together, searched from where the last ones were: mostly the next are free. */
static uint32_t take_table(struct device_ring *ring, uint32_t count)
{
	uint32_t all = ring->pool / POOL_PIECE, wanted = (count + POOL_PIECE - 1) / POOL_PIECE;
	uint32_t at = ring->pool_cursor, run = 0;

	for (uint32_t seen = 0; seen < all + wanted && wanted <= all; seen++, at++) {
		if (at >= all)
			at = run = 0;
		run = ring->pieces[at] ? 0 : run + 1;
		if (run < wanted)
			continue;
		for (uint32_t i = 0; i < wanted; i++)
			ring->pieces[at - i] = 1;
		ring->pool_cursor = at + 1;
		return (at + 1 - wanted) * POOL_PIECE;
	}
	return IN_RING;
}

static void give_table_back(struct device_ring *ring, uint32_t table, uint32_t count)
{
	for (uint32_t i = 0; i < (count + POOL_PIECE - 1) / POOL_PIECE; i++)
		ring->pieces[table / POOL_PIECE + i] = 0;
}

static struct descriptor as_descriptor(const struct buffer *buffer, bool last, uint16_t next)
{
	return (struct descriptor){
		.address = buffer->address,
		.length = buffer->length,
		.first = (uint16_t)((buffer->write ? DESC_WRITE : 0) | (last ? 0 : DESC_NEXT)),
		.second = last ? 0 : next,
	};
}

static void put_in_table(struct device_ring *ring, uint16_t head, uint32_t table,
			 const struct buffer *buffers, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		ring->in_tables[table + i] = buffers[i];
		store_descriptor(&ring->tables[table + i],
				 as_descriptor(&buffers[i], i + 1 == count, (uint16_t)(i + 1)));
	}
	store_descriptor(&ring->descriptors[head],
			 (struct descriptor){
				 .address = ring->pool_iova + 16 * (uint64_t)table,
				 .length = 16 * count,
				 .first = DESC_INDIRECT,
			 });
}

/* Free descriptors are chained already; the last one's next stays what is free then. */
static uint16_t put_in_ring(struct device_ring *ring, const struct buffer *buffers, uint32_t count)
{
	uint16_t at = ring->first_free;

	for (uint32_t i = 0; i < count; i++) {
		uint16_t next = ring->next[at];

		ring->buffers[at] = buffers[i];
		store_descriptor(&ring->descriptors[at],
				 as_descriptor(&buffers[i], i + 1 == count, next));
		at = next;
	}
	return at;
}

static void append(struct device_ring *ring, uint16_t head)
{
	struct inflight *request = &ring->requests[head];

	request->older = ring->newest;
	request->newer = NO_SLOT;
	if (ring->newest == NO_SLOT)
		ring->oldest = head;
	else
		ring->requests[ring->newest].newer = head;
	ring->newest = head;
	ring->inflight++;
}

void device_ring_show(struct device_ring *ring, uint16_t head)
{
	store16(ring->driver + 4 + 2 * (ring->available & (ring->size - 1)), head);
	store16_release(ring->driver + 2, ++ring->available);
}

uint16_t device_ring_add(struct device_ring *ring, const struct buffer *buffers, uint32_t count)
{
	uint16_t head = ring->first_free;
	uint32_t table = IN_RING;

	if (!ring->free)
		return NO_SLOT;
	if (count > 1)
		table = take_table(ring, count);
	if (table == IN_RING && count > ring->free)
		return NO_SLOT;
	if (table == IN_RING) {
		ring->first_free = put_in_ring(ring, buffers, count);
		ring->free -= count;
	} else {
		put_in_table(ring, head, table, buffers, count);
		ring->first_free = ring->next[head];
		ring->free--;
	}
	ring->requests[head] = (struct inflight){
		.busy = true,
		.count = count,
		.table = table,
		.sequence = ring->sequence++,
	};
	append(ring, head);
	return head;
}

/* From the private copies: the device before may have written to the ring. */
static void put_again(struct device_ring *ring, uint16_t head)
{
	const struct inflight *request = &ring->requests[head];
	uint16_t at = head;

	if (request->table != IN_RING) {
		put_in_table(ring, head, request->table, &ring->in_tables[request->table],
			     request->count);
		return;
	}
	for (uint32_t i = 0; i < request->count; i++, at = ring->next[at])
		store_descriptor(&ring->descriptors[at],
				 as_descriptor(&ring->buffers[at], i + 1 == request->count,
					       ring->next[at]));
}

void device_ring_renew(struct device_ring *ring, uint64_t iova)
{
	struct vb_shadow_layout layout;

	vb_shadow_layout(ring->size, ring->pool, &layout);
	memset(ring->driver, 0, layout.pool - layout.driver_area);
	ring->pool_iova = iova + layout.pool;
	ring->available = ring->kicked = ring->used = 0;
	for (uint16_t at = ring->oldest; at != NO_SLOT; at = ring->requests[at].newer) {
		if (ring->requests[at].done)
			continue;
		put_again(ring, at);
		device_ring_show(ring, at);
	}
}

int device_ring_take(struct device_ring *ring, uint16_t *head, uint32_t *length, const char **why)
{
	uint16_t pending = load16_acquire(ring->device + 2) - ring->used;
	struct used_element element;

	if (!pending)
		return 0;
	if (pending > ring->inflight) {
		*why = "the device's used index is out of range";
		return -1;
	}
	element = load_used((const struct used_element *)(ring->device + 4 +
							  8 * (ring->used & (ring->size - 1))));
	if (element.id >= ring->size || !ring->requests[element.id].busy ||
	    ring->requests[element.id].done) {
		*why = "the device completed a request that it does not have";
		return -1;
	}
	ring->used++;
	*head = (uint16_t)element.id;
	*length = element.length;
	return 1;
}

const struct buffer *device_ring_buffer(const struct device_ring *ring, uint16_t *at, uint16_t head,
					uint32_t i)
{
	const struct inflight *request = &ring->requests[head];

	if (request->table != IN_RING)
		return &ring->in_tables[request->table + i];
	*at = i ? ring->next[*at] : head;
	return &ring->buffers[*at];
}

void device_ring_remove(struct device_ring *ring, uint16_t head)
{
	struct inflight *request = &ring->requests[head];
	uint16_t last = head;

	if (request->older == NO_SLOT)
		ring->oldest = request->newer;
	else
		ring->requests[request->older].newer = request->newer;
	if (request->newer == NO_SLOT)
		ring->newest = request->older;
	else
		ring->requests[request->newer].older = request->older;
	ring->inflight--;
	request->busy = false;
	if (request->table != IN_RING) {
		give_table_back(ring, request->table, request->count);
		ring->free++;
	} else {
		for (uint32_t i = 1; i < request->count; i++)
			last = ring->next[last];
		ring->free += request->count;
	}
	ring->next[last] = ring->first_free;
	ring->first_free = head;
}

bool device_ring_wants_kick(struct device_ring *ring)
{
	uint16_t before = ring->kicked;

	ring->kicked = ring->available;
	full_fence();
	if (!ring->event_idx)
		return !(load16(ring->device) & USED_NO_NOTIFY);
	return passed_event(load16(ring->device + 4 + 8 * (uint64_t)ring->size), ring->available,
			    before);
}

void device_ring_ignore_calls(struct device_ring *ring)
{
	if (!ring->event_idx)
		store16(ring->driver, AVAIL_NO_INTERRUPT);
}

bool device_ring_want_calls(struct device_ring *ring)
{
	if (ring->event_idx)
		store16(ring->driver + 4 + 2 * (uint64_t)ring->size, ring->used);
	else
		store16(ring->driver, 0);
	full_fence();
	return load16(ring->device + 2) != ring->used;
}
