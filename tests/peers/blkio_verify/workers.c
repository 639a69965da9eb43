#include "workers.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blocks.h"
#include "options.h"

struct request {
	struct request *next; /* free list */
	bool write, flush;
	uint64_t block;
	uint32_t blocks, generation;
	uint64_t began;
	struct iovec *iov;
};

struct blkio *device;
uint64_t deadline_ns;
atomic_int stopping;
_Atomic uint64_t first_ns;

void check(int ret, const char *what)
{
	if (ret < 0)
		die(IO_ERROR, "%s: %s (%s)", what, blkio_get_error_msg(), strerror(-ret));
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t random_below(struct worker *w, uint64_t bound)
{
	w->random += GOLDEN;
	return mix(w->random) % bound;
}

/* Requests */

static struct request *take_request(struct worker *w)
{
	struct request *r = w->free_list;

	if (r)
		w->free_list = r->next;
	return r;
}

static void send_request(struct worker *w, struct request *r)
{
	uint64_t start = block_offset(r->block);

	r->began = now_ns();
	w->in_flight++;
	if (r->flush) {
		blkioq_flush(w->queue, r, 0);
		return;
	}
	for (uint32_t i = 0; i < r->blocks; i++)
		w->busy[r->block - w->first + i] = 1;
	if (!r->write)
		blkioq_readv(w->queue, start, r->iov, r->blocks, r, 0);
	else
		blkioq_writev(w->queue, start, r->iov, r->blocks, r, 0);
}

static void prepare_write(struct request *r)
{
	for (uint32_t i = 0; i < r->blocks; i++) {
		struct history *h = &histories[r->block + i];
		uint32_t generation = opt.mode == FILL ? opt.generation : h->issued + 1;

		make_block(r->iov[i].iov_base, block_offset(r->block + i), generation);
		h->issued = generation;
	}
}

static void complete(struct worker *w, const struct blkio_completion *c)
{
	struct request *r = c->user_data;
	uint64_t now = now_ns(), took = now - r->began, none = 0;

	if (atomic_compare_exchange_strong(&first_ns, &none, now))
		printf("running\n");
	if (c->ret < 0)
		die(IO_ERROR, "%s at %#" PRIx64 ": %s%s%s",
		    r->flush ? "flush" : r->write ? "write" : "read", block_offset(r->block),
		    strerror(-c->ret), c->error_msg ? ": " : "", c->error_msg ? c->error_msg : "");
	w->in_flight--;
	count_latency(&w->counts, took);
	for (uint32_t i = 0; !r->flush && i < r->blocks; i++) {
		uint64_t block = r->block + i;

		w->busy[block - w->first] = 0;
		if (!histories)
			continue;
		if (r->write)
			histories[block].completed = (uint32_t)histories[block].issued;
		else
			w->counts.verified += verify_content(block, r->iov[i].iov_base);
	}
	if (r->flush)
		w->counts.flushes++;
	else if (r->write)
		w->counts.writes++;
	else
		w->counts.reads++;
	r->next = w->free_list;
	w->free_list = r;
}

static void do_io(struct worker *w, int minimum)
{
	struct blkio_completion done[64];
	struct timespec timeout = {.tv_sec = opt.stall};
	int ret = blkioq_do_io(w->queue, done, minimum, 64, &timeout);

	if (ret == -ETIME)
		die(STALLED, "queue %d: no completion for %d s, %d in flight", w->index,
		    opt.stall, w->in_flight);
	check(ret, "do_io");
	for (int i = 0; i < ret; i++)
		complete(w, &done[i]);
}

static void drain(struct worker *w)
{
	while (w->in_flight)
		do_io(w, 1);
}

static void flush(struct worker *w)
{
	struct request *r = take_request(w);

	r->flush = true;
	r->write = false;
	send_request(w, r);
	drain(w);
}

/* What a worker does */

static void sequential(struct worker *w, bool write)
{
	uint64_t end = w->first + w->count, stride = opt.per_request;

	for (uint64_t block = w->first; block < end;) {
		struct request *r = take_request(w);
		uint64_t left = end - block;

		if (!r) {
			do_io(w, 1);
			continue;
		}
		r->flush = false;
		r->write = write;
		r->block = block;
		r->blocks = left < stride ? left : stride;
		if (write)
			prepare_write(r);
		send_request(w, r);
		block += r->blocks;
	}
	drain(w);
}

static bool pick_blocks(struct worker *w, struct request *r)
{
	r->blocks = 1 + random_below(w, opt.per_request);
	if (r->blocks > w->count)
		r->blocks = w->count;
	r->block = w->first + random_below(w, w->count - r->blocks + 1);
	for (uint32_t i = 0; i < r->blocks; i++)
		if (w->busy[r->block - w->first + i])
			return false;
	return true;
}

static bool choose(struct worker *w, struct request *r)
{
	r->flush = opt.flush_every && ++w->since_flush >= opt.flush_every;
	if (r->flush) {
		w->since_flush = 0;
		r->write = false;
		return true;
	}
	if (!pick_blocks(w, r))
		return false;
	if (opt.mode != WRITE_READ) {
		r->write = opt.mode == RANDWRITE;
		return true;
	}
	r->write = random_below(w, 100) < (uint64_t)opt.write_percent;
	for (uint32_t i = 0; i < r->blocks && !r->write; i++)
		r->write = !histories[r->block + i].issued; /* nothing to compare yet */
	if (r->write)
		prepare_write(r);
	return true;
}

static bool enough(struct worker *w)
{
	uint64_t done = w->counts.reads + w->counts.writes + w->in_flight;

	if (atomic_load(&stopping) || (opt.rounds && done >= opt.rounds * w->count))
		return true;
	return deadline_ns && now_ns() >= deadline_ns;
}

static void at_random(struct worker *w)
{
	while (!enough(w)) {
		struct request *r = take_request(w);
		int tries = 0;

		while (r && tries < 16 && !choose(w, r))
			tries++;
		if (r && tries < 16) {
			send_request(w, r);
			if (w->free_list)
				continue;
		} else if (r) { /* only busy blocks were hit: wait for some */
			r->next = w->free_list;
			w->free_list = r;
		}
		do_io(w, 1);
	}
	drain(w);
}

void *work(void *worker)
{
	struct worker *w = worker;

	switch (opt.mode) {
	case FILL:
		sequential(w, true);
		flush(w);
		break;
	case VERIFY:
		sequential(w, false);
		break;
	case WRITE_READ:
		at_random(w);
		flush(w);
		sequential(w, false);
		break;
	default:
		at_random(w);
	}
	return NULL;
}

void open_worker(struct worker *w, int index)
{
	uint64_t share = total_blocks / opt.queues;
	uint64_t stride = opt.block * opt.per_request;
	struct blkio_mem_region region;
	struct iovec *iov = calloc((size_t)opt.depth * opt.per_request, sizeof(*iov));

	w->index = index;
	w->first = share * index;
	w->count = index == opt.queues - 1 ? total_blocks - w->first : share;
	w->random = mix(opt.seed * MAX_QUEUES + index);
	w->queue = blkio_get_queue(device, index);
	w->busy = calloc(w->count, 1);
	w->requests = calloc(opt.depth, sizeof(*w->requests));
	if (opt.mode == RANDREAD || opt.mode == RANDWRITE)
		keep_samples(&w->counts);
	check(blkio_alloc_mem_region(device, &region, stride * opt.depth), "memory");
	check(blkio_map_mem_region(device, &region), "map memory");
	memset(region.addr, 0xa5, stride * opt.depth);
	for (int i = 0; i < opt.depth * opt.per_request; i++)
		iov[i] = (struct iovec){(char *)region.addr + i * opt.block, opt.block};
	for (int i = 0; i < opt.depth; i++) {
		w->requests[i].iov = iov + i * opt.per_request;
		w->requests[i].next = w->free_list;
		w->free_list = &w->requests[i];
	}
}
