/* Thin system-call wrappers. cffi releases the GIL around each call and the result carries errno,
 * so that nothing can overwrite it between the system call and Python reading it. */
#include "compat.h"
#include "vb_native.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

int64_t vb_ioctl(int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -(int64_t)errno : result;
}

/* One vhost_msg_v2 to a vhost-vdpa device. A short write cannot happen: the kernel takes the
 * message whole or fails. */
int64_t vb_iotlb(int fd, uint32_t asid, uint8_t type, uint8_t perm, uint64_t iova, uint64_t size,
		 uint64_t uaddr)
{
	struct vhost_msg_v2 message = {
		.type = VHOST_IOTLB_MSG_V2,
		.asid = asid,
		.iotlb = {
			.iova = iova,
			.size = size,
			.uaddr = uaddr,
			.perm = perm,
			.type = type,
		},
	};
	ssize_t written = write(fd, &message, sizeof(message));

	return written < 0 ? -(int64_t)errno : 0;
}

/* A shared read-write mapping as an address: Python's mmap would duplicate the fd and cannot map
 * at every offset. User addresses are below 2^63, so a negative result is always an errno. */
int64_t vb_map_shared(uint64_t length, int fd, uint64_t offset)
{
	void *address = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
			     (off_t)offset);

	return address == MAP_FAILED ? -(int64_t)errno : (int64_t)(uintptr_t)address;
}

int64_t vb_unmap(uint64_t address, uint64_t length)
{
	return munmap((void *)(uintptr_t)address, length) < 0 ? -(int64_t)errno : 0;
}
