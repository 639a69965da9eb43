/* Shadow vrings between a model of a guest's driver and a model of a device, both written from the
 * specification and sharing nothing with the code under test. Single-threaded: rounds are stepped.
 *
 * usage: shadow_test relay|hostile SEED ROUNDS packed|split SIZE FEATURES
 */
#include "../../native/shadow.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUEST 0x40000000ull
#define IOVA 0x200000000ull
#define MEMORY (4u << 20)
#define TABLES (1u << 20)   /* indirect tables, 1 KiB for each request */
#define READ_ONLY (2u << 20) /* data that the device reads: 1 KiB for each request */
#define WRITABLE (3u << 20)
#define SLOTS 512
#define CHAIN 16
#define INDIRECT (1ull << 28)
#define EVENT_IDX (1ull << 29)
#define PACKED (1ull << 34)
#define IN_ORDER (1ull << 35)

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t a, b;
};

struct piece {
	uint64_t addr;
	uint32_t len;
	int write;
};

struct request {
	int busy, with_device, complete;
	unsigned count, slots, id, length;
	unsigned long number;
	struct piece pieces[CHAIN];
};

static unsigned char *memory, *ring;
static unsigned size, driver_at, device_at, next, wrap = 1, used, used_wrap = 1, free_slots;
static uint64_t features;
static uint16_t available;
static struct request requests[SLOTS];
static int by_id[65536], taken_descs[32768];
static unsigned char log_bits[(GUEST + MEMORY) / 4096 / 8];
static unsigned long long state;
static unsigned long submitted, returned;
static struct vb_shadow *shadow;
static struct vb_region region;
static struct vb_shadow_layout layout;
static struct vb_shadow_setup setup;
static uint16_t seen_available, device_used;
static int queue[SLOTS], queued;

static unsigned rnd(unsigned below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (unsigned)(state >> 33) % below;
}

static int is_packed(void)
{
	return !!(features & PACKED);
}

static void put16(unsigned offset, uint16_t value)
{
	memcpy(memory + offset, &value, 2);
}

static uint16_t get16(const unsigned char *from)
{
	uint16_t value;

	memcpy(&value, from, 2);
	return value;
}

static void make_request(int slot)
{
	struct request *r = &requests[slot];
	unsigned readable, most = features & INDIRECT ? CHAIN : size < CHAIN ? size : CHAIN;

	*r = (struct request){.busy = 1, .number = submitted, .count = 1 + rnd(most)};
	readable = rnd(r->count + 1);
	for (unsigned i = 0; i < r->count; i++) {
		unsigned area = i < readable ? READ_ONLY : WRITABLE;

		r->pieces[i].addr = GUEST + area + slot * 1024u + i * 64;
		r->pieces[i].len = rnd(65);
		r->pieces[i].write = i >= readable;
	}
}

static struct desc entry(const struct piece *p, unsigned flags, unsigned last)
{
	flags |= p->write ? 2 : 0;
	return is_packed() ? (struct desc){p->addr, p->len, (uint16_t)last, (uint16_t)flags}
			   : (struct desc){p->addr, p->len, (uint16_t)flags, (uint16_t)last};
}

static void make_table(int slot, struct request *r)
{
	struct desc *table = (struct desc *)(memory + TABLES + slot * 1024);

	for (unsigned i = 0; i < r->count; i++)
		table[i] = entry(&r->pieces[i], i + 1 < r->count && !is_packed(), i + 1);
}

static void add_split(int slot, struct request *r, int indirect)
{
	struct desc *descs = (struct desc *)memory;
	unsigned head = 0, before = 0, first = 1;

	for (unsigned i = 0; i < (indirect ? 1 : r->count); i++) {
		unsigned d = rnd(size);

		while (taken_descs[d])
			d = (d + 1) % size;
		taken_descs[d] = slot + 1;
		descs[d] = indirect ? (struct desc){GUEST + TABLES + slot * 1024u, r->count * 16, 4, 0}
				    : entry(&r->pieces[i], 0, 0);
		if (first) {
			head = d;
		} else {
			descs[before].a |= 1;
			descs[before].b = (uint16_t)d;
		}
		first = 0;
		before = d;
	}
	r->id = head;
	by_id[head] = slot;
	put16(driver_at + 4 + 2 * (available % size), (uint16_t)head);
	put16(driver_at + 2, ++available);
}

static void add_packed(int slot, struct request *r, int indirect)
{
	struct desc *descs = (struct desc *)memory;
	unsigned count = indirect ? 1 : r->count, first = next, first_flags = 0;

	r->id = (unsigned)slot;
	by_id[slot] = slot;
	for (unsigned i = 0; i < count; i++) {
		unsigned flags = (wrap ? 0x80 : 0x8000) | (i + 1 < count ? 1 : 0);
		struct desc d = indirect ? (struct desc){GUEST + TABLES + slot * 1024u,
							 r->count * 16, (uint16_t)slot,
							 (uint16_t)(flags | 4)}
					 : entry(&r->pieces[i], flags, (unsigned)slot);

		if (i == 0) {
			first_flags = d.b;
			d.b = descs[next].b;
		}
		descs[next] = d;
		if (++next == size) {
			next = 0;
			wrap = !wrap;
		}
	}
	descs[first].b = (uint16_t)first_flags;
}

static void submit(void)
{
	int slot = (int)rnd(SLOTS), indirect;
	struct request *r = &requests[slot];

	if (r->busy)
		return;
	make_request(slot);
	indirect = features & INDIRECT && rnd(2);
	r->slots = indirect ? 1 : r->count;
	if (r->slots > free_slots) {
		r->busy = 0;
		return;
	}
	free_slots -= r->slots;
	if (indirect)
		make_table(slot, r);
	if (is_packed())
		add_packed(slot, r, indirect);
	else
		add_split(slot, r, indirect);
	submitted++;
}

static void take_back(unsigned id, unsigned length)
{
	struct request *r = &requests[by_id[id]];

	CHECK(r->busy && r->id == id && r->complete && r->length == length);
	CHECK(!(features & IN_ORDER) || r->number == returned);
	for (unsigned i = 0; i < r->count; i++)
		for (uint64_t page = r->pieces[i].addr / 4096; r->pieces[i].write && r->pieces[i].len &&
		     page <= (r->pieces[i].addr + r->pieces[i].len - 1) / 4096; page++)
			CHECK(log_bits[page / 8] & 1 << page % 8);
	if (!is_packed())
		for (unsigned d = 0; d < size; d++)
			if (taken_descs[d] == by_id[id] + 1)
				taken_descs[d] = 0;
	free_slots += r->slots;
	r->busy = 0;
	returned++;
}

static void reap(void)
{
	if (is_packed()) {
		struct desc *d = (struct desc *)memory + used;

		while (!!(d->b & 0x80) == !!(d->b & 0x8000) && !!(d->b & 0x80) == (int)used_wrap) {
			unsigned slots = requests[by_id[d->a]].slots;

			take_back(d->a, d->len);
			used += slots;
			if (used >= size) {
				used -= size;
				used_wrap = !used_wrap;
			}
			d = (struct desc *)memory + used;
		}
		return;
	}
	while ((uint16_t)used != get16(memory + device_at + 2)) {
		uint32_t pair[2];

		memcpy(pair, memory + device_at + 4 + 8 * ((uint16_t)used % size), 8);
		used++;
		take_back(pair[0], pair[1]);
	}
}

/* The device: a split ring with chains, flat or indirect, that must be what was submitted. */
static int fetch(unsigned head)
{
	struct desc *table = (struct desc *)ring, *d = &table[head];
	struct request *r;
	unsigned i = 0;

	CHECK(head < setup.slots);
	if (d->a & 4) {
		CHECK(features & INDIRECT);
		table = (struct desc *)(ring + (d->addr - setup.iova));
		CHECK(d->addr >= setup.iova + layout.pool && d->addr + d->len <= setup.iova + layout.size);
		d = table;
	}
	r = &requests[(d->addr - GUEST) % (1u << 20) / 1024];
	CHECK(r->busy && !r->with_device && !r->complete);
	for (;; d = &table[d->b], i++) {
		CHECK(i < r->count && d->addr == r->pieces[i].addr && d->len == r->pieces[i].len);
		CHECK(!!(d->a & 2) == r->pieces[i].write);
		if (!(d->a & 1))
			break;
	}
	CHECK(i + 1 == r->count);
	r->with_device = 1;
	return (int)(r - requests);
}

static unsigned heads[SLOTS];

static void device_takes(void)
{
	unsigned char *driver = ring + layout.driver_area;

	while (seen_available != get16(driver + 2)) {
		unsigned head = get16(driver + 4 + 2 * (seen_available++ % setup.slots));
		int slot = fetch(head);

		heads[slot] = head;
		queue[queued++] = slot;
	}
}

static void device_completes(void)
{
	unsigned char *device = ring + layout.device_area;
	unsigned which = rnd((unsigned)queued);
	int slot = queue[which];
	uint32_t pair[2] = {heads[slot], rnd(1000)};

	queue[which] = queue[--queued];
	requests[slot].length = pair[1];
	requests[slot].with_device = 0;
	requests[slot].complete = 1;
	memcpy(device + 4 + 8 * (device_used % setup.slots), pair, 8);
	device_used++;
	memcpy(device + 2, &device_used, 2);
}

static void make_shadow(uint32_t base)
{
	unsigned slots = 1;

	while (slots < size)
		slots *= 2;
	setup = (struct vb_shadow_setup){
		.features = features,
		.descriptor_area = GUEST,
		.driver_area = GUEST + driver_at,
		.device_area = GUEST + device_at,
		.iova = IOVA,
		.size = size,
		.base = base,
		.slots = slots,
		.pool = features & INDIRECT ? 1024 : 0,
		.kick = -1, .call = -1, .device_kick = -1, .device_call = -1, .broken = -1,
	};
	vb_shadow_layout(setup.slots, setup.pool, &layout);
	free(ring);
	ring = aligned_alloc(4096, layout.size);
	memset(ring, 0, layout.size);
	setup.memory = (uintptr_t)ring;
	region = (struct vb_region){GUEST, MEMORY, (uintptr_t)memory};
	shadow = vb_shadow_new(&setup, &region, 1);
	CHECK(shadow);
	vb_shadow_set_log(shadow, log_bits, sizeof(log_bits));
	vb_shadow_set_used_log(shadow, GUEST + device_at);
	seen_available = device_used = 0;
	queued = 0;
}

/* Another shadow vring goes on where this one stopped: nothing is with the device. */
static void change_over(void)
{
	int64_t base;

	device_takes();
	while (queued)
		device_completes();
	while (vb_shadow_step(shadow))
		device_takes();
	while (queued)
		device_completes();
	vb_shadow_hold(shadow);
	while (vb_shadow_step(shadow))
		continue;
	reap();
	base = vb_shadow_base(shadow);
	CHECK(base >= 0);
	vb_shadow_free(shadow);
	make_shadow((uint32_t)base);
}

/* The device dies, having written anywhere in its ring; another one gets what was in flight. */
static void another_device(void)
{
	if (rnd(2))
		device_takes();
	while (vb_shadow_step(shadow))
		continue;
	for (unsigned i = 0; i < layout.size; i++)
		ring[i] = (unsigned char)rnd(256);
	setup.iova += 1 << 20;
	vb_shadow_renew(shadow, setup.iova, -1);
	for (int slot = 0; slot < SLOTS; slot++)
		requests[slot].with_device = 0;
	seen_available = device_used = 0;
	queued = 0;
}

static void relay(unsigned long rounds)
{
	make_shadow(is_packed() ? 0x80008000 : 0);
	while (returned < rounds) {
		unsigned what = rnd(64);

		if (what < 30 && submitted < rounds)
			submit();
		else if (what < 40)
			vb_shadow_step(shadow);
		else if (what < 50)
			device_takes();
		else if (what < 60 && queued)
			device_completes();
		else if (what < 63)
			reap();
		else if (rnd(20) == 0)
			change_over();
		else if (rnd(20) == 0)
			another_device();
		CHECK(!vb_shadow_broken(shadow));
	}
	CHECK(returned == submitted);
	for (uint64_t page = (GUEST + READ_ONLY) / 4096; page < (GUEST + WRITABLE) / 4096; page++)
		CHECK(!(log_bits[page / 8] & 1 << page % 8));
	vb_shadow_free(shadow);
}

static void scribble(void)
{
	unsigned end = device_at + 6 + 8 * size, where = rnd(3);
	unsigned offset = where ? rnd(end) : TABLES + rnd(SLOTS * 1024);
	uint64_t value = rnd(2) ? rnd(8) : (uint64_t)rnd(1u << 31) << rnd(33);

	if (rnd(4) == 0)
		value = GUEST + rnd(MEMORY + 4096);
	memcpy(memory + offset, &value, 1u << rnd(3));
}

/* What reaches the device lies in guest memory or is a table of ours, whatever the guest did. */
static void look_at_device_ring(void)
{
	unsigned char *driver = ring + layout.driver_area;

	while (seen_available != get16(driver + 2)) {
		unsigned head = get16(driver + 4 + 2 * (seen_available++ % setup.slots)), i = 0;
		struct desc *table = (struct desc *)ring, *d;

		CHECK(head < setup.slots);
		d = &table[head];
		if (d->a & 4) {
			CHECK(d->addr >= setup.iova + layout.pool && d->addr + d->len <= setup.iova + layout.size);
			d = table = (struct desc *)(ring + (d->addr - setup.iova));
		}
		for (;; d = &table[d->b]) {
			CHECK(i++ < 70000);
			CHECK(!d->len || (d->addr >= GUEST && d->addr + d->len <= GUEST + MEMORY));
			if (!(d->a & 1))
				break;
		}
		if (queued < SLOTS && rnd(4)) {
			heads[queued] = head;
			queue[queued] = queued;
			queued++;
		}
	}
}

static void lie_to_driver(void)
{
	uint64_t value = rnd(2) ? rnd(8) : rnd(1u << 31);
	unsigned at_ = layout.device_area + rnd(6 + 8 * setup.slots);

	memcpy(ring + at_, &value, rnd(2) ? 2 : 4);
}

static void hostile(unsigned long rounds)
{
	unsigned breaks = 0;

	make_shadow(rnd(2) ? 0 : 0x80008000);
	for (unsigned long i = 0; i < rounds; i++) {
		unsigned what = rnd(16);

		if (what < 8)
			scribble();
		else if (what == 8)
			submit();
		else if (what == 9 && rnd(8) == 0)
			lie_to_driver();
		for (int step = 0; step < 4 && vb_shadow_step(shadow); step++)
			continue;
		look_at_device_ring();
		if (queued && rnd(2))
			device_completes();
		if (vb_shadow_broken(shadow) || rnd(1000) == 0) {
			breaks += !!vb_shadow_broken(shadow);
			vb_shadow_free(shadow);
			memset(memory, 0, device_at + 6 + 8 * size);
			memset(requests, 0, sizeof(requests));
			memset(taken_descs, 0, sizeof(taken_descs));
			free_slots = size;
			available = 0;
			next = used = 0;
			wrap = used_wrap = 1;
			make_shadow(is_packed() ? 0x80008000 : 0);
		}
		for (unsigned canary = READ_ONLY; i % 4096 == 0 && canary < MEMORY; canary++)
			CHECK(memory[canary] == 0xA5);
	}
	CHECK(breaks > rounds / 20000);
	vb_shadow_free(shadow);
}

int main(int argc, char **argv)
{
	CHECK(argc == 7);
	state = strtoull(argv[2], NULL, 0);
	size = (unsigned)strtoul(argv[5], NULL, 0);
	features = strtoull(argv[6], NULL, 0) | (strcmp(argv[4], "packed") ? 0 : PACKED);
	free_slots = size;
	driver_at = 16 * size;
	device_at = (driver_at + 6 + 2 * size + 63) / 64 * 64;
	/* Nothing around it: the sanitizer sees every byte that is touched outside. */
	memory = aligned_alloc(4096, MEMORY);
	memset(memory, 0, READ_ONLY);
	memset(memory + READ_ONLY, 0xA5, MEMORY - READ_ONLY);
	(strcmp(argv[1], "relay") ? hostile : relay)(strtoul(argv[3], NULL, 0));
	free(memory);
	free(ring);
	return 0;
}
