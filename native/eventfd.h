/* Eventfds that somebody else has too, who may be hostile. */
#ifndef VHOST_BRIDGE_EVENTFD_H
#define VHOST_BRIDGE_EVENTFD_H

#include <pthread.h>
#include <signal.h>

/* Add 1. It may wait if the other side fills the counter just then, until interrupt_thread. */
void signal_eventfd(int fd);
/* Take the signal of interrupt_thread out of those that a thread blocks. */
void make_interruptible(sigset_t *blocked);
/* End a system call that a thread waits in; it may not have begun yet. */
void interrupt_thread(pthread_t thread);

#endif
