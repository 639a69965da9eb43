/* A fuzzer of control vrings: the input is a program that a hostile guest runs against our device's
 * side of its vring, or a hostile device against our driver's side of its own.
 *
 * What must hold whatever they do: nothing is touched outside the mappings, commands and replies
 * (see peers.h); of guest memory no more than the ring and the reply's bytes is written; a vring
 * that another one takes over goes on with the same command; the device is shown what was sent, and
 * heard when it answers by the rules.
 */
#include "../../native/control.h"
#include "../../native/vring.h"
#include "peers.h"

#include <errno.h>
#include <string.h>

#define START 0x80008000u /* of packed rings */
#define UNTOUCHED 0xEE
#define REPLIED 0xA5
#define PARTS 2 /* of a command that a device is shown: it, and room for the reply */

static struct vb_requests *requests;
static bool fetched, ring_in_memory;
static uint32_t room_for_reply;

static struct vb_commands *commands;
static bool sent;
static unsigned answered; /* commands before that */
static uint16_t head;

static bool base_in_ring(uint32_t base)
{
	return !packed() || ((base & 0x7FFF) < setup.size && (base >> 16 & 0x7FFF) < setup.size);
}

/* Regions in either order; each may be missing. */
static void make_requests(uint32_t base, unsigned kind)
{
	struct vb_region regions[2];
	size_t count = 0;

	for (unsigned i = 0; i < 2; i++)
		if (!(kind & (2u << i)))
			regions[count++] = region(i ^ (kind & 1));
	setup.base = base;
	requests = vb_requests_new(&setup, regions, count);
	if (requests)
		CHECK(base_in_ring(base));
	else
		CHECK(!ring_in_memory || count < 2 || !base_in_ring(base));
	fetched = false;
}

/* One goes on where the other one ends. */
static void change_over(unsigned kind)
{
	int64_t base = vb_requests_base(requests);

	CHECK(base >= 0 && base <= (packed() ? UINT32_MAX : UINT16_MAX));
	CHECK(base_in_ring((uint32_t)base));
	vb_requests_free(requests);
	make_requests((uint32_t)base, kind);
}

static void other_memory(void)
{
	unsigned kind = take(1);

	/* Mostly all of it. */
	change_over(kind < 0xE0 ? kind & 1 : kind & 7);
}

/* The command has no byte more than there is room for. */
static int64_t fetch_into(uint8_t *command, unsigned room)
{
	int64_t length;

	memset(command, UNTOUCHED, room);
	take_memory_in();
	length = vb_requests_fetch(requests, command, room, &room_for_reply);
	check_memory(0, 0);
	if (fetched) {
		CHECK(length == -EBUSY);
		return length;
	}
	fetched = length >= 0;
	CHECK(fetched ? room_for_reply > 0 : length == -EAGAIN || length == -EPROTO);
	CHECK((length == -EPROTO) == (vb_requests_broken(requests) != NULL));
	for (int64_t i = fetched ? length : 0; i < room; i++)
		CHECK(command[i] == UNTOUCHED || length == -EPROTO);
	return length;
}

static unsigned any_length(void)
{
	unsigned kind = take(1);

	return kind < 0x40 ? kind : kind * 65;
}

static void fetch(void)
{
	unsigned room = any_length();
	uint8_t *command = malloc(room);

	fetch_into(command, room);
	free(command);
}

/* Memory is the same, so the command is. */
static void fetch_and_change_over(void)
{
	unsigned room = any_length();
	uint8_t *first = malloc(room), *second = malloc(room);
	int64_t length = fetch_into(first, room);

	if (length >= 0) {
		uint32_t reply = room_for_reply;
		int64_t base = vb_requests_base(requests);

		change_over(0);
		/* Its file may be too short. */
		if (!vb_requests_broken(requests)) {
			CHECK(fetch_into(second, room) == length && room_for_reply == reply);
			CHECK(memcmp(first, second, room) == 0);
			CHECK(vb_requests_base(requests) == base);
		}
	}
	free(first);
	free(second);
}

static void give(void)
{
	unsigned size = any_length();
	uint8_t *reply = malloc(size);
	int64_t result;

	memset(reply, REPLIED, size);
	take_memory_in();
	result = vb_requests_give(requests, reply, size);
	check_memory(!fetched ? 0 : size < room_for_reply ? size : room_for_reply, REPLIED);
	CHECK(!fetched ? result == -EINVAL : result == 0 || result == 1 || result == -EPROTO);
	CHECK((result == -EPROTO) == (vb_requests_broken(requests) != NULL));
	fetched = fetched && result < 0;
	free(reply);
}

static void submit(void)
{
	uint32_t place = (uint32_t)vb_requests_base(requests);

	guest_submits(place & 0x7FFF, place & 0x8000);
}

/* After which command it wants to be called. */
static void ask_for_calls(void)
{
	unsigned driver = offset_of(setup.driver_area);
	const uint16_t flags = take(1) & 3, event = (uint16_t)take(2);

	put(driver + (packed() ? 2 : 0), &flags, 2);
	put(driver + (packed() ? 0 : 4 + 2 * setup.size), &event, 2);
}

/* A descriptor's flags, or what is next. */
static void spoil_table(void)
{
	unsigned where = take(1);
	const uint16_t word = take(1) & 7;

	put(table_at(where) + 16 * (where / 8 % 4) + (where & 4 ? 12 : 14), &word, 2);
}

static void cut_file(void)
{
	unsigned which = take(1);

	cut_or_mend(&halves[which & 1], which / 2 % (half / 4096) * 4096);
}

static void place_ring(unsigned kind)
{
	unsigned driver = 16 * setup.size;
	unsigned device = (driver + (packed() ? 4 : 6 + 2 * setup.size) + 3) / 4 * 4;
	unsigned end = device + (packed() ? 4 : 6 + 8 * setup.size);
	/* At the end of the first region: nobody may touch what lies behind its mapping. */
	unsigned shift = kind & 1 ? (half - end) / 8 * 8 : 0;
	uint64_t *areas[] = {&setup.descriptor_area, &setup.driver_area, &setup.device_area};

	setup.descriptor_area = GUEST + shift;
	setup.driver_area = GUEST + shift + driver;
	setup.device_area = GUEST + shift + device;
	ring_bytes = (shift + end + 15) / 16 * 16;
	ring_in_memory = kind < 0xE0;
	for (unsigned i = 0; i < 3 && !ring_in_memory; i++)
		if (kind & (2u << i))
			*areas[i] = guest_address();
}

static void run_guest(void)
{
	static void (*const things[])(void) = {
		fetch, fetch, give, give, submit, submit, guest_writes, cut_file, other_memory,
		fetch_and_change_over, ask_for_calls, spoil_table,
	};
	uint32_t start = packed() ? START : 0;
	unsigned kind = take(1);
	uint32_t base;

	begin_guest(HALF_MAX);
	place_ring(kind);
	base = take(1) & 1 ? take(4) : start;
	available = (uint16_t)base;
	make_requests(base, 0);
	while (requests && more_input()) {
		things[take(1) % (sizeof(things) / sizeof(*things))]();
		if (!requests || !vb_requests_broken(requests))
			continue;
		make_whole(&halves[0]);
		make_whole(&halves[1]);
		other_memory();
	}
	vb_requests_free(requests);
}

static void make_commands(void)
{
	begin_device();
	commands = vb_commands_new((uintptr_t)device_memory, 0, setup.slots, packed());
	CHECK(commands);
	sent = false;
	answered = 0;
}

static struct descriptor at_slot(unsigned slot)
{
	struct descriptor one;

	memcpy(&one, device_memory + 16 * (slot % setup.slots), sizeof(one));
	return one;
}

/* Of the packed ring, so many descriptors after the start. */
static bool wrap_of(unsigned place)
{
	return place / setup.slots % 2 == 0;
}

static void check_shown(const struct buffer *parts)
{
	unsigned at = PARTS * answered;
	uint16_t index;

	if (!packed()) {
		memcpy(&index, device_memory + layout.driver_area + 2, 2);
		CHECK(index == (uint16_t)(answered + 1));
		memcpy(&head, device_memory + layout.driver_area + 4 + 2 * (answered % setup.slots), 2);
		at = head;
	}
	for (unsigned i = 0; i < PARTS; i++) {
		struct descriptor one = at_slot(at);
		unsigned flags = packed() ? one.second : one.first;
		unsigned mark = !packed() ? 0 : wrap_of(at) ? DESC_AVAIL : DESC_USED;

		CHECK(one.address == parts[i].address && one.length == parts[i].length);
		CHECK(flags == (mark | (parts[i].write ? DESC_WRITE : DESC_NEXT)));
		at = packed() ? at + 1 : one.second;
	}
}

static void send(void)
{
	const struct buffer parts[PARTS] = {
		{.address = take(4), .length = length()},
		{.address = take(4), .length = length(), .write = 1},
	};
	int64_t result = vb_commands_send(commands, parts[0].address, parts[0].length,
					  parts[1].address, parts[1].length);

	CHECK(result == (sent ? -EBUSY : 0));
	if (!sent)
		check_shown(parts);
	sent = true;
}

/* What the device wrote where the next answer belongs. */
static bool is_answer(void)
{
	unsigned place = PARTS * answered;
	struct descriptor one = at_slot(place);
	uint32_t id;

	if (packed())
		return !one.first && !!(one.second & DESC_USED) == wrap_of(place);
	memcpy(&id, device_memory + layout.device_area + 4 + 8 * (answered % setup.slots), 4);
	return id == head;
}

static int64_t done(void)
{
	int64_t result = vb_commands_done(commands);

	CHECK(result == 0 || (sent && (result == 1 || result == -EPROTO)));
	CHECK(result != 1 || is_answer());
	sent = sent && result != 1;
	answered += result == 1;
	if (result < 0) {
		vb_commands_free(commands);
		make_commands();
	}
	return result;
}

static void look(void)
{
	done();
}

/* By the rules, or with another id. */
static void complete(uint16_t id)
{
	unsigned place = PARTS * answered;
	struct descriptor one = {.length = length(), .first = id};

	if (!packed()) {
		device_used = (uint16_t)answered;
		device_completes();
		return;
	}
	one.second = wrap_of(place) ? DESC_AVAIL | DESC_USED : 0;
	memcpy(device_memory + 16 * (place % setup.slots), &one, sizeof(one));
}

static void completes(void)
{
	complete((uint16_t)(take(1) & 1));
}

/* Whatever the device wrote before. */
static void answer(void)
{
	struct used_element element = {.id = head};

	if (!sent)
		return;
	complete(0);
	memcpy(device_memory + layout.device_area + 4 + 8 * (answered % setup.slots), &element,
	       sizeof(element));
	CHECK(done() == 1);
}

static void run_device(void)
{
	static void (*const things[])(void) = {
		send, send, look, look, answer, answer, completes, device_writes,
	};

	vb_shadow_layout(setup.slots, 0, &layout);
	make_commands();
	while (more_input())
		things[take(1) % (sizeof(things) / sizeof(*things))]();
	vb_commands_free(commands);
	end_device();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	unsigned kind, wanted;

	begin_input(data, size);
	kind = take(1);
	wanted = take(1);
	setup = (struct vb_shadow_setup){
		.features = (uint64_t)(take(1) & 0xF3) << 28,
		.size = 1 + (kind & 2 ? wanted * 4 + kind / 4 % 4 : wanted % 64),
	};
	for (setup.slots = 1; setup.slots < setup.size;)
		setup.slots *= 2;
	if (packed())
		setup.slots = setup.size;
	else
		setup.size = setup.slots;
	if (!(kind & 1))
		run_guest();
	else if (setup.slots >= PARTS)
		run_device();
	return 0;
}
