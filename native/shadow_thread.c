/* The thread of a shadow vring: when it works, when it sleeps, and that it survives guest memory
 * that goes away. */
#define _GNU_SOURCE
#include "bus_error.h"
#include "eventfd.h"
#include "shadow_ring.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE = 5 * 1000 * 1000, SECOND = 1000 * 1000 * 1000 }; /* nanoseconds */

/* The other side may read its eventfd too, and must not make us wait then. */
static void drain_eventfd(int fd)
{
	uint64_t count;
	struct iovec vector = {.iov_base = &count, .iov_len = sizeof(count)};

	(void)!preadv2(fd, &vector, 1, -1, RWF_NOWAIT);
}

struct guarded_work {
	struct vb_shadow *shadow;
	bool (*work)(struct vb_shadow *shadow);
	bool more;
};

static void do_guarded(void *argument)
{
	struct guarded_work *guarded = argument;

	guarded->more = guarded->work(guarded->shadow);
}

bool guarded(struct vb_shadow *shadow, bool (*work)(struct vb_shadow *shadow))
{
	struct guarded_work guarded = {.shadow = shadow, .work = work};

	if (survives(do_guarded, &guarded))
		return guarded.more;
	break_vring(shadow, "memory that the front-end shares is gone");
	return false;
}

bool thread_init(struct vb_shadow *shadow)
{
	catch_bus_errors();
	sem_init(&shadow->go, 0, 0);
	sem_init(&shadow->begun, 0, 0);
	shadow->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return shadow->wake >= 0;
}

void thread_free(struct vb_shadow *shadow)
{
	if (shadow->wake >= 0)
		close(shadow->wake);
	sem_destroy(&shadow->begun);
	sem_destroy(&shadow->go);
}

static struct timespec patience(void)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += PATIENCE;
	until.tv_sec += until.tv_nsec / SECOND;
	until.tv_nsec %= SECOND;
	return until;
}

/* A peer may make the thread wait in a write to its eventfd. */
void shadow_lock(struct vb_shadow *shadow)
{
	struct timespec until;
	int result;

	__atomic_add_fetch(&shadow->wanted, 1, __ATOMIC_SEQ_CST);
	do {
		until = patience();
		result = pthread_mutex_clocklock(&shadow->lock, CLOCK_MONOTONIC, &until);
		if (result == ETIMEDOUT && shadow->running)
			interrupt_thread(shadow->thread);
	} while (result == ETIMEDOUT);
	__atomic_sub_fetch(&shadow->wanted, 1, __ATOMIC_SEQ_CST);
}

void shadow_unlock(struct vb_shadow *shadow)
{
	pthread_mutex_unlock(&shadow->lock);
	signal_eventfd(shadow->wake);
}

enum { WAKE, DEVICE_CALL, KICK, SOURCES };

static void sleep_until_called(struct pollfd fds[SOURCES])
{
	if (poll(fds, SOURCES, -1) < 0)
		for (int i = 0; i < SOURCES; i++)
			fds[i].revents = 0;
}

/* With the lock: an eventfd that was replaced meanwhile may be closed. */
static void drain_called(struct vb_shadow *shadow, struct pollfd fds[SOURCES])
{
	if (fds[WAKE].revents & POLLIN)
		drain_eventfd(shadow->wake);
	if (fds[DEVICE_CALL].revents & POLLIN)
		drain_eventfd(shadow->setup.device_call);
	if (fds[KICK].revents & POLLIN && fds[KICK].fd == shadow->setup.kick)
		drain_eventfd(shadow->setup.kick);
	for (int i = 0; i < SOURCES; i++)
		fds[i] = (struct pollfd){.fd = -1, .events = POLLIN};
}

/* With the lock: one round, and what to wait for then. False: the end. */
static bool work(struct vb_shadow *shadow, struct pollfd fds[SOURCES], bool *more)
{
	drain_called(shadow, fds);
	if (shadow->stop)
		return false;
	*more = guarded(shadow, shadow_round);
	fds[WAKE].fd = shadow->wake;
	if (!shadow->broken) {
		fds[DEVICE_CALL].fd = shadow->setup.device_call;
		fds[KICK].fd = shadow->held || shadow->full ? -1 : shadow->setup.kick;
	}
	return true;
}

static bool work_locked(struct vb_shadow *shadow, struct pollfd fds[SOURCES], bool *more)
{
	bool going;

	while (__atomic_load_n(&shadow->wanted, __ATOMIC_SEQ_CST))
		sched_yield();
	pthread_mutex_lock(&shadow->lock);
	going = work(shadow, fds, more);
	pthread_mutex_unlock(&shadow->lock);
	return going;
}

static void *run(void *argument)
{
	struct vb_shadow *shadow = argument;
	struct pollfd fds[SOURCES] = {{.fd = -1}, {.fd = -1}, {.fd = -1}};
	bool more = false, going;

	while (sem_wait(&shadow->go) < 0)
		continue;
	if (shadow->stop)
		return NULL;
	going = work_locked(shadow, fds, &more);
	sem_post(&shadow->begun);
	while (going) {
		if (!more)
			sleep_until_called(fds);
		going = work_locked(shadow, fds, &more);
	}
	return NULL;
}

static void wait_begun(struct vb_shadow *shadow)
{
	struct timespec until = patience();

	while (sem_clockwait(&shadow->begun, CLOCK_MONOTONIC, &until) < 0) {
		if (errno == ETIMEDOUT)
			interrupt_thread(shadow->thread);
		until = patience();
	}
}

int64_t vb_shadow_prepare(struct vb_shadow *shadow)
{
	sigset_t all, before;
	int result;

	if (shadow->running)
		return 0;
	/* Python's signal handlers run in its own threads. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	make_interruptible(&all);
	shadow->held = shadow->stop = false;
	shadow->running = shadow->waits = true;
	pthread_sigmask(SIG_SETMASK, &all, &before);
	result = pthread_create(&shadow->thread, NULL, run, shadow);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (result)
		shadow->running = shadow->waits = false;
	return -result;
}

static void let_go(struct vb_shadow *shadow)
{
	if (shadow->waits)
		sem_post(&shadow->go);
	shadow->waits = false;
}

int64_t vb_shadow_start(struct vb_shadow *shadow)
{
	int64_t result = vb_shadow_prepare(shadow);

	if (result || !shadow->waits)
		return result;
	let_go(shadow);
	wait_begun(shadow);
	return 0;
}

void vb_shadow_hold(struct vb_shadow *shadow)
{
	shadow_lock(shadow);
	shadow->held = true;
	shadow_unlock(shadow);
}

/* Whoever has the ring next may not look at this: vdpa_sim never writes its flags. */
static bool ask_for_kicks(struct vb_shadow *shadow)
{
	guest_ring_want_kicks(&shadow->guest);
	return false;
}

int64_t vb_shadow_stop(struct vb_shadow *shadow)
{
	if (!shadow->running)
		return 0;
	shadow_lock(shadow);
	shadow->held = true;
	shadow->stop = true;
	shadow_unlock(shadow);
	let_go(shadow);
	pthread_join(shadow->thread, NULL);
	shadow->running = false;
	while (guarded(shadow, shadow_round))
		continue;
	if (!shadow->broken)
		guarded(shadow, ask_for_kicks);
	return 0;
}

int vb_shadow_step(struct vb_shadow *shadow)
{
	return guarded(shadow, shadow_round);
}

void vb_shadow_set_kick(struct vb_shadow *shadow, int fd)
{
	shadow_lock(shadow);
	shadow->setup.kick = fd;
	shadow_unlock(shadow);
}

void vb_shadow_set_call(struct vb_shadow *shadow, int fd)
{
	shadow_lock(shadow);
	shadow->setup.call = fd;
	shadow_unlock(shadow);
}
