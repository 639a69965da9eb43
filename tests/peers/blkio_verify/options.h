/* What blkio_verify was asked to do, and how it ends. */
#ifndef BLKIO_VERIFY_OPTIONS_H
#define BLKIO_VERIFY_OPTIONS_H

#include <stdint.h>

#define MAX_QUEUES 64

enum { WRONG = 1, USAGE = 2, IO_ERROR = 3, STALLED = 4 };
enum mode { FILL, VERIFY, WRITE_READ, RANDREAD, RANDWRITE, INFO, MODES };
extern const char *const mode_names[MODES];

struct options {
	const char *driver, *path, *state_path;
	enum mode mode;
	uint64_t size, offset, block, seed, rounds, flush_every;
	double seconds;
	int depth, queues, queue_size, per_request, write_percent, stall;
	uint32_t generation;
};
extern struct options opt;

void parse(int argc, char **argv);

/* End at once, with this exit status and a message. */
_Noreturn void die(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
