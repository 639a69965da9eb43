/* Shadow vrings between the models, a round at a time: everything arrives and comes back once; guests
 * and devices that break the rules harm nobody.
 *
 * usage: shadow_test relay|hostile SEED ROUNDS packed|split SIZE FEATURES
 */
#include "ring_model.h"

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
	vb_shadow_unfetch(shadow);
	drop_shadow();
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
	new_device();
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
	drop_shadow();
}

static void scribble(void)
{
	unsigned end = device_at + 6 + 8 * size, where = rnd(3);
	unsigned offset = where ? rnd(end) : TABLES + rnd(SLOTS * 1024);
	uint64_t value = rnd(2) ? rnd(8) : (uint64_t)rnd(1u << 31) << rnd(33);

	if (rnd(4) == 0)
		value = GUEST + rnd(MEMORY + 4096);
	memcpy(memory + offset, &value, 1u << rnd(3));
	if (rnd(8) == 0)
		memcpy(buffer + rnd((unsigned)vb_inflight_size(size, is_packed()) - 3), &value,
		       1u << rnd(3));
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
			drop_shadow();
			restart_driver();
			if (rnd(2))
				memset(buffer, 0, vb_inflight_size(size, is_packed()));
			make_shadow(is_packed() ? 0x80008000 : 0);
		}
		for (unsigned canary = READ_ONLY; i % 4096 == 0 && canary < MEMORY; canary++)
			CHECK(memory[canary] == 0xA5);
	}
	CHECK(breaks > rounds / 20000);
	drop_shadow();
}

int main(int argc, char **argv)
{
	int hostile_guest;

	make_model(argc, argv);
	hostile_guest = !strcmp(argv[1], "hostile");
	if (hostile_guest || rnd(2))
		use_inflight_buffer();
	(hostile_guest ? hostile : relay)(strtoul(argv[3], NULL, 0));
	free_model();
	return 0;
}
