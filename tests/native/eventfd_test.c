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

/* One request of no buffer's bytes, completed by the device as soon as it has it. */
static void shadow_is_held_although_its_guest_takes_no_call(void)
{
	struct vb_region region = {GUEST, sizeof(memory), (uintptr_t)memory};
	struct vb_shadow_setup setup = {
		.descriptor_area = GUEST, .driver_area = GUEST + 0x100, .device_area = GUEST + 0x200,
		.memory = (uintptr_t)ring, .iova = 0x200000000ull, .size = 4, .slots = 4,
		.kick = -1, .call = victim, .device_kick = -1, .broken = -1,
		.device_call = eventfd(0, EFD_NONBLOCK),
	};
	struct vb_shadow_layout layout;
	struct vb_shadow *shadow;
	uint64_t one = 1;

	vb_shadow_layout(setup.slots, 0, &layout);
	put16(memory + 0x102, 1);
	shadow = vb_shadow_new(&setup, &region, 1);
	CHECK(shadow && vb_shadow_start(shadow) == 0);
	while (!__atomic_load_n((uint16_t *)(ring + layout.driver_area + 2), __ATOMIC_SEQ_CST))
		usleep(1000);
	put16(ring + layout.device_area + 2, 1);
	CHECK(write(setup.device_call, &one, sizeof(one)) == sizeof(one));
	while (!__atomic_load_n(&filled, __ATOMIC_SEQ_CST))
		usleep(1000);
	usleep(50000); /* it waits now; if not, this shows less and fails nothing */
	vb_shadow_hold(shadow);
	vb_shadow_stop(shadow);
	CHECK(!vb_shadow_broken(shadow));
	vb_shadow_free(shadow);
	close(setup.device_call);
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
	filled = 0;
	shadow_is_held_although_its_guest_takes_no_call();
	return 0;
}
