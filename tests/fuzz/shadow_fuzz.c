/* A fuzzer of shadow vrings: the input is a program that a hostile guest and a hostile device run
 * against one. Every word of both rings, the memory table, the log and the files behind them may
 * change between any two rounds.
 *
 * What must hold whatever they do: nothing is touched outside the mappings (see peers.h), nothing of
 * guest memory is written outside the ring, the device is given addresses of guest memory only, and
 * the books balance.
 */
#include "../../native/shadow_ring.h"
#include "peers.h"

#include <errno.h>
#include <string.h>

#define HALF 0x2000u
#define RING 0x800u
#define IOVA 0x200000000ull
#define BUFFER_BYTES 2112u /* for in-flight buffers of 64 descriptors */
#define LOG_BYTES 64u	   /* too few for all of guest memory */

static struct area log_area, buffer_area;
static struct vb_shadow *shadow;

static void submit(void)
{
	guest_submits(shadow->guest.next, shadow->guest.available_wrap);
}

static void set_memory(void)
{
	unsigned which = take(1) & 3;
	struct vb_region regions[2];
	size_t count = 0;

	for (unsigned i = 0; i < 2; i++)
		if (which & (1 << i))
			regions[count++] = region(i);
	CHECK(vb_shadow_set_memory(shadow, regions, count) == (which & 1 ? 0 : -EFAULT));
}

static void cut_file(void)
{
	struct area *areas[] = {&halves[0], &halves[1], &log_area, &buffer_area};

	cut_or_mend(areas[take(1) % 4], 0);
}

static void check_books(void)
{
	struct device_ring *ring = &shadow->device;
	unsigned busy = 0, listed = 0, slots = 0, at = ring->oldest;

	for (unsigned i = 0; i < ring->size; i++)
		busy += ring->requests[i].busy;
	for (; at != NO_SLOT && listed <= ring->size; at = ring->requests[at].newer, listed++) {
		const struct inflight *request = &ring->requests[at];

		CHECK(request->busy);
		slots += request->table == UINT32_MAX ? request->count : 1;
	}
	CHECK(busy == ring->inflight && listed == busy && slots + ring->free == ring->size);
	CHECK(shadow->guest.next < (packed() ? setup.size : 0x10000u));
	CHECK(shadow->guest.used < (packed() ? setup.size : 0x10000u));
}

/* When it was fetched. Later the memory may be another, with requests in flight. */
static void check_buffers(void)
{
	const struct request *request = &shadow->request;

	CHECK(request->count <= request->room);
	for (unsigned i = 0; i < request->count; i++) {
		uint64_t from = request->buffers[i].address, size = request->buffers[i].length;

		CHECK(!size || (from >= GUEST && from - GUEST + size <= 2 * HALF));
	}
}

static void step(void)
{
	take_memory_in();
	vb_shadow_step(shadow);
	check_memory(0, 0);
	check_books();
	check_buffers();
}

static void make_shadow(uint32_t base)
{
	const struct vb_region regions[] = {region(0), region(1)};

	begin_device();
	setup.memory = (uintptr_t)device_memory;
	setup.base = base;
	shadow = vb_shadow_new(&setup, regions, 2);
	available = (uint16_t)base;
}

/* It stops, tells where, and another one goes on there. */
static void change_over(void)
{
	const struct inflight_buffer *record = &shadow->record;
	int64_t base;

	vb_shadow_hold(shadow);
	step();
	base = vb_shadow_base(shadow);
	CHECK(base == -EBUSY || base >= 0);
	CHECK(vb_shadow_inflight(shadow) ==
	      (int64_t)shadow->device.inflight + record->left_count - record->left_taken);
	if (base < 0 || take(1) & 1)
		base = setup.inflight ? vb_shadow_position(shadow) : base;
	else
		vb_shadow_unfetch(shadow);
	vb_shadow_free(shadow);
	make_shadow(base < 0 ? 0 : (uint32_t)base);
}

static void another_device(void)
{
	vb_shadow_renew(shadow, IOVA + (take(1) << 16), -1);
	device_used = 0;
}

static void set_log(void)
{
	unsigned kind = take(1);

	vb_shadow_set_log(shadow, kind & 1 ? log_area.at : NULL, LOG_BYTES - kind % 8);
	vb_shadow_set_used_log(shadow, kind & 2 ? guest_address() : UINT64_MAX);
}

/* The front-end keeps it, and has it mapped too. */
static void buffer_writes(void)
{
	unsigned bytes = 1u << take(1) % 4, value = take(bytes);
	unsigned at = take(2) % (unsigned)(vb_inflight_size(setup.inflight_size, packed()) - 8);

	if (setup.inflight && !buffer_area.cut)
		memcpy(buffer_area.at + at, &value, bytes > 4 ? 4 : bytes);
}

static void run(void)
{
	static void (*const things[])(void) = {
		step, step, submit, submit, guest_writes, device_writes,
		device_completes, device_completes, set_memory, cut_file, change_over,
		another_device, set_log, buffer_writes,
	};

	while (more_input() && shadow) {
		things[take(1) % (sizeof(things) / sizeof(*things))]();
		if (shadow && vb_shadow_broken(shadow)) {
			vb_shadow_free(shadow);
			make_whole(&halves[0]);
			make_whole(&buffer_area);
			make_shadow(packed() ? 0x80008000 : 0);
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint64_t driver;
	uint32_t base;
	unsigned kind;

	if (!log_area.at) {
		log_area = make_area(LOG_BYTES);
		buffer_area = make_area(BUFFER_BYTES);
	}
	begin_input(data, size);
	ring_bytes = RING;
	setup = (struct vb_shadow_setup){
		.features = (uint64_t)(take(1) & 0xF3) << 28,
		.descriptor_area = GUEST,
		.iova = IOVA,
		.size = 1 + take(1) % 64,
		.kick = -1, .call = -1, .device_kick = -1, .device_call = -1, .broken = -1,
	};
	for (setup.slots = 1; setup.slots < setup.size;)
		setup.slots *= 2;
	if (!packed())
		setup.size = setup.slots;
	setup.pool = setup.features & FEATURE_INDIRECT ? 64 : 0;
	driver = 16 * setup.size;
	setup.driver_area = GUEST + driver;
	setup.device_area = GUEST + (driver + 6 + 2 * setup.size + 3) / 4 * 4;
	vb_shadow_layout(setup.slots, setup.pool, &layout);
	begin_guest(HALF);
	make_whole(&log_area);
	base = take(4);
	kind = take(1);
	setup.inflight_size = setup.size;
	setup.inflight = kind & 2 ? (uintptr_t)buffer_area.at : 0;
	make_whole(&buffer_area);
	memset(buffer_area.at, 0, BUFFER_BYTES);
	make_shadow(kind & 1 ? base : packed() ? 0x80008000 : 0);
	run();
	vb_shadow_free(shadow);
	end_device();
	return 0;
}
