/* What the parts of a shadow vring share. */
#ifndef VHOST_BRIDGE_SHADOW_RING_H
#define VHOST_BRIDGE_SHADOW_RING_H

#include "device_ring.h"
#include "eventfd.h"
#include "guest_ring.h"
#include "inflight.h"
#include "shadow.h"

#include <pthread.h>
#include <semaphore.h>

struct vb_shadow {
	struct vb_shadow_setup setup;
	struct guest_memory memory;
	struct guest_ring guest;
	struct device_ring device;
	struct inflight_buffer record;
	struct request request;
	struct vb_shadow_stats stats;
	const char *broken;
	bool in_order;
	bool held; /* nothing more is fetched from the guest */
	bool full; /* a request waits until the device completes others */
	bool running;
	bool waits; /* the thread is there, and was not started yet */
	bool stop;
	int wake; /* eventfd that makes the thread look again */
	int wanted; /* somebody waits for the lock */
	sem_t go;    /* posted for the thread to begin */
	sem_t begun; /* posted after the thread's first round */
	pthread_t thread;
	pthread_mutex_t lock;
};

bool shadow_round(struct vb_shadow *shadow);
void break_vring(struct vb_shadow *shadow, const char *why);
/* Do something that touches guest memory, which may be gone: the vring is broken then. */
bool guarded(struct vb_shadow *shadow, bool (*work)(struct vb_shadow *shadow));
bool thread_init(struct vb_shadow *shadow);
void thread_free(struct vb_shadow *shadow);
/* The thread leaves the lock to whoever asks for it in this way. */
void shadow_lock(struct vb_shadow *shadow);
void shadow_unlock(struct vb_shadow *shadow);

#endif
