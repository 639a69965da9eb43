/* What every block must hold, by its place and its history. */
#ifndef BLKIO_VERIFY_BLOCKS_H
#define BLKIO_VERIFY_BLOCKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define GOLDEN UINT64_C(0x9e3779b97f4a7c15)

/* One block's history: `completed` is on the device for certain, `issued` may be. 0: never. */
struct history {
	_Atomic uint32_t completed, issued;
};
extern struct history *histories;
extern uint64_t total_blocks;

/* The histories of `total_blocks`: those in the file of --state, or new ones. */
void open_state(void);

/* Pseudo-random, of any number. */
uint64_t mix(uint64_t x);

uint64_t block_offset(uint64_t block);
void make_block(uint64_t *words, uint64_t offset, uint32_t generation);
/* Ends the process where it is wrong. False: it was never written, and may be anything. */
bool verify_content(uint64_t block, const void *data);

#endif
