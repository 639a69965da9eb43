#define _GNU_SOURCE
#include "peers.h"

#include "../../native/vring.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u

struct vb_shadow_setup setup;
struct area halves[2];
unsigned half, ring_bytes;
uint16_t available;
struct vb_shadow_layout layout;
unsigned char *device_memory;
uint16_t device_used;

static unsigned char before[2 * HALF_MAX];
static const uint8_t *input;
static size_t left;

void begin_input(const uint8_t *data, size_t size)
{
	input = data;
	left = size;
}

bool more_input(void)
{
	return left;
}

unsigned take(unsigned bytes)
{
	unsigned value = 0;

	for (; bytes && left; bytes--, left--)
		value = value << 8 | *input++;
	return value;
}

static unsigned pages(const struct area *area)
{
	return (area->size + PAGE - 1) / PAGE * PAGE;
}

struct area make_area(unsigned size)
{
	struct area area = {.size = size, .fd = memfd_create("fuzz", MFD_CLOEXEC)};
	unsigned whole = pages(&area);
	unsigned char *around =
		mmap(NULL, whole + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(area.fd >= 0 && around != MAP_FAILED && ftruncate(area.fd, whole) == 0);
	area.at = mmap(around + PAGE, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		       area.fd, 0);
	CHECK(area.at != MAP_FAILED);
	return area;
}

void make_whole(struct area *area)
{
	if (area->cut)
		CHECK(ftruncate(area->fd, pages(area)) == 0);
	area->cut = false;
}

void cut_or_mend(struct area *area, unsigned bytes)
{
	CHECK(ftruncate(area->fd, area->cut ? pages(area) : bytes) == 0);
	area->cut = !area->cut;
}

bool packed(void)
{
	return setup.features & FEATURE_PACKED;
}

void begin_guest(unsigned bytes)
{
	half = bytes;
	for (unsigned i = 0; i < 2; i++) {
		if (!halves[i].at)
			halves[i] = make_area(half);
		make_whole(&halves[i]);
		memset(halves[i].at, 0, half);
	}
}

struct vb_region region(unsigned which)
{
	return (struct vb_region){GUEST + which * half, half, (uintptr_t)halves[which].at};
}

/* Through the file: it may be shorter than its mapping. */
void put(unsigned offset, const void *data, unsigned size)
{
	const struct area *area = &halves[offset / half % 2];

	if (offset % half + size <= half && !area->cut)
		CHECK(pwrite(area->fd, data, size, offset % half) == (ssize_t)size);
}

uint64_t guest_address(void)
{
	const uint64_t odd[] = {0, GUEST - 1, GUEST + 2 * half, UINT64_MAX, UINT64_MAX - 15,
				1ull << 63, GUEST + half - 8, GUEST + 2 * half - 16};
	unsigned kind = take(1);

	if (kind < 8)
		return odd[kind];
	return GUEST + (kind & 8 ? ring_bytes : 0) + take(2) % (kind & 16 ? 2 * half : ring_bytes);
}

uint32_t length(void)
{
	unsigned kind = take(1);

	return kind == 0 ? UINT32_MAX : kind == 1 ? half : kind & 3 ? kind : kind << 4;
}

unsigned offset_of(uint64_t address)
{
	return (unsigned)(address - GUEST);
}

unsigned table_at(unsigned kind)
{
	return ring_bytes + 0x400 * (kind & 3);
}

static void put_descriptor(unsigned offset, unsigned flags, unsigned other)
{
	struct descriptor one = {.address = guest_address(), .length = length()};

	one.first = (uint16_t)(packed() ? other : flags);
	one.second = (uint16_t)(packed() ? flags : other);
	put(offset, &one, sizeof(one));
}

static void make_available(uint16_t head, unsigned wrong)
{
	unsigned driver = offset_of(setup.driver_area);

	put(driver + 4 + 2 * (available % setup.size), &head, 2);
	available = (uint16_t)(available + (wrong & 128 ? wrong : 1));
	put(driver + 2, &available, 2);
}

void guest_submits(unsigned place, bool wrap)
{
	unsigned count = 1 + take(1) % 5, wrong = take(1), head = take(1) % setup.size;
	unsigned at = packed() ? place : head, ring = offset_of(setup.descriptor_area);
	unsigned table = table_at(wrong);
	bool indirect = wrong & 1;
	unsigned mark = !packed() ? 0 : wrap ? DESC_AVAIL : DESC_USED;

	for (unsigned i = 0; i < count; i++) {
		unsigned flags = (take(1) & (wrong & 64 ? 0xFF : 6)) | (i + 1 < count);

		if (indirect) {
			put_descriptor(table + 16 * i, flags & ~4u, packed() ? i : i + 1);
			continue;
		}
		put_descriptor(ring + 16 * at, flags | mark, packed() ? i : (at + 1) % setup.size);
		at = (at + 1) % setup.size;
	}
	if (indirect) {
		struct descriptor one = {.address = GUEST + table, .length = 16 * count};

		one.first = (uint16_t)(packed() ? wrong : DESC_INDIRECT);
		one.second = (uint16_t)(packed() ? DESC_INDIRECT | mark : 0);
		put(ring + 16 * at, &one, sizeof(one));
	}
	if (!packed())
		make_available((uint16_t)head, wrong);
}

void guest_writes(void)
{
	unsigned offset = take(2), size = 1 + take(1) % 16;
	uint8_t bytes[16];

	for (unsigned i = 0; i < size; i++)
		bytes[i] = (uint8_t)take(1);
	put(offset % (offset & 1 ? 2 * half : ring_bytes), bytes, size);
}

/* What a file no longer has counts as zeros. */
static void read_memory(unsigned char *into)
{
	for (unsigned i = 0; i < 2; i++) {
		ssize_t size = pread(halves[i].fd, into + i * half, half, 0);

		CHECK(size >= 0);
		memset(into + i * half + size, 0, half - (size_t)size);
	}
}

void take_memory_in(void)
{
	read_memory(before);
}

static bool ours_to_write(unsigned offset)
{
	uint64_t at = GUEST + offset, size = setup.size;

	if (packed() && at - setup.descriptor_area < 16 * size)
		return true;
	return at - setup.device_area < (packed() ? 4 : 6 + 8 * size);
}

void check_memory(unsigned more, uint8_t value)
{
	static unsigned char after[2 * HALF_MAX];

	read_memory(after);
	for (unsigned page = 0; page < 2 * half; page += PAGE) {
		if (memcmp(before + page, after + page, PAGE) == 0)
			continue;
		for (unsigned i = page; i < page + PAGE; i++)
			if (before[i] != after[i] && !ours_to_write(i))
				CHECK(more-- && after[i] == value);
	}
}

void begin_device(void)
{
	free(device_memory);
	device_memory = aligned_alloc(PAGE, layout.size);
	CHECK(device_memory);
	memset(device_memory, 0, layout.size);
	device_used = 0;
}

void end_device(void)
{
	free(device_memory);
	device_memory = NULL;
}

void device_writes(void)
{
	unsigned offset = take(2) % layout.size, size = 1 + take(1) % 8;

	for (; size && offset < layout.size; size--, offset++)
		device_memory[offset] = (uint8_t)take(1);
}

void device_completes(void)
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
