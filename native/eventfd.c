/* Eventfds that somebody else has too. A write to one whose counter is full waits until it is
 * read, and whether it is full can change after one looked; O_NONBLOCK would be the peer's too,
 * which may count on reads that wait. So a write that waits is interrupted. */
#define _GNU_SOURCE
#include "eventfd.h"
#include "vb_native.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define INTERRUPT (SIGRTMAX - 1)
enum { PATIENCE = 1000 * 1000 }; /* nanoseconds */

static void nothing(int number)
{
	(void)number;
}

/* Without SA_RESTART: system calls end with EINTR. */
static void install_handler(void)
{
	struct sigaction action = {.sa_handler = nothing};

	sigaction(INTERRUPT, &action, NULL);
}

void make_interruptible(sigset_t *blocked)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install_handler);
	sigdelset(blocked, INTERRUPT);
}

void interrupt_thread(pthread_t thread)
{
	pthread_kill(thread, INTERRUPT);
}

/* A counter that is full says all that there is to say. */
void signal_eventfd(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLOUT};
	uint64_t one = 1;

	if (fd >= 0 && poll(&poll_fd, 1, 0) == 1 && poll_fd.revents & POLLOUT)
		(void)!write(fd, &one, sizeof(one));
}

/* The timer fires again and again: the first time may be just before the write. */
int64_t vb_signal_eventfd(int fd)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = INTERRUPT};
	struct itimerspec when = {{0, PATIENCE}, {0, PATIENCE}};
	sigset_t interrupt, before;
	timer_t timer;

	sigemptyset(&interrupt);
	make_interruptible(&interrupt);
	sigaddset(&interrupt, INTERRUPT);
	event.sigev_notify_thread_id = gettid();
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) < 0)
		return -1;
	pthread_sigmask(SIG_UNBLOCK, &interrupt, &before);
	timer_settime(timer, 0, &when, NULL);
	signal_eventfd(fd);
	timer_delete(timer);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return 0;
}
