/* One command is with the device at a time: that makes a packed ring simple, and any ring in
 * order. */
#include "control.h"

#include "device_ring.h"

#include <errno.h>
#include <stdlib.h>

enum { COMMAND, REPLY, PARTS };

struct vb_commands {
	struct device_ring ring;
	bool packed;
	bool busy;
	/* Of a packed ring. */
	bool wrap;
	uint32_t place;
};

struct vb_commands *vb_commands_new(uint64_t memory, uint64_t iova, uint32_t slots, int packed)
{
	struct vb_commands *commands = calloc(1, sizeof(*commands));

	if (commands && !device_ring_init(&commands->ring, slots, 0, false,
					  (uint8_t *)(uintptr_t)memory, iova)) {
		free(commands);
		return NULL;
	}
	if (commands)
		commands->packed = commands->wrap = packed;
	return commands;
}

void vb_commands_free(struct vb_commands *commands)
{
	if (!commands)
		return;
	device_ring_free(&commands->ring);
	free(commands);
}

/* The first descriptor last: it is what makes both available. */
static void show_packed(struct vb_commands *commands, const struct buffer *buffers)
{
	for (uint32_t i = PARTS; i-- > 0;) {
		uint32_t place = commands->place + i;
		bool wrap = commands->wrap;
		struct descriptor *at;
		uint16_t flags;

		if (place >= commands->ring.size) {
			place -= commands->ring.size;
			wrap = !wrap;
		}
		flags = wrap ? DESC_AVAIL : DESC_USED;
		flags |= i + 1 < PARTS ? DESC_NEXT : 0;
		flags |= buffers[i].write ? DESC_WRITE : 0;
		at = &commands->ring.descriptors[place];
		__atomic_store_n(&at->address, buffers[i].address, __ATOMIC_RELAXED);
		__atomic_store_n(&at->length, buffers[i].length, __ATOMIC_RELAXED);
		store16(&at->first, 0);
		store16_release(&at->second, flags);
	}
}

/* The used descriptor takes the place of the first one. */
static int take_packed(struct vb_commands *commands)
{
	const struct descriptor *at = &commands->ring.descriptors[commands->place];
	uint16_t flags = load16_acquire(&at->second);

	if (!!(flags & DESC_AVAIL) != commands->wrap || !!(flags & DESC_USED) != commands->wrap)
		return 0;
	if (load16(&at->first) != 0)
		return -1;
	commands->place += PARTS;
	if (commands->place >= commands->ring.size) {
		commands->place -= commands->ring.size;
		commands->wrap = !commands->wrap;
	}
	return 1;
}

static int take_split(struct vb_commands *commands)
{
	const char *why = NULL;
	uint16_t head;
	uint32_t length;
	int found = device_ring_take(&commands->ring, &head, &length, &why);

	if (found > 0)
		device_ring_remove(&commands->ring, head);
	return found;
}

static bool show_split(struct vb_commands *commands, const struct buffer *buffers)
{
	uint16_t head = device_ring_add(&commands->ring, buffers, PARTS);

	if (head != NO_SLOT)
		device_ring_show(&commands->ring, head);
	return head != NO_SLOT;
}

int64_t vb_commands_send(struct vb_commands *commands, uint64_t command, uint32_t length,
			 uint64_t reply, uint32_t room)
{
	const struct buffer buffers[PARTS] = {
		[COMMAND] = {.address = command, .length = length},
		[REPLY] = {.address = reply, .length = room, .write = 1},
	};

	if (commands->busy)
		return -EBUSY;
	if (commands->packed)
		show_packed(commands, buffers);
	else if (!show_split(commands, buffers))
		return -EBUSY;
	commands->busy = true;
	return 0;
}

int64_t vb_commands_done(struct vb_commands *commands)
{
	int found;

	if (!commands->busy)
		return 0;
	found = commands->packed ? take_packed(commands) : take_split(commands);
	if (found < 0)
		return -EPROTO;
	commands->busy = !found;
	return found;
}
