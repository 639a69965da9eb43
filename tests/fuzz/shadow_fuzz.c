/* A fuzzer of shadow vrings: the input is a program that a hostile guest and a hostile device run
 * against one. Every word of both rings, the memory table, the log and the files behind them may
 * change between any two rounds.
 *
 * What must hold whatever they do: nothing is touched outside the mappings (they lie between
 * inaccessible pages, private memory is the sanitizers'), nothing of guest memory is written outside
 * the ring, the device is given addresses of guest memory only, and the books balance.
 */
#define _GNU_SOURCE
#include "../../native/shadow_ring.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUEST 0x40000000ull
#define HALF 0x2000u /* bytes of each of the two regions, which touch */
#define IOVA 0x200000000ull
#define BUFFER_BYTES 2112u /* for in-flight buffers of 64 descriptors */
#define LOG_BYTES 64u /* too few for all of guest memory */
#define RING 0x800u  /* bytes from the start of guest memory that rings may lie in */

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

/* A shared file between two pages that nobody may touch. */
struct area {
	unsigned char *at;
	int fd;
	unsigned size;
	bool cut;
};

static struct area halves[2], log_area, buffer_area;
static unsigned char before[2 * HALF];
static unsigned char *device_memory;
static const uint8_t *input;
static size_t left;
static struct vb_shadow *shadow;
static struct vb_shadow_setup setup;
static struct vb_shadow_layout layout;
static uint16_t available, device_used;

static unsigned take(unsigned bytes)
{
	unsigned value = 0;

	for (; bytes && left; bytes--, left--)
		value = value << 8 | *input++;
	return value;
}

static struct area make_area(unsigned size)
{
	struct area area = {.size = size, .fd = memfd_create("fuzz", MFD_CLOEXEC)};
	unsigned whole = (size + 4095) / 4096 * 4096;
	unsigned char *around =
		mmap(NULL, whole + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(area.fd >= 0 && around != MAP_FAILED && ftruncate(area.fd, whole) == 0);
	area.at = mmap(around + 4096, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		       area.fd, 0);
	CHECK(area.at != MAP_FAILED);
	return area;
}

static void make_whole(struct area *area)
{
	if (area->cut)
		CHECK(ftruncate(area->fd, (area->size + 4095) / 4096 * 4096) == 0);
	area->cut = false;
}

static bool packed(void)
{
	return setup.features & FEATURE_PACKED;
}

/* Guest memory, through the file: it may be shorter than its mapping. */
static void put(unsigned offset, const void *data, unsigned size)
{
	const struct area *half = &halves[offset / HALF % 2];

	if (offset % HALF + size <= HALF && !half->cut)
		CHECK(pwrite(half->fd, data, size, offset % HALF) == (ssize_t)size);
}

static uint64_t guest_address(void)
{
	static const uint64_t odd[] = {0, GUEST - 1, GUEST + 2 * HALF, UINT64_MAX, UINT64_MAX - 15,
				       1ull << 63, GUEST + HALF - 8, GUEST + 2 * HALF - 16};
	unsigned kind = take(1);

	if (kind < 8)
		return odd[kind];
	return GUEST + (kind & 8 ? RING : 0) + take(2) % (kind & 16 ? 2 * HALF : RING);
}

static uint32_t length(void)
{
	unsigned kind = take(1);

	return kind == 0 ? UINT32_MAX : kind == 1 ? HALF : kind & 3 ? kind : kind << 4;
}

static void put_descriptor(unsigned offset, unsigned flags, unsigned other)
{
	struct descriptor one = {.address = guest_address(), .length = length()};

	one.first = (uint16_t)(packed() ? other : flags);
	one.second = (uint16_t)(packed() ? flags : other);
	put(offset, &one, sizeof(one));
}

/* Mostly what a driver does, so that the rest is reached. */
static void guest_submits(void)
{
	unsigned count = 1 + take(1) % 5, wrong = take(1), at = take(1) % setup.size;
	bool indirect = wrong & 1;
	unsigned table = RING + 0x400 * (wrong & 3);
	uint16_t head = (uint16_t)at;

	if (packed())
		at = shadow->guest.next;
	for (unsigned i = 0; i < count; i++) {
		unsigned flags = (take(1) & (wrong & 64 ? 0xFF : 6)) | (i + 1 < count);

		if (indirect) {
			put_descriptor(table + 16 * i, flags & ~4u, packed() ? i : i + 1);
			continue;
		}
		if (packed())
			flags |= shadow->guest.available_wrap ? 0x80 : 0x8000;
		put_descriptor(16 * at, flags, packed() ? i : (at + 1) % setup.size);
		at = (at + 1) % setup.size;
	}
	if (indirect) {
		struct descriptor one = {.address = GUEST + table, .length = 16 * count};
		unsigned flags = 4 | (packed() ? shadow->guest.available_wrap ? 0x80 : 0x8000 : 0);

		one.first = (uint16_t)(packed() ? wrong : flags);
		one.second = (uint16_t)(packed() ? flags : 0);
		put(16 * at, &one, sizeof(one));
	}
	if (!packed()) {
		unsigned driver = (unsigned)(setup.driver_area - GUEST);

		put(driver + 4 + 2 * (available % setup.size), &head, 2);
		available = (uint16_t)(available + (wrong & 128 ? wrong : 1));
		put(driver + 2, &available, 2);
	}
}

static void guest_writes(void)
{
	unsigned offset = take(2), size = 1 + take(1) % 16;
	uint8_t bytes[16];

	for (unsigned i = 0; i < size; i++)
		bytes[i] = (uint8_t)take(1);
	put(offset % (offset & 1 ? 2 * HALF : RING), bytes, size);
}

static void device_writes(void)
{
	unsigned offset = take(2) % layout.size, size = 1 + take(1) % 8;

	for (; size && offset < layout.size; size--, offset++)
		device_memory[offset] = (uint8_t)take(1);
}

/* What it was given, or, now and then, what it never had. */
static void device_completes(void)
{
	struct used_element element = {.id = take(1), .length = length()};
	unsigned at = layout.device_area + 4 + 8 * (device_used % setup.slots);

	if (element.id < 0xF0)
		memcpy(&element.id, device_memory + layout.driver_area + 4 +
				    2 * (element.id % setup.slots), 2), element.id &= 0xFFFF;
	memcpy(device_memory + at, &element, sizeof(element));
	device_used++;
	memcpy(device_memory + layout.device_area + 2, &device_used, 2);
}

static void set_memory(void)
{
	unsigned which = take(1) & 3;
	struct vb_region regions[2];
	size_t count = 0;

	for (unsigned i = 0; i < 2; i++)
		if (which & (1 << i))
			regions[count++] = (struct vb_region){GUEST + i * HALF, HALF,
							      (uintptr_t)halves[i].at};
	CHECK(vb_shadow_set_memory(shadow, regions, count) == (which & 1 ? 0 : -EFAULT));
}

static void cut_file(void)
{
	struct area *areas[] = {&halves[0], &halves[1], &log_area, &buffer_area};
	struct area *area = areas[take(1) % 4];

	CHECK(ftruncate(area->fd, area->cut ? (area->size + 4095) / 4096 * 4096 : 0) == 0);
	area->cut = !area->cut;
}

static void take_memory_in(void)
{
	for (unsigned i = 0; i < 2; i++)
		if (!halves[i].cut)
			CHECK(pread(halves[i].fd, before + i * HALF, HALF, 0) == HALF);
		else
			memset(before + i * HALF, 0, HALF);
}

static bool ours_to_write(unsigned offset)
{
	uint64_t at = GUEST + offset, size = setup.size;

	if (packed() && at - setup.descriptor_area < 16 * size)
		return true;
	return at - setup.device_area < (packed() ? 4 : 6 + 8 * size);
}

static void check_memory(void)
{
	static unsigned char after[2 * HALF];

	memcpy(after, before, sizeof(after));
	for (unsigned i = 0; i < 2; i++)
		if (!halves[i].cut)
			CHECK(pread(halves[i].fd, after + i * HALF, HALF, 0) == HALF);
	if (memcmp(before, after, sizeof(after)) == 0)
		return;
	for (unsigned i = 0; i < sizeof(after); i++)
		CHECK(before[i] == after[i] || ours_to_write(i));
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
	check_memory();
	check_books();
	check_buffers();
}

static void make_shadow(uint32_t base)
{
	struct vb_region regions[2];

	for (unsigned i = 0; i < 2; i++)
		regions[i] = (struct vb_region){GUEST + i * HALF, HALF, (uintptr_t)halves[i].at};
	free(device_memory);
	device_memory = aligned_alloc(4096, layout.size);
	memset(device_memory, 0, layout.size);
	setup.memory = (uintptr_t)device_memory;
	setup.base = base;
	shadow = vb_shadow_new(&setup, regions, 2);
	available = (uint16_t)base;
	device_used = 0;
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
		step, step, guest_submits, guest_submits, guest_writes, device_writes,
		device_completes, device_completes, set_memory, cut_file, change_over,
		another_device, set_log, buffer_writes,
	};

	while (left && shadow) {
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

	if (!halves[0].at) {
		halves[0] = make_area(HALF);
		halves[1] = make_area(HALF);
		log_area = make_area(LOG_BYTES);
		buffer_area = make_area(BUFFER_BYTES);
	}
	input = data;
	left = size;
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
	for (unsigned i = 0; i < 2; i++) {
		make_whole(&halves[i]);
		memset(halves[i].at, 0, HALF);
	}
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
	free(device_memory);
	device_memory = NULL;
	return 0;
}
