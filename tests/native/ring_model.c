#include "ring_model.h"

unsigned char *memory, *ring, *buffer;
unsigned size, driver_at, device_at;
uint64_t features;
struct request requests[SLOTS];
unsigned char log_bits[(GUEST + MEMORY) / 4096 / 8];
_Thread_local unsigned long long state;
unsigned long submitted, returned;
struct vb_shadow *shadow;
struct vb_shadow_layout layout;
struct vb_shadow_setup setup;
uint16_t seen_available, device_used;
int queue[SLOTS], queued;
unsigned heads[SLOTS];
long last_number = -1;

static unsigned next, wrap = 1, used, used_wrap = 1, free_slots;
static uint16_t available;
static int by_id[65536], taken_descs[32768];
static struct vb_region region;

unsigned rnd(unsigned below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (unsigned)(state >> 33) % below;
}

int is_packed(void)
{
	return !!(features & PACKED);
}

static void put16(unsigned char *to, uint16_t value)
{
	__atomic_store_n((uint16_t *)to, value, __ATOMIC_RELEASE);
}

uint16_t get16(const unsigned char *from)
{
	return __atomic_load_n((const uint16_t *)from, __ATOMIC_ACQUIRE);
}

/* The shadow looks at the last word of a packed ring's descriptors at any time. */
static void put_desc(struct desc *to, struct desc from)
{
	to->addr = from.addr;
	to->len = from.len;
	to->a = from.a;
	put16((unsigned char *)&to->b, from.b);
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
	put16(memory + driver_at + 4 + 2 * (available % size), (uint16_t)head);
	put16(memory + driver_at + 2, ++available);
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
		put_desc(&descs[next], d);
		if (++next == size) {
			next = 0;
			wrap = !wrap;
		}
	}
	put16((unsigned char *)&descs[first].b, (uint16_t)first_flags);
}

void submit(void)
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
			CHECK(__atomic_load_n(&log_bits[page / 8], __ATOMIC_RELAXED) & 1 << page % 8);
	if (!is_packed())
		for (unsigned d = 0; d < size; d++)
			if (taken_descs[d] == by_id[id] + 1)
				taken_descs[d] = 0;
	free_slots += r->slots;
	r->busy = 0;
	returned++;
}

/* What was given back from a place on; the place after it. */
static unsigned each_given(unsigned at, unsigned *at_wrap, void (*seen)(unsigned id, unsigned length))
{
	struct desc *d = (struct desc *)memory + at;
	uint16_t flags;

	while (!is_packed() && (uint16_t)at != get16(memory + device_at + 2)) {
		uint32_t pair[2];

		memcpy(pair, memory + device_at + 4 + 8 * ((uint16_t)at % size), 8);
		at++;
		seen(pair[0], pair[1]);
	}
	while (is_packed() && (flags = get16((unsigned char *)&d->b), 1) &&
	       !!(flags & 0x80) == !!(flags & 0x8000) && !!(flags & 0x80) == (int)*at_wrap) {
		unsigned slots = requests[by_id[d->a]].slots;

		seen(d->a, d->len);
		at += slots;
		if (at >= size) {
			at -= size;
			*at_wrap = !*at_wrap;
		}
		d = (struct desc *)memory + at;
	}
	return at;
}

void reap(void)
{
	used = each_given(used, &used_wrap, take_back);
}

static void mark_given(unsigned id, unsigned length)
{
	struct request *r = &requests[by_id[id]];

	CHECK(r->busy && r->complete && r->length == length);
	r->complete = 2;
}

unsigned done_but_not_given(void)
{
	unsigned wrap_now = used_wrap, count = 0;

	each_given(used, &wrap_now, mark_given);
	for (int slot = 0; slot < SLOTS; slot++)
		count += requests[slot].busy && requests[slot].complete == 1;
	return count;
}

void forget_what_was_not_given(void)
{
	unsigned wrap_now = used_wrap;

	each_given(used, &wrap_now, mark_given);
	for (int slot = 0; slot < SLOTS; slot++) {
		requests[slot].with_device = 0;
		requests[slot].complete = requests[slot].complete == 2;
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
	/* Also after a crash: in the order in which the driver sent them. */
	CHECK((long)r->number > last_number);
	last_number = (long)r->number;
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

void device_takes(void)
{
	unsigned char *driver = ring + layout.driver_area;

	while (seen_available != get16(driver + 2)) {
		unsigned head = get16(driver + 4 + 2 * (seen_available++ % setup.slots));
		int slot = fetch(head);

		heads[slot] = head;
		queue[queued++] = slot;
	}
}

void device_completes(void)
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
	put16(device + 2, device_used);
}

void new_device(void)
{
	for (int slot = 0; slot < SLOTS; slot++)
		requests[slot].with_device = 0;
	seen_available = device_used = 0;
	queued = 0;
	last_number = -1;
}

void make_shadow(uint32_t base)
{
	unsigned slots = 1;

	while (slots < size)
		slots *= 2;
	setup.features = features;
	setup.descriptor_area = GUEST;
	setup.driver_area = GUEST + driver_at;
	setup.device_area = GUEST + device_at;
	setup.iova = IOVA;
	setup.size = size;
	setup.base = base;
	setup.slots = slots;
	setup.pool = features & INDIRECT ? 1024 : 0;
	vb_shadow_layout(setup.slots, setup.pool, &layout);
	free(ring);
	ring = aligned_alloc(4096, layout.size);
	memset(ring, 0, layout.size);
	setup.memory = (uintptr_t)ring;
	region = (struct vb_region){GUEST, MEMORY, (uintptr_t)memory};
	new_device();
	shadow = vb_shadow_new(&setup, &region, 1);
	CHECK(shadow);
	vb_shadow_set_log(shadow, log_bits, sizeof(log_bits));
	vb_shadow_set_used_log(shadow, GUEST + device_at);
}

void drop_shadow(void)
{
	vb_shadow_free(shadow);
	shadow = NULL;
}

void restart_driver(void)
{
	memset(memory, 0, device_at + 6 + 8 * size);
	memset(requests, 0, sizeof(requests));
	memset(taken_descs, 0, sizeof(taken_descs));
	free_slots = size;
	available = 0;
	next = used = 0;
	wrap = used_wrap = 1;
}

void use_inflight_buffer(void)
{
	uint64_t bytes = vb_inflight_size(size, is_packed());

	buffer = aligned_alloc(64, bytes);
	memset(buffer, 0, bytes);
	setup.inflight = (uintptr_t)buffer;
	setup.inflight_size = size;
}

void make_model(int argc, char **argv)
{
	CHECK(argc == 7);
	state = strtoull(argv[2], NULL, 0);
	size = (unsigned)strtoul(argv[5], NULL, 0);
	features = strtoull(argv[6], NULL, 0) | (strcmp(argv[4], "packed") ? 0 : PACKED);
	setup.kick = setup.call = setup.device_kick = setup.device_call = setup.broken = -1;
	free_slots = size;
	driver_at = 16 * size;
	device_at = (driver_at + 6 + 2 * size + 63) / 64 * 64;
	/* Nothing around it: the sanitizer sees every byte that is touched outside. */
	memory = aligned_alloc(4096, MEMORY);
	memset(memory, 0, READ_ONLY);
	memset(memory + READ_ONLY, 0xA5, MEMORY - READ_ONLY);
}

void free_model(void)
{
	free(memory);
	free(ring);
	free(buffer);
}
