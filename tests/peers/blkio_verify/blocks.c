#include "blocks.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "options.h"

#define MAGIC UINT64_C(0x5642424c4f434b31) /* "VBBLOCK1" */
#define HEADER_WORDS 4

struct history *histories;
uint64_t total_blocks;

uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

static uint64_t content_base(uint64_t offset, uint32_t generation)
{
	return mix(offset + GOLDEN) ^ mix(opt.seed * GOLDEN + generation);
}

void make_block(uint64_t *words, uint64_t offset, uint32_t generation)
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

uint64_t block_offset(uint64_t block)
{
	return opt.offset + block * opt.block;
}

bool verify_content(uint64_t block, const void *data)
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

void open_state(void)
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
