#include "options.h"

#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const mode_names[MODES] = {
	"fill", "verify", "write-read", "randread", "randwrite", "info",
};

struct options opt = {
	.block = 4096, .seed = 1, .depth = 16, .queues = 1, .per_request = 1,
	.write_percent = 50, .stall = 60, .generation = 1,
};

void die(int status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "blkio_verify: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	_exit(status);
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

void parse(int argc, char **argv)
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
