/* How many requests were done, and how long they took. */
#ifndef BLKIO_VERIFY_COUNTS_H
#define BLKIO_VERIFY_COUNTS_H

#include <stdbool.h>
#include <stdint.h>

struct counts {
	uint64_t reads, writes, flushes, verified, sum_ns, max_ns;
	uint32_t *samples, sampled; /* what single requests took, where that is kept */
};

void keep_samples(struct counts *counts);
void count_latency(struct counts *counts, uint64_t took_ns);
void add_counts(struct counts *all, const struct counts *one);
/* The line of JSON. */
void report(const struct counts *all, double seconds, uint64_t first_ns);

#endif
