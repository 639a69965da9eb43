/* Both sides of a network device's control vring: one command after the other, as bytes.
 *
 * Device and guest are hostile: what they write is read once and checked. Functions that return int64_t
 * give a negative errno on failure. One thread at a time.
 */
#ifndef VHOST_BRIDGE_CONTROL_H
#define VHOST_BRIDGE_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#include "shadow.h"

struct vb_commands;

/* vb_shadow_layout(slots, 0, ...) tells where its areas lie in memory: zeroed, mapped here and, at
 * iova, for the device. At least two slots, in a split ring a power of two. NULL: there is no memory
 * left. */
struct vb_commands *vb_commands_new(uint64_t memory, uint64_t iova, uint32_t slots,
				    int packed);
void vb_commands_free(struct vb_commands *commands);

/* Show a command and the place of its reply to the device, which is to be kicked then. -EBUSY:
 * there is one that is not done. */
int64_t vb_commands_send(struct vb_commands *commands, uint64_t command, uint32_t length,
			 uint64_t reply, uint32_t room);
/* 1: the command is done; 0: not yet. -EPROTO: the device broke the rules. */
int64_t vb_commands_done(struct vb_commands *commands);

struct vb_requests;

/* The device's side of a guest's control vring; of the setup features, areas, size and base count.
 * NULL: no memory, a vring that does not lie in the regions, or a base outside it. */
struct vb_requests *vb_requests_new(const struct vb_shadow_setup *setup,
				    const struct vb_region *regions, size_t count);
void vb_requests_free(struct vb_requests *requests);

/* The bytes of the next command, of which as many as there is room for are copied, and how many its
 * reply may have. -EAGAIN: there is none; a kick tells when there is. -EPROTO: the vring is broken. */
int64_t vb_requests_fetch(struct vb_requests *requests, uint8_t *command, uint64_t room,
			  uint32_t *reply);
/* Give the command back that was fetched. 1: the guest wants to be called; 0: it does not. */
int64_t vb_requests_give(struct vb_requests *requests, const uint8_t *reply, uint32_t length);
/* Where another one goes on, as vhost encodes it: a command that was fetched and not given back is
 * the next one there. */
int64_t vb_requests_base(struct vb_requests *requests);
/* Have the driver notify whoever has the vring next. 0, or what guest memory that is gone gives. */
int64_t vb_requests_ask_for_kicks(struct vb_requests *requests);
/* Why the vring broke; NULL while it did not. */
const char *vb_requests_broken(struct vb_requests *requests);

#endif
