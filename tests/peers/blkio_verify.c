/*
 * Verified block I/O through libblkio.
 *
 *   blkio_verify DRIVER PATH MODE [options]
 *
 * DRIVER  virtio-blk-vhost-user, virtio-blk-vhost-vdpa, any other of libblkio's, or
 *         "file": PATH is a raw image that is read directly, for verify only
 * MODE    fill        write every block at --generation
 *         verify      read every block and compare
 *         write-read  random writes and verified reads, then verify all that was written
 *         randread, randwrite   measure; contents are neither made nor looked at
 *         info        print capacity and limits
 *
 * Every block carries a magic number, its offset, the seed and a generation, and after them
 * pseudo-random words derived from these three. A block is right when it is at its offset, whole,
 * and of an expected generation: with --state FILE the completed and the issued generation of
 * each block are kept there, and outlive this process being killed; a block in flight then may be
 * of either or of any between.
 *
 * Stdout gets "running" when the first request is complete, and at the end one line of
 * JSON. SIGTERM and SIGINT end write-read and the measurements early and in good order.
 * Exit status: 0 all as it should be, 1 wrong content, 2 usage, 3 an I/O or libblkio error,
 * 4 no completion for --stall seconds.
 */
#define _GNU_SOURCE
#include <blkio.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAGIC UINT64_C(0x5642424c4f434b31) /* "VBBLOCK1" */
#define GOLDEN UINT64_C(0x9e3779b97f4a7c15)
#define HEADER_WORDS 4
#define MAX_QUEUES 64
#define MAX_SAMPLES (1u << 24)

enum { WRONG = 1, USAGE = 2, IO_ERROR = 3, STALLED = 4 };
enum mode { FILL, VERIFY, WRITE_READ, RANDREAD, RANDWRITE, INFO, MODES };
static const char *const mode_names[MODES] = {
	"fill", "verify", "write-read", "randread", "randwrite", "info",
};

/* One block's history: `completed` is on the device for certain, `issued` may be. 0: never. */
struct history {
	_Atomic uint32_t completed, issued;
};

struct request {
	struct request *next; /* free list */
	bool write, flush;
	uint64_t block;
	uint32_t blocks, generation;
	uint64_t began;
	struct iovec *iov;
};

struct worker {
	pthread_t thread;
	int index, in_flight;
	struct blkioq *queue;
	uint64_t first, count; /* this worker's blocks */
	uint64_t random, since_flush;
	struct request *requests, *free_list;
	uint8_t *busy; /* one byte a block */
	uint64_t reads, writes, flushes, verified, sum_ns, max_ns;
	uint32_t *samples, sampled;
};

static struct {
	const char *driver, *path, *state_path;
	enum mode mode;
	uint64_t size, offset, block, seed, rounds, flush_every;
	double seconds;
	int depth, queues, queue_size, per_request, write_percent, stall;
	uint32_t generation;
} opt = {
	.block = 4096, .seed = 1, .depth = 16, .queues = 1, .per_request = 1,
	.write_percent = 50, .stall = 60, .generation = 1,
};

static struct blkio *device;
static struct history *histories;
static uint64_t total_blocks, deadline_ns;
static atomic_int stopping;

static void die(int status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "blkio_verify: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	_exit(status);
}

static void check(int ret, const char *what)
{
	if (ret < 0)
		die(IO_ERROR, "%s: %s (%s)", what, blkio_get_error_msg(), strerror(-ret));
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

static uint64_t random_below(struct worker *w, uint64_t bound)
{
	w->random += GOLDEN;
	return mix(w->random) % bound;
}

/* Contents */

static uint64_t content_base(uint64_t offset, uint32_t generation)
{
	return mix(offset + GOLDEN) ^ mix(opt.seed * GOLDEN + generation);
}

static void make_block(uint64_t *words, uint64_t offset, uint32_t generation)
{
	uint64_t base = content_base(offset, generation);

	words[0] = MAGIC;
	words[1] = offset;
	words[2] = opt.seed;
	words[3] = generation;
	for (uint64_t i = HEADER_WORDS; i < opt.block / 8; i++)
		words[i] = mix(base + i * GOLDEN);
}

static void check_block(const uint64_t *words, uint64_t offset, uint32_t low, uint32_t high)
{
	uint64_t base;

	if (words[0] != MAGIC || words[1] != offset || words[2] != opt.seed)
		die(WRONG, "block at %#" PRIx64 " has header %#" PRIx64 " offset %#" PRIx64
		    " seed %" PRIu64 " generation %" PRIu64 ", expected seed %" PRIu64
		    " generation %u..%u", offset, words[0], words[1], words[2], words[3],
		    opt.seed, low, high);
	if (words[3] < low || words[3] > high)
		die(WRONG, "block at %#" PRIx64 " is of generation %" PRIu64 ", expected %u..%u",
		    offset, words[3], low, high);
	base = content_base(offset, words[3]);
	for (uint64_t i = HEADER_WORDS; i < opt.block / 8; i++)
		if (words[i] != mix(base + i * GOLDEN))
			die(WRONG, "block at %#" PRIx64 " (generation %" PRIu64
			    ") is damaged from byte %" PRIu64 " on", offset, words[3], i * 8);
}

static uint64_t block_offset(uint64_t block)
{
	return opt.offset + block * opt.block;
}

static bool verify_content(uint64_t block, const void *data)
{
	uint32_t low = histories[block].completed, high = histories[block].issued;

	if (!high)
		return false; /* never written: anything may be there */
	if (!low) { /* was in flight at its first write: old content is possible as well */
		const uint64_t *words = data;

		if (words[0] != MAGIC || words[1] != block_offset(block) || words[2] != opt.seed)
			return false;
		low = 1;
	}
	check_block(data, block_offset(block), low, high);
	return true;
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

/* When connecting began, and when the first request was complete. */
static uint64_t connect_ns;
static _Atomic uint64_t first_ns;

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
	w->sum_ns += took;
	if (took > w->max_ns)
		w->max_ns = took;
	if (w->samples && w->sampled < MAX_SAMPLES)
		w->samples[w->sampled++] = took > UINT32_MAX ? UINT32_MAX : took;
	for (uint32_t i = 0; !r->flush && i < r->blocks; i++) {
		uint64_t block = r->block + i;

		w->busy[block - w->first] = 0;
		if (!histories)
			continue;
		if (r->write)
			histories[block].completed = (uint32_t)histories[block].issued;
		else
			w->verified += verify_content(block, r->iov[i].iov_base);
	}
	if (r->flush)
		w->flushes++;
	else if (r->write)
		w->writes++;
	else
		w->reads++;
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
	uint64_t done = w->reads + w->writes + w->in_flight;

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

static void *work(void *argument)
{
	struct worker *w = argument;

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

/* Set-up */

static void open_device(void)
{
	uint64_t capacity;
	bool read_only = opt.mode == VERIFY || opt.mode == RANDREAD || opt.mode == INFO;

	check(blkio_create(opt.driver, &device), "create");
	check(blkio_set_str(device, "path", opt.path), "path");
	/* A failure is fine: not every driver and device can be read-only. */
	if (read_only)
		blkio_set_bool(device, "read-only", true);
	connect_ns = now_ns();
	check(blkio_connect(device), "connect");
	check(blkio_set_int(device, "num-queues", opt.queues), "num-queues");
	if (opt.queue_size)
		check(blkio_set_int(device, "queue-size", opt.queue_size), "queue-size");
	check(blkio_start(device), "start");
	check(blkio_get_uint64(device, "capacity", &capacity), "capacity");
	if (!opt.size)
		opt.size = capacity - opt.offset;
	if (opt.offset + opt.size > capacity)
		die(USAGE, "the device has %" PRIu64 " bytes", capacity);
}

static void open_state(void)
{
	size_t length = total_blocks * sizeof(*histories);
	int fd = -1, flags = MAP_SHARED;
	bool fresh = true;

	if (opt.state_path) {
		struct stat status;

		fd = open(opt.state_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		if (fd < 0 || fstat(fd, &status))
			die(USAGE, "%s: %s", opt.state_path, strerror(errno));
		fresh = !status.st_size;
		if (!fresh && (size_t)status.st_size != length)
			die(USAGE, "%s is of another size of device", opt.state_path);
		if (ftruncate(fd, length))
			die(USAGE, "%s: %s", opt.state_path, strerror(errno));
	} else {
		flags = MAP_PRIVATE | MAP_ANONYMOUS;
	}
	histories = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (histories == MAP_FAILED)
		die(USAGE, "state: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
	if (opt.mode == VERIFY && fresh)
		for (uint64_t i = 0; i < total_blocks; i++)
			histories[i].completed = histories[i].issued = opt.generation;
}

static void open_worker(struct worker *w, int index)
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
		w->samples = malloc(sizeof(*w->samples) * MAX_SAMPLES);
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

static void verify_file(void)
{
	int fd = open(opt.path, O_RDONLY | O_CLOEXEC);
	struct stat status;
	uint64_t *words = malloc(opt.block), verified = 0;

	if (opt.mode != VERIFY || fd < 0 || fstat(fd, &status))
		die(USAGE, "%s: can't be verified: %s", opt.path, strerror(errno));
	if (!opt.size)
		opt.size = status.st_size - opt.offset;
	total_blocks = opt.size / opt.block;
	open_state();
	for (uint64_t i = 0; i < total_blocks; i++) {
		if (pread(fd, words, opt.block, block_offset(i)) != (ssize_t)opt.block)
			die(IO_ERROR, "%s is too short or can't be read", opt.path);
		verified += verify_content(i, words);
	}
	printf("{\"mode\": \"verify\", \"verified\": %" PRIu64 "}\n", verified);
}

static void print_info(void)
{
	static const char *const names[] = {"max-queues", "queue-size", "max-mem-regions",
					    "max-segments", "optimal-io-size"};

	printf("{\"capacity\": %" PRIu64, opt.size);
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
		uint64_t wide;
		int value;

		if (!blkio_get_int(device, names[i], &value))
			printf(", \"%s\": %d", names[i], value);
		else if (!blkio_get_uint64(device, names[i], &wide))
			printf(", \"%s\": %" PRIu64, names[i], wide);
	}
	printf("}\n");
}

/* The end */

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void print_percentiles(struct worker *workers)
{
	uint32_t *all, count = 0;

	for (int i = 0; i < opt.queues; i++)
		count += workers[i].sampled;
	all = malloc(sizeof(*all) * (count ? count : 1));
	count = 0;
	for (int i = 0; i < opt.queues; i++) {
		memcpy(all + count, workers[i].samples, sizeof(*all) * workers[i].sampled);
		count += workers[i].sampled;
	}
	qsort(all, count, sizeof(*all), by_value);
	printf(", \"p50_ns\": %u, \"p99_ns\": %u, \"p999_ns\": %u", count ? all[count / 2] : 0,
	       count ? all[(uint64_t)count * 99 / 100] : 0,
	       count ? all[(uint64_t)count * 999 / 1000] : 0);
	free(all);
}

static void report(struct worker *workers, double seconds)
{
	uint64_t reads = 0, writes = 0, flushes = 0, verified = 0, sum = 0, max = 0, requests;

	for (int i = 0; i < opt.queues; i++) {
		struct worker *w = &workers[i];

		reads += w->reads;
		writes += w->writes;
		flushes += w->flushes;
		verified += w->verified;
		sum += w->sum_ns;
		if (w->max_ns > max)
			max = w->max_ns;
	}
	requests = reads + writes + flushes;
	printf("{\"mode\": \"%s\", \"depth\": %d, \"queues\": %d, \"reads\": %" PRIu64
	       ", \"writes\": %" PRIu64 ", \"flushes\": %" PRIu64 ", \"verified\": %" PRIu64
	       ", \"seconds\": %.3f, \"iops\": %.0f, \"mean_ns\": %.0f, \"max_ns\": %" PRIu64
	       ", \"first_ns\": %" PRIu64,
	       mode_names[opt.mode], opt.depth, opt.queues, reads, writes, flushes, verified,
	       seconds, requests / seconds, requests ? (double)sum / requests : 0, max,
	       first_ns - connect_ns);
	if (workers[0].samples)
		print_percentiles(workers);
	printf("}\n");
}

static void on_signal(int number)
{
	(void)number;
	atomic_store(&stopping, 1);
}

static void usage(void)
{
	die(USAGE, "usage: blkio_verify DRIVER PATH MODE [--size N] [--offset N] [--block N] "
	    "[--seed N] [--generation N] [--state FILE] [--depth N] [--queues N] "
	    "[--queue-size N] [--per-request N] [--write-percent N] [--flush-every N] "
	    "[--rounds N] [--seconds N] [--stall N]");
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t value = strtoull(text, &end, 0);

	if (end == text || *end)
		die(USAGE, "%s is no number", text);
	return value;
}

static void set_option(char letter, const char *value)
{
	switch (letter) {
	case 's': opt.size = number(value); break;
	case 'o': opt.offset = number(value); break;
	case 'b': opt.block = number(value); break;
	case 'e': opt.seed = number(value); break;
	case 'g': opt.generation = number(value); break;
	case 'f': opt.state_path = value; break;
	case 'd': opt.depth = number(value); break;
	case 'q': opt.queues = number(value); break;
	case 'z': opt.queue_size = number(value); break;
	case 'p': opt.per_request = number(value); break;
	case 'w': opt.write_percent = number(value); break;
	case 'l': opt.flush_every = number(value); break;
	case 'r': opt.rounds = number(value); break;
	case 't': opt.seconds = atof(value); break;
	case 'x': opt.stall = number(value); break;
	default: usage();
	}
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{"size", 1, 0, 's'}, {"offset", 1, 0, 'o'}, {"block", 1, 0, 'b'},
		{"seed", 1, 0, 'e'}, {"generation", 1, 0, 'g'}, {"state", 1, 0, 'f'},
		{"depth", 1, 0, 'd'}, {"queues", 1, 0, 'q'}, {"queue-size", 1, 0, 'z'},
		{"per-request", 1, 0, 'p'}, {"write-percent", 1, 0, 'w'},
		{"flush-every", 1, 0, 'l'}, {"rounds", 1, 0, 'r'}, {"seconds", 1, 0, 't'},
		{"stall", 1, 0, 'x'}, {0},
	};
	int letter, mode;

	while ((letter = getopt_long(argc, argv, "", options, NULL)) >= 0)
		set_option(letter, optarg);
	if (argc - optind != 3)
		usage();
	opt.driver = argv[optind];
	opt.path = argv[optind + 1];
	for (mode = 0; mode < MODES && strcmp(mode_names[mode], argv[optind + 2]);)
		mode++;
	if (mode == MODES || opt.block % 512 || !opt.block || opt.depth < 1 ||
	    opt.per_request < 1 || opt.queues < 1 || opt.queues > MAX_QUEUES)
		usage();
	opt.mode = mode;
	if (opt.mode > VERIFY && !opt.rounds && !opt.seconds)
		opt.rounds = 1;
}

int main(int argc, char **argv)
{
	struct worker *workers;
	uint64_t began;

	setvbuf(stdout, NULL, _IOLBF, 0);
	parse(argc, argv);
	if (!strcmp(opt.driver, "file")) {
		verify_file();
		return 0;
	}
	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	open_device();
	if (opt.mode == INFO) {
		print_info();
		blkio_destroy(&device);
		return 0;
	}
	total_blocks = opt.size / opt.block;
	if (total_blocks < (uint64_t)opt.queues)
		die(USAGE, "%" PRIu64 " bytes are too few", opt.size);
	if (opt.mode <= WRITE_READ)
		open_state();
	workers = calloc(opt.queues, sizeof(*workers));
	for (int i = 0; i < opt.queues; i++)
		open_worker(&workers[i], i);
	began = now_ns();
	if (opt.seconds > 0)
		deadline_ns = began + (uint64_t)(opt.seconds * 1e9);
	for (int i = 1; i < opt.queues; i++)
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			die(IO_ERROR, "no thread");
	work(&workers[0]);
	for (int i = 1; i < opt.queues; i++)
		pthread_join(workers[i].thread, NULL);
	report(workers, (now_ns() - began) / 1e9);
	blkio_destroy(&device);
	return 0;
}
