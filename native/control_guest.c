/* The device's side of a guest's control vring. */
#include "bus_error.h"
#include "control.h"
#include "guest_ring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct vb_requests {
	struct guest_memory memory;
	struct guest_ring ring;
	struct request request;
	bool fetched;
	const char *broken;
};

/* What one call works with, and its result. */
struct call {
	struct vb_requests *requests;
	uint8_t *bytes;
	uint64_t room;
	uint64_t length;
	uint32_t reply;
	int64_t result;
};

static int64_t guarded_call(struct call *call, void (*work)(void *argument))
{
	if (call->requests->broken)
		return -EPROTO;
	if (!survives(work, call))
		call->requests->broken = "guest memory is gone";
	return call->requests->broken ? -EPROTO : call->result;
}

static struct vb_region *copy_regions(const struct vb_region *regions, size_t count)
{
	struct vb_region *copy = calloc(count + 1, sizeof(*copy));

	if (copy && count)
		memcpy(copy, regions, count * sizeof(*copy));
	return copy;
}

static void begin(void *argument)
{
	struct call *call = argument;

	guest_ring_start(&call->requests->ring, (uint32_t)call->length);
}

struct vb_requests *vb_requests_new(const struct vb_shadow_setup *setup,
				    const struct vb_region *regions, size_t count)
{
	struct vb_requests *requests = calloc(1, sizeof(*requests));
	struct call call = {.requests = requests, .length = setup->base};

	if (!requests)
		return NULL;
	guest_ring_init(&requests->ring, setup);
	requests->memory.regions = copy_regions(regions, count);
	requests->memory.count = count;
	if (!request_init(&requests->request, setup->size) || !requests->memory.regions ||
	    !guest_ring_map(&requests->ring, &requests->memory) ||
	    !guest_ring_has(&requests->ring, setup->base)) {
		vb_requests_free(requests);
		return NULL;
	}
	catch_bus_errors();
	guarded_call(&call, begin);
	return requests;
}

void vb_requests_free(struct vb_requests *requests)
{
	if (!requests)
		return;
	request_free(&requests->request);
	free(requests->memory.regions);
	free(requests);
}

/* A buffer was checked to be guest memory, but it may lie in several regions. */
static void copy_buffer(struct vb_requests *requests, uint64_t address, uint8_t *bytes,
			uint64_t length, bool write)
{
	while (length) {
		const struct vb_region *region = find_region(&requests->memory, address);
		uint64_t offset, here;
		uint8_t *at;

		if (!region) {
			requests->broken = "a descriptor points outside guest memory";
			return;
		}
		offset = address - region->guest_address;
		here = region->size - offset < length ? region->size - offset : length;
		at = (uint8_t *)(uintptr_t)(region->address + offset);
		memcpy(write ? at : bytes, write ? bytes : at, here);
		address += here;
		bytes += here;
		length -= here;
	}
}

static uint64_t least(uint64_t one, uint64_t other)
{
	return one < other ? one : other;
}

/* What the device reads comes before what it writes (virtio 1.4, section 2.7.4.2). */
static void read_command(struct call *call)
{
	struct vb_requests *requests = call->requests;
	uint64_t length = 0, reply = 0;

	for (uint32_t i = 0; i < requests->request.count; i++) {
		const struct buffer *buffer = &requests->request.buffers[i];

		if (buffer->write) {
			reply += buffer->length;
			continue;
		}
		if (reply) {
			requests->broken = "a buffer to read follows one to write";
			return;
		}
		if (length < call->room)
			copy_buffer(requests, buffer->address, call->bytes + length,
				    least(buffer->length, call->room - length), false);
		length += buffer->length;
	}
	if (!reply)
		requests->broken = "a control command has no room for its reply";
	call->reply = (uint32_t)least(reply, UINT32_MAX);
	call->result = (int64_t)length;
}

static int fetch(struct vb_requests *requests)
{
	return guest_ring_fetch(&requests->ring, &requests->memory, &requests->request,
				&requests->broken);
}

static void fetch_command(void *argument)
{
	struct call *call = argument;
	struct vb_requests *requests = call->requests;
	int found = fetch(requests);

	if (!found && guest_ring_want_kicks(&requests->ring))
		found = fetch(requests);
	call->result = -EAGAIN;
	if (found <= 0)
		return;
	requests->fetched = true;
	read_command(call);
}

int64_t vb_requests_fetch(struct vb_requests *requests, uint8_t *command, uint64_t room,
			  uint32_t *reply)
{
	struct call call = {.requests = requests, .bytes = command, .room = room};
	int64_t result;

	if (requests->fetched)
		return -EBUSY;
	result = guarded_call(&call, fetch_command);
	*reply = call.reply;
	return result;
}

static void give_back(void *argument)
{
	struct call *call = argument;
	struct vb_requests *requests = call->requests;
	struct request *request = &requests->request;
	uint64_t done = 0;

	for (uint32_t i = 0; i < request->count && done < call->length; i++) {
		const struct buffer *buffer = &request->buffers[i];
		uint64_t here = least(buffer->length, call->length - done);

		if (!buffer->write)
			continue;
		copy_buffer(requests, buffer->address, call->bytes + done, here, true);
		done += here;
	}
	if (requests->broken)
		return;
	guest_ring_give(&requests->ring, request->id, request->slots, (uint32_t)done);
	requests->fetched = false;
	call->result = guest_ring_wants_call(&requests->ring);
}

int64_t vb_requests_give(struct vb_requests *requests, const uint8_t *reply, uint32_t length)
{
	/* Nothing is written to them. */
	struct call call = {
		.requests = requests,
		.bytes = (uint8_t *)(uintptr_t)reply,
		.length = length,
	};

	return requests->fetched ? guarded_call(&call, give_back) : -EINVAL;
}

static void ask_for_kicks(void *argument)
{
	struct call *call = argument;

	guest_ring_want_kicks(&call->requests->ring);
	call->result = 0;
}

int64_t vb_requests_ask_for_kicks(struct vb_requests *requests)
{
	struct call call = {.requests = requests};

	return guarded_call(&call, ask_for_kicks);
}

int64_t vb_requests_base(struct vb_requests *requests)
{
	uint32_t position = guest_ring_position(&requests->ring);

	if (requests->fetched)
		position = requests->request.position;
	return guest_ring_base(&requests->ring, position);
}

const char *vb_requests_broken(struct vb_requests *requests)
{
	return requests->broken;
}
