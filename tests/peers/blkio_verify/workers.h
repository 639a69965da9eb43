/* Threads that send requests, each to blocks of its own. */
#ifndef BLKIO_VERIFY_WORKERS_H
#define BLKIO_VERIFY_WORKERS_H

#include <blkio.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "counts.h"

struct request;

struct worker {
	pthread_t thread;
	int index, in_flight;
	struct blkioq *queue;
	uint64_t first, count; /* this worker's blocks */
	uint64_t random, since_flush;
	struct request *requests, *free_list;
	uint8_t *busy; /* one byte a block */
	struct counts counts;
};

extern struct blkio *device;
/* When they end: at this time, if it is not 0, or soon once this is set. */
extern uint64_t deadline_ns;
extern atomic_int stopping;
/* When the first request was complete. */
extern _Atomic uint64_t first_ns;

void open_worker(struct worker *w, int index);
/* What a thread does with its worker. */
void *work(void *worker);

uint64_t now_ns(void);
/* Ends the process at an error of libblkio's. */
void check(int ret, const char *what);

#endif
