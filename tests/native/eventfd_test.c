/* A peer that fills its eventfd's counter between our look at it and our write to it.
 *
 * Linked with --wrap=poll, so that it always hits. An alarm ends what waits.
 */
#include "../../native/eventfd.h"
#include "../../native/shadow.h"
#include "../../native/vb_native.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define GUEST 0x40000000ull
#define FULL (UINT64_MAX - 1)
#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

static int victim;
static int filled; /* by whom polls it, once */

int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout);

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
	int result = __real_poll(fds, count, timeout);
	uint64_t most = FULL;

	if (count == 1 && fds->fd == victim && result == 1 &&
	    !__atomic_exchange_n(&filled, 1, __ATOMIC_SEQ_CST))
		CHECK(write(victim, &most, sizeof(most)) == sizeof(most));
	return result;
}

static unsigned char memory[0x1000] __attribute__((aligned(4096)));
static unsigned char ring[0x2000] __attribute__((aligned(4096)));

static void put16(unsigned char *at, uint16_t value)
{
	__atomic_store_n((uint16_t *)at, value, __ATOMIC_SEQ_CST);
}

/* One with a request of no buffer's bytes, which is available. */
static struct vb_shadow *make_shadow(int call, int device_kick, int device_call)
{
	struct vb_region region = {GUEST, sizeof(memory), (uintptr_t)memory};
	struct vb_shadow_setup setup = {
		.descriptor_area = GUEST, .driver_area = GUEST + 0x100, .device_area = GUEST + 0x200,
		.memory = (uintptr_t)ring, .iova = 0x200000000ull, .size = 4, .slots = 4,
		.kick = -1, .call = call, .broken = -1,
		.device_kick = device_kick, .device_call = device_call,
	};
	struct vb_shadow *shadow;

	memset(memory, 0, sizeof(memory));
	memset(ring, 0, sizeof(ring));
	put16(memory + 0x102, 1);
	shadow = vb_shadow_new(&setup, &region, 1);
	CHECK(shadow);
	filled = 0;
	return shadow;
}

static void drop_shadow(struct vb_shadow *shadow)
{
	vb_shadow_hold(shadow);
	vb_shadow_stop(shadow);
	CHECK(!vb_shadow_broken(shadow));
	vb_shadow_free(shadow);
}

/* The device completes the request. */
static void shadow_is_held_although_its_guest_takes_no_call(void)
{
	int device_call = eventfd(0, EFD_NONBLOCK);
	struct vb_shadow *shadow = make_shadow(victim, -1, device_call);
	struct vb_shadow_layout layout;
	uint64_t one = 1;

	vb_shadow_layout(4, 0, &layout);
	CHECK(vb_shadow_start(shadow) == 0);
	put16(ring + layout.device_area + 2, 1);
	CHECK(write(device_call, &one, sizeof(one)) == sizeof(one));
	while (!__atomic_load_n(&filled, __ATOMIC_SEQ_CST))
		usleep(1000);
	usleep(50000); /* it waits now; if not, this shows less and fails nothing */
	drop_shadow(shadow);
	close(device_call);
}

static void shadow_starts_although_its_device_takes_no_kick(void)
{
	struct vb_shadow *shadow = make_shadow(-1, victim, -1);

	CHECK(vb_shadow_start(shadow) == 0 && filled);
	drop_shadow(shadow);
}

int main(void)
{
	uint64_t count;

	alarm(20);
	victim = eventfd(0, 0);
	CHECK(vb_signal_eventfd(victim) == 0 && filled);
	CHECK(read(victim, &count, sizeof(count)) == sizeof(count) && count == FULL);
	CHECK(vb_signal_eventfd(victim) == 0);
	CHECK(read(victim, &count, sizeof(count)) == sizeof(count) && count == 1);
	shadow_is_held_although_its_guest_takes_no_call();
	CHECK(read(victim, &count, sizeof(count)) == sizeof(count) && count == FULL);
	shadow_starts_although_its_device_takes_no_kick();
	return 0;
}
