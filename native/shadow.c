/* A shadow vring: what goes from the guest's ring to the device's and back, and what is noted. */
#include "shadow_ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

void vb_log_mark(uint8_t *log, uint64_t bytes, uint64_t guest_address, uint64_t size)
{
	uint64_t page = guest_address >> 12, last;

	if (!size)
		return;
	last = (guest_address + size - 1) >> 12;
	for (; page <= last && page / 8 < bytes; page++)
		__atomic_fetch_or(&log[page / 8], (uint8_t)(1 << page % 8), __ATOMIC_SEQ_CST);
}

void break_vring(struct vb_shadow *shadow, const char *why)
{
	if (shadow->broken)
		return;
	__atomic_store_n(&shadow->broken, why, __ATOMIC_RELEASE);
	signal_eventfd(shadow->setup.broken);
}

/* What the device may have written: all that it was given to write to. The length that it tells
 * may be too small (virtio 1.4, section 2.7.8.2). */
static void log_request(struct vb_shadow *shadow, uint16_t head)
{
	struct device_ring *ring = &shadow->device;
	uint32_t count = ring->requests[head].count;
	uint16_t at = head;

	for (uint32_t i = 0; i < count; i++) {
		const struct buffer *buffer = device_ring_buffer(ring, &at, head, i);

		shadow->stats.bytes += buffer->length;
		if (buffer->write && shadow->guest.log.log)
			vb_log_mark(shadow->guest.log.log, shadow->guest.log.bytes, buffer->address,
				    buffer->length);
	}
}

static void give_back(struct vb_shadow *shadow, uint16_t head)
{
	const struct inflight *request = &shadow->device.requests[head];

	log_request(shadow, head);
	inflight_giving(&shadow->record, &shadow->guest, request->entry, request->slots);
	guest_ring_give(&shadow->guest, request->id, request->slots, request->length);
	inflight_given(&shadow->record, &shadow->guest, request->entry);
	device_ring_remove(&shadow->device, head);
	shadow->stats.requests++;
}

/* Drivers that negotiated IN_ORDER get requests back in order; our device did not negotiate it. */
static void give_in_order(struct vb_shadow *shadow)
{
	struct device_ring *ring = &shadow->device;

	while (ring->oldest != NO_SLOT && ring->requests[ring->oldest].done)
		give_back(shadow, ring->oldest);
}

static bool relay_used(struct vb_shadow *shadow)
{
	uint64_t before = shadow->stats.requests;
	const char *why = NULL;
	uint16_t head;
	uint32_t length;
	int found;

	while ((found = device_ring_take(&shadow->device, &head, &length, &why)) > 0) {
		shadow->device.requests[head].length = length;
		if (shadow->in_order) {
			shadow->device.requests[head].done = true;
			give_in_order(shadow);
		} else {
			give_back(shadow, head);
		}
	}
	if (found < 0)
		break_vring(shadow, why);
	if (shadow->stats.requests == before)
		return false;
	shadow->full = false;
	if (guest_ring_wants_call(&shadow->guest)) {
		shadow->stats.calls++;
		signal_eventfd(shadow->setup.call);
	}
	return true;
}

/* What the one before us left comes first, and is noted already. */
static int next_request(struct vb_shadow *shadow, bool *again, const char **why)
{
	struct request *request = &shadow->request;
	int found = inflight_refetch(&shadow->record, &shadow->guest, &shadow->memory, request, why);

	*again = found != 0;
	return found ? found : guest_ring_fetch(&shadow->guest, &shadow->memory, request, why);
}

static int relay_one(struct vb_shadow *shadow, const char **why)
{
	struct request *request = &shadow->request;
	struct inflight *inflight;
	bool again;
	int found = next_request(shadow, &again, why);
	uint16_t head;

	if (found <= 0)
		return found;
	head = device_ring_add(&shadow->device, request->buffers, request->count);
	if (head == NO_SLOT) {
		if (!again)
			guest_ring_unfetch(&shadow->guest, request);
		shadow->full = true;
		if (shadow->device.inflight)
			return 0;
		*why = "a request is larger than the vring";
		return -1;
	}
	if (again)
		shadow->record.left_taken++;
	else if (inflight_fetched(&shadow->record, request, why) < 0)
		return -1;
	inflight = &shadow->device.requests[head];
	inflight->id = request->id;
	inflight->slots = request->slots;
	inflight->entry = request->entry;
	inflight->position = request->position;
	device_ring_show(&shadow->device, head);
	return 1;
}

static bool relay_available(struct vb_shadow *shadow)
{
	const char *why = NULL;
	uint32_t moved = 0;
	int found = 0;

	while (moved < shadow->device.size && (found = relay_one(shadow, &why)) > 0)
		moved++;
	if (moved && device_ring_wants_kick(&shadow->device)) {
		shadow->stats.kicks++;
		signal_eventfd(shadow->setup.device_kick);
	}
	if (found < 0)
		break_vring(shadow, why);
	return moved;
}

/* One round in both directions; true if there may be more to do at once. */
bool shadow_round(struct vb_shadow *shadow)
{
	bool moved;

	if (shadow->broken)
		return false;
	guest_ring_ignore_kicks(&shadow->guest);
	device_ring_ignore_calls(&shadow->device);
	moved = relay_used(shadow);
	if (!shadow->held && !shadow->full)
		moved |= relay_available(shadow);
	if (moved)
		return true;
	moved = device_ring_want_calls(&shadow->device);
	if (!shadow->held && !shadow->full)
		moved |= guest_ring_want_kicks(&shadow->guest);
	return moved && !shadow->broken;
}

static struct vb_region *copy_regions(const struct vb_region *regions, size_t count)
{
	struct vb_region *copy = calloc(count + 1, sizeof(*copy));

	if (copy && count)
		memcpy(copy, regions, count * sizeof(*copy));
	return copy;
}

static bool init(struct vb_shadow *shadow, const struct vb_region *regions, size_t count)
{
	const struct vb_shadow_setup *setup = &shadow->setup;

	guest_ring_init(&shadow->guest, setup);
	shadow->in_order = setup->features & FEATURE_IN_ORDER;
	shadow->memory.regions = copy_regions(regions, count);
	shadow->memory.count = count;
	if (!inflight_init(&shadow->record, (void *)(uintptr_t)setup->inflight, setup->inflight_size,
			   shadow->guest.packed))
		return false;
	if (!request_init(&shadow->request, setup->size) || !shadow->memory.regions ||
	    !guest_ring_map(&shadow->guest, &shadow->memory) ||
	    !guest_ring_has(&shadow->guest, setup->base))
		return false;
	return device_ring_init(&shadow->device, setup->slots, setup->pool, shadow->guest.event_idx,
				(uint8_t *)(uintptr_t)setup->memory, setup->iova);
}

static bool begin(struct vb_shadow *shadow)
{
	const char *why;

	guest_ring_start(&shadow->guest, shadow->setup.base);
	if (inflight_begin(&shadow->record, &shadow->guest, &why) < 0)
		break_vring(shadow, why);
	return true;
}

struct vb_shadow *vb_shadow_new(const struct vb_shadow_setup *setup, const struct vb_region *regions,
				size_t count)
{
	struct vb_shadow *shadow = calloc(1, sizeof(*shadow));

	if (!shadow)
		return NULL;
	shadow->setup = *setup;
	shadow->wake = -1;
	pthread_mutex_init(&shadow->lock, NULL);
	if (!init(shadow, regions, count) || !thread_init(shadow)) {
		vb_shadow_free(shadow);
		return NULL;
	}
	guarded(shadow, begin);
	return shadow;
}

void vb_shadow_free(struct vb_shadow *shadow)
{
	if (!shadow)
		return;
	vb_shadow_stop(shadow);
	thread_free(shadow);
	device_ring_free(&shadow->device);
	inflight_free(&shadow->record);
	request_free(&shadow->request);
	free(shadow->memory.regions);
	pthread_mutex_destroy(&shadow->lock);
	free(shadow);
}

/* With IN_ORDER: a request that the device completed waits for one before it. */
static bool done_out_of_order(const struct device_ring *ring)
{
	for (uint16_t at = ring->oldest; at != NO_SLOT; at = ring->requests[at].newer)
		if (ring->requests[at].done)
			return true;
	return false;
}

/* Requests in flight are given up as if never fetched, if they are the last ones fetched. */
int64_t vb_shadow_base(struct vb_shadow *shadow)
{
	const struct device_ring *ring = &shadow->device;
	const struct inflight_buffer *record = &shadow->record;
	bool waiting = record->left_taken < record->left_count;
	uint32_t position = guest_ring_position(&shadow->guest);

	if (waiting) {
		if (record->overtaken)
			return -EBUSY;
		position = record->left[record->left_taken].position;
	}
	if (ring->oldest != NO_SLOT) {
		const struct inflight *oldest = &ring->requests[ring->oldest];

		if (ring->sequence - oldest->sequence != ring->inflight || done_out_of_order(ring) ||
		    (record->overtaken && oldest->sequence < record->left_count))
			return -EBUSY;
		position = oldest->position;
	}
	return guest_ring_base(&shadow->guest, position);
}

static bool unfetch(struct vb_shadow *shadow)
{
	const struct device_ring *ring = &shadow->device;
	struct inflight_buffer *record = &shadow->record;

	for (uint32_t i = record->left_count; i-- > record->left_taken;)
		inflight_unfetched(record, record->left[i].entry, record->left[i].slots);
	for (uint16_t at = ring->newest; at != NO_SLOT; at = ring->requests[at].older)
		inflight_unfetched(record, ring->requests[at].entry, ring->requests[at].slots);
	return false;
}

void vb_shadow_unfetch(struct vb_shadow *shadow)
{
	guarded(shadow, unfetch);
}

int64_t vb_shadow_position(struct vb_shadow *shadow)
{
	return guest_ring_base(&shadow->guest, guest_ring_position(&shadow->guest));
}

int64_t vb_shadow_inflight(struct vb_shadow *shadow)
{
	const struct inflight_buffer *record = &shadow->record;

	return shadow->device.inflight + record->left_count - record->left_taken;
}

void vb_shadow_renew(struct vb_shadow *shadow, uint64_t iova, int broken)
{
	shadow->setup.iova = iova;
	shadow->setup.broken = broken;
	shadow->full = false;
	device_ring_renew(&shadow->device, iova);
}

void vb_shadow_mute(struct vb_shadow *shadow)
{
	shadow->setup.broken = -1;
}

int64_t vb_shadow_set_memory(struct vb_shadow *shadow, const struct vb_region *regions, size_t count)
{
	struct vb_region *copy = copy_regions(regions, count), *old = NULL;
	struct guest_memory memory = {.regions = copy, .count = count};
	int64_t result = 0;

	if (!copy)
		return -ENOMEM;
	shadow_lock(shadow);
	if (guest_ring_map(&shadow->guest, &memory)) {
		old = shadow->memory.regions;
		shadow->memory = memory;
	} else {
		old = copy;
		result = -EFAULT;
	}
	shadow_unlock(shadow);
	free(old);
	return result;
}

void vb_shadow_set_log(struct vb_shadow *shadow, uint8_t *log, uint64_t bytes)
{
	shadow_lock(shadow);
	shadow->guest.log.log = log;
	shadow->guest.log.bytes = bytes;
	shadow_unlock(shadow);
}

void vb_shadow_set_used_log(struct vb_shadow *shadow, uint64_t guest_address)
{
	shadow_lock(shadow);
	shadow->guest.log.guest_address = guest_address;
	shadow_unlock(shadow);
}

void vb_shadow_stats(struct vb_shadow *shadow, struct vb_shadow_stats *stats)
{
	shadow_lock(shadow);
	*stats = shadow->stats;
	stats->inflight = shadow->device.inflight;
	shadow_unlock(shadow);
}

const char *vb_shadow_broken(struct vb_shadow *shadow)
{
	return __atomic_load_n(&shadow->broken, __ATOMIC_ACQUIRE);
}
