/* Shadow vrings with their threads, between a driver and a device in threads of their own, for the
 * thread sanitizer. Somebody changes the log, memory and eventfds meanwhile; vrings end and others
 * go on.
 *
 * usage: threads_test threads SEED ROUNDS packed|split SIZE FEATURES
 */
#define _GNU_SOURCE
#include "ring_model.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

static int device_going, spare_call;

/* The thread sanitizer of GCC 12 does not know it, and would not see that the lock is held. */
int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until)
{
	struct timespec now, there;

	clock_gettime(clock, &now);
	clock_gettime(CLOCK_REALTIME, &there);
	there.tv_sec += until->tv_sec - now.tv_sec;
	there.tv_nsec += until->tv_nsec - now.tv_nsec;
	there.tv_sec += there.tv_nsec < 0 ? -1 : there.tv_nsec >= 1000000000;
	there.tv_nsec = (there.tv_nsec + 1000000000) % 1000000000;
	return pthread_mutex_timedlock(mutex, &there);
}

static void wait_for(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
	uint64_t count;

	/* The models do not say when they want to be told: not every call comes. */
	if (poll(&poll_fd, 1, 1) == 1)
		(void)!read(fd, &count, sizeof(count));
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	(void)!write(fd, &one, sizeof(one));
}

static void *device(void *argument)
{
	state = *(unsigned long long *)argument;
	while (__atomic_load_n(&device_going, __ATOMIC_ACQUIRE)) {
		unsigned most = rnd(20);

		device_takes();
		for (unsigned i = 0; queued && i < most; i++)
			device_completes();
		signal_fd(setup.device_call);
		wait_for(setup.device_kick);
	}
	return NULL;
}

static pthread_t start(unsigned long long *seed)
{
	pthread_t thread;

	*seed = rnd(1u << 31);
	__atomic_store_n(&device_going, 1, __ATOMIC_RELEASE);
	CHECK(vb_shadow_start(shadow) == 0);
	CHECK(pthread_create(&thread, NULL, device, seed) == 0);
	return thread;
}

static void stop(pthread_t thread)
{
	vb_shadow_hold(shadow);
	__atomic_store_n(&device_going, 0, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
	CHECK(vb_shadow_stop(shadow) == 0);
}

/* The device, or the whole process, is gone; or both just stop. */
static void change(void)
{
	int64_t base = vb_shadow_base(shadow);
	unsigned what = rnd(3);

	if (what == 0) {
		setup.iova += 1 << 20;
		vb_shadow_renew(shadow, setup.iova, -1);
		new_device();
		return;
	}
	if (what == 1 && base >= 0)
		vb_shadow_unfetch(shadow);
	else
		base = vb_shadow_position(shadow);
	drop_shadow();
	forget_what_was_not_given();
	make_shadow((uint32_t)base);
}

static void meddle(void)
{
	struct vb_region same = {GUEST, MEMORY, (uintptr_t)memory};
	struct vb_shadow_stats stats;
	int call;

	vb_shadow_stats(shadow, &stats);
	vb_shadow_set_log(shadow, log_bits, sizeof(log_bits));
	CHECK(vb_shadow_set_memory(shadow, &same, 1) == 0);
	call = setup.call;
	setup.call = spare_call;
	spare_call = call;
	vb_shadow_set_call(shadow, setup.call);
	signal_fd(setup.call);
}

static void work(unsigned long rounds)
{
	while (returned < rounds && rnd(400)) {
		unsigned most = 1 + rnd(8);

		for (unsigned i = 0; i < most && submitted < rounds; i++)
			submit();
		signal_fd(setup.kick);
		if (rnd(3) == 0)
			wait_for(setup.call);
		reap();
		if (rnd(50) == 0)
			meddle();
		CHECK(!vb_shadow_broken(shadow));
	}
}

int main(int argc, char **argv)
{
	unsigned long long seed;
	unsigned long rounds;

	make_model(argc, argv);
	rounds = strtoul(argv[3], NULL, 0);
	setup.kick = eventfd(0, EFD_NONBLOCK);
	setup.call = eventfd(0, EFD_NONBLOCK);
	spare_call = eventfd(0, EFD_NONBLOCK);
	setup.device_kick = eventfd(0, EFD_NONBLOCK);
	setup.device_call = eventfd(0, EFD_NONBLOCK);
	use_inflight_buffer();
	make_shadow(is_packed() ? 0x80008000 : 0);
	while (returned < rounds) {
		pthread_t thread = start(&seed);

		work(rounds);
		stop(thread);
		reap();
		change();
	}
	CHECK(returned == submitted);
	drop_shadow();
	free_model();
	return 0;
}
