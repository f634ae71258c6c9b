/* A kernel without one of netfilter's groups of notifications: to join it is refused. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/netlink.h>
#include <stdlib.h>
#include <sys/socket.h>

int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
	int (*real)(int, int, int, const void *, socklen_t) = dlsym(RTLD_NEXT, "setsockopt");
	const char *refused = getenv("CTKEEP_TEST_REFUSED_GROUP");

	if (refused && level == SOL_NETLINK && name == NETLINK_ADD_MEMBERSHIP &&
	    length == sizeof(int) && *(const int *)value == atoi(refused)) {
		int protocol = 0;
		socklen_t size = sizeof(protocol);

		getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size);
		if (protocol == NETLINK_NETFILTER) {
			errno = EPERM;
			return -1;
		}
	}
	return real(fd, level, name, value, length);
}
