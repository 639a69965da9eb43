/* The bytes of vrings (virtio 1.4, sections 2.7 and 2.8), and how memory that somebody else
 * writes to is read: every word once, as one access. */
#ifndef VHOST_BRIDGE_VRING_H
#define VHOST_BRIDGE_VRING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "vrings are little-endian");

enum {
	DESC_NEXT = 1,
	DESC_WRITE = 2,
	DESC_INDIRECT = 4,
	DESC_AVAIL = 1 << 7,
	DESC_USED = 1 << 15,
	AVAIL_NO_INTERRUPT = 1,
	USED_NO_NOTIFY = 1,
	EVENT_ENABLE = 0,
	EVENT_DISABLE = 1,
	EVENT_DESC = 2,
};

#define FEATURE_INDIRECT (UINT64_C(1) << 28)
#define FEATURE_EVENT_IDX (UINT64_C(1) << 29)
#define FEATURE_PACKED (UINT64_C(1) << 34)
#define FEATURE_IN_ORDER (UINT64_C(1) << 35)

/* In split rings the last two words are flags and next, in packed ones id and flags. */
struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t first;
	uint16_t second;
};

_Static_assert(sizeof(struct descriptor) == 16, "descriptor");

struct used_element {
	uint32_t id;
	uint32_t length;
};

/* A buffer of a request, in private memory. */
struct buffer {
	uint64_t address;
	uint32_t length;
	uint16_t write;
};

#ifdef CRASH_POINTS
/* Tests: this process may end before any store to shared memory. */
void crash_point(void);
#else
static inline void crash_point(void)
{
}
#endif

static inline uint8_t load8(const void *at)
{
	return __atomic_load_n((const uint8_t *)at, __ATOMIC_RELAXED);
}

static inline uint16_t load16(const void *at)
{
	return __atomic_load_n((const uint16_t *)at, __ATOMIC_RELAXED);
}

static inline uint16_t load16_acquire(const void *at)
{
	return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE);
}

static inline uint32_t load32(const void *at)
{
	return __atomic_load_n((const uint32_t *)at, __ATOMIC_RELAXED);
}

static inline uint64_t load64(const void *at)
{
	return __atomic_load_n((const uint64_t *)at, __ATOMIC_RELAXED);
}

static inline void store16(void *at, uint16_t value)
{
	crash_point();
	__atomic_store_n((uint16_t *)at, value, __ATOMIC_RELAXED);
}

static inline void store32(void *at, uint32_t value)
{
	crash_point();
	__atomic_store_n((uint32_t *)at, value, __ATOMIC_RELAXED);
}

static inline void store8_release(void *at, uint8_t value)
{
	crash_point();
	__atomic_store_n((uint8_t *)at, value, __ATOMIC_RELEASE);
}

static inline void store16_release(void *at, uint16_t value)
{
	crash_point();
	__atomic_store_n((uint16_t *)at, value, __ATOMIC_RELEASE);
}

static inline void store64(void *at, uint64_t value)
{
	crash_point();
	__atomic_store_n((uint64_t *)at, value, __ATOMIC_RELAXED);
}

static inline void store64_release(void *at, uint64_t value)
{
	crash_point();
	__atomic_store_n((uint64_t *)at, value, __ATOMIC_RELEASE);
}

static inline struct descriptor load_descriptor(const struct descriptor *at)
{
	uint64_t rest = __atomic_load_n((const uint64_t *)at + 1, __ATOMIC_RELAXED);

	return (struct descriptor){
		.address = __atomic_load_n((const uint64_t *)at, __ATOMIC_RELAXED),
		.length = (uint32_t)rest,
		.first = (uint16_t)(rest >> 32),
		.second = (uint16_t)(rest >> 48),
	};
}

static inline uint64_t pack_words(uint32_t length, uint16_t first, uint16_t second)
{
	return length | (uint64_t)first << 32 | (uint64_t)second << 48;
}

static inline void store_descriptor(struct descriptor *at, struct descriptor value)
{
	store64(at, value.address);
	store64((uint64_t *)at + 1, pack_words(value.length, value.first, value.second));
}

static inline struct used_element load_used(const struct used_element *at)
{
	return (struct used_element){
		.id = __atomic_load_n(&at->id, __ATOMIC_RELAXED),
		.length = __atomic_load_n(&at->length, __ATOMIC_RELAXED),
	};
}

static inline void store_used(struct used_element *at, struct used_element value)
{
	store32(&at->id, value.id);
	store32(&at->length, value.length);
}

/* A store before it is seen by the other side before a load behind it is done. */
static inline void full_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Whether going from before to now passed the index that the other side waits for. */
static inline bool passed_event(uint16_t event, uint16_t now, uint16_t before)
{
	return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

#endif
