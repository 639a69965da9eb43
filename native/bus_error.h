/* Guest memory is a file of the front-end's, which may make it shorter: SIGBUS then. */
#ifndef VHOST_BRIDGE_BUS_ERROR_H
#define VHOST_BRIDGE_BUS_ERROR_H

#include <stdbool.h>

/* Once, before the first use of survives(). */
void catch_bus_errors(void);
/* Do something that touches guest memory; false if that was gone, and only some of it was done. */
bool survives(void (*work)(void *argument), void *argument);

#endif
