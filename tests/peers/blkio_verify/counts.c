#include "counts.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "options.h"

#define MAX_SAMPLES (1u << 24)

void keep_samples(struct counts *counts)
{
	counts->samples = malloc(sizeof(*counts->samples) * MAX_SAMPLES);
}

void count_latency(struct counts *counts, uint64_t took_ns)
{
	counts->sum_ns += took_ns;
	if (took_ns > counts->max_ns)
		counts->max_ns = took_ns;
	if (counts->samples && counts->sampled < MAX_SAMPLES)
		counts->samples[counts->sampled++] = took_ns > UINT32_MAX ? UINT32_MAX : took_ns;
}

void add_counts(struct counts *all, const struct counts *one)
{
	all->reads += one->reads;
	all->writes += one->writes;
	all->flushes += one->flushes;
	all->verified += one->verified;
	all->sum_ns += one->sum_ns;
	if (one->max_ns > all->max_ns)
		all->max_ns = one->max_ns;
	if (!one->samples)
		return;
	all->samples = realloc(all->samples,
			       sizeof(*all->samples) * ((size_t)all->sampled + one->sampled + 1));
	memcpy(all->samples + all->sampled, one->samples, sizeof(*one->samples) * one->sampled);
	all->sampled += one->sampled;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void print_percentiles(const struct counts *all)
{
	uint32_t *samples = all->samples, count = all->sampled;

	qsort(samples, count, sizeof(*samples), by_value);
	printf(", \"p50_ns\": %u, \"p99_ns\": %u, \"p999_ns\": %u",
	       count ? samples[count / 2] : 0,
	       count ? samples[(uint64_t)count * 99 / 100] : 0,
	       count ? samples[(uint64_t)count * 999 / 1000] : 0);
}

void report(const struct counts *all, double seconds, uint64_t first_ns)
{
	uint64_t requests = all->reads + all->writes + all->flushes;

	printf("{\"mode\": \"%s\", \"depth\": %d, \"queues\": %d, \"reads\": %" PRIu64
	       ", \"writes\": %" PRIu64 ", \"flushes\": %" PRIu64 ", \"verified\": %" PRIu64
	       ", \"seconds\": %.3f, \"iops\": %.0f, \"mean_ns\": %.0f, \"max_ns\": %" PRIu64
	       ", \"first_ns\": %" PRIu64,
	       mode_names[opt.mode], opt.depth, opt.queues, all->reads, all->writes, all->flushes,
	       all->verified, seconds, requests / seconds,
	       requests ? (double)all->sum_ns / requests : 0, all->max_ns, first_ns);
	if (all->samples)
		print_percentiles(all);
	printf("}\n");
}
