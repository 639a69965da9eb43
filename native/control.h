/* The driver's side of a network device's control vring: one command after the other.
 *
 * The device is hostile: what it writes is read once and checked. Functions that return int64_t
 * give a negative errno on failure. One thread at a time.
 */
#ifndef VHOST_BRIDGE_CONTROL_H
#define VHOST_BRIDGE_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#include "shadow.h"

struct vb_commands;

/* vb_shadow_layout(slots, 0, ...) tells where its areas lie in memory: zeroed, mapped here and, at
 * iova, for the device. NULL: there is no memory left. */
struct vb_commands *vb_commands_new(uint64_t memory, uint64_t iova, uint32_t slots,
				    int packed);
void vb_commands_free(struct vb_commands *commands);

/* Show a command and the place of its reply to the device, which is to be kicked then. -EBUSY:
 * there is one that is not done. */
int64_t vb_commands_send(struct vb_commands *commands, uint64_t command, uint32_t length,
			 uint64_t reply, uint32_t room);
/* 1: the command is done; 0: not yet. -EPROTO: the device broke the rules. */
int64_t vb_commands_done(struct vb_commands *commands);

#endif
