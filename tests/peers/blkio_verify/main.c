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
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "blocks.h"
#include "counts.h"
#include "options.h"
#include "workers.h"

/* When connecting began. */
static uint64_t connect_ns;

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

static void on_signal(int number)
{
	(void)number;
	atomic_store(&stopping, 1);
}

int main(int argc, char **argv)
{
	struct counts all = {0};
	struct worker *workers;
	uint64_t began, ended;

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
	ended = now_ns();
	for (int i = 0; i < opt.queues; i++)
		add_counts(&all, &workers[i].counts);
	report(&all, (ended - began) / 1e9, first_ns - connect_ns);
	blkio_destroy(&device);
	return 0;
}
