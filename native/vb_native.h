#ifndef VHOST_BRIDGE_NATIVE_H
#define VHOST_BRIDGE_NATIVE_H

#include <stdint.h>

int64_t vb_ioctl(int fd, unsigned long request, void *argument);
int64_t vb_iotlb(int fd, uint32_t asid, uint8_t type, uint8_t perm, uint64_t iova, uint64_t size,
		 uint64_t uaddr);
int64_t vb_map_shared(uint64_t length, int fd, uint64_t offset);
int64_t vb_unmap(uint64_t address, uint64_t length);
int64_t vb_signal_eventfd(int fd);
int64_t vb_spawn(char *const argv[], char *const environment[], int output);

#endif
