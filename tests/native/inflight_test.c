/* Shadow vrings that end between any two stores, as kill -9 ends a process: the next one goes on from
 * the in-flight buffer alone. Every request comes back once; what was given back is never done again.
 *
 * usage: inflight_test crash SEED ROUNDS packed|split SIZE FEATURES
 */
#include "ring_model.h"

#include <setjmp.h>

static jmp_buf end;
static unsigned stores_left; /* 0: it lives */
static unsigned long crashes, changes, left;

void crash_point(void)
{
	if (stores_left && --stores_left == 0)
		longjmp(end, 1);
}

/* What a front-end knows of a ring whose back-end went away: the used index of a split one, and of a
 * packed one nothing. */
static uint32_t last_base(void)
{
	return is_packed() ? 0x80008000 : get16(memory + device_at + 2);
}

/* The process is gone, the device has stopped. It may happen again on the way. */
static void start_anew(uint32_t base)
{
	drop_shadow();
	forget_what_was_not_given();
	while (setjmp(end))
		crashes++;
	stores_left = rnd(4) ? 0 : 1 + rnd(3 * size + 8);
	make_shadow(base);
	stores_left = 0;
	CHECK(!vb_shadow_broken(shadow));
	left += (unsigned long)vb_shadow_inflight(shadow);
}

static void crash(void)
{
	crashes++;
	start_anew(last_base());
}

static void step(void)
{
	if (setjmp(end)) {
		crash();
		return;
	}
	stores_left = rnd(8) ? 0 : 1 + rnd(60);
	vb_shadow_step(shadow);
	stores_left = 0;
}

/* The device stops with requests in flight. Another one goes on: with a position that leaves them out,
 * or, where there is none, with the buffer. */
static void stop_and_go_on(void)
{
	int64_t base;

	vb_shadow_hold(shadow);
	while (vb_shadow_step(shadow))
		continue;
	base = vb_shadow_base(shadow);
	/* It would leave them out, and they would be done again. */
	CHECK(base < 0 || !done_but_not_given());
	changes++;
	if (base < 0 || rnd(2)) {
		start_anew((uint32_t)vb_shadow_position(shadow));
		return;
	}
	if (setjmp(end)) {
		crash();
		return;
	}
	stores_left = rnd(4) ? 0 : 1 + rnd(20);
	vb_shadow_unfetch(shadow);
	stores_left = 0;
	start_anew((uint32_t)base);
	CHECK(vb_shadow_inflight(shadow) == 0);
	CHECK(vb_shadow_position(shadow) == base);
}

int main(int argc, char **argv)
{
	unsigned long rounds;

	make_model(argc, argv);
	rounds = strtoul(argv[3], NULL, 0);
	use_inflight_buffer();
	make_shadow(is_packed() ? 0x80008000 : 0);
	while (returned < rounds) {
		unsigned what = rnd(64);

		if (what < 30 && submitted < rounds)
			submit();
		else if (what < 40)
			step();
		else if (what < 50)
			device_takes();
		else if (what < 60 && queued)
			device_completes();
		else if (what < 63)
			reap();
		else if (rnd(8) == 0)
			stop_and_go_on();
		CHECK(!vb_shadow_broken(shadow));
	}
	CHECK(returned == submitted);
	CHECK(crashes > rounds / 100 && changes > rounds / 1000 && left > crashes / 4);
	printf("%lu crashes, %lu stops, %lu requests left\n", crashes, changes, left);
	drop_shadow();
	free_model();
	return 0;
}
