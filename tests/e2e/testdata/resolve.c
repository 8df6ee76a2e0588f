/* Prints the addresses of a name, by whatever getaddrinfo(3) it is linked with, or that of c-ares. */
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#ifdef CARES
#include <ares.h>
#include <sys/select.h>
#endif

static void print(const struct sockaddr *sa)
{
	char text[64] = "";
	socklen_t size = sa->sa_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);

	getnameinfo(sa, size, text, sizeof(text), 0, 0, NI_NUMERICHOST);
	printf("address %s\n", text);
}

#ifdef CARES
static void done(void *arg, int status, int timeouts, struct ares_addrinfo *result)
{
	struct ares_addrinfo_node *n;

	*(int *)arg = status;
	if (status != ARES_SUCCESS) {
		printf("error %s after %d timeouts\n", ares_strerror(status), timeouts);
		return;
	}
	for (n = result->nodes; n; n = n->ai_next)
		print(n->ai_addr);
	ares_freeaddrinfo(result);
}

static int resolve(const char *name)
{
	struct ares_addrinfo_hints hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM };
	ares_channel channel;
	int status = ARES_ENOTINITIALIZED;

	ares_library_init(ARES_LIB_INIT_ALL);
	if (ares_init(&channel) != ARES_SUCCESS)
		return 1;
	ares_getaddrinfo(channel, name, 0, &hints, done, &status);
	for (;;) {
		fd_set in, out;
		struct timeval wait;
		int n;

		FD_ZERO(&in);
		FD_ZERO(&out);
		n = ares_fds(channel, &in, &out);
		if (!n)
			break;
		select(n, &in, &out, 0, ares_timeout(channel, 0, &wait));
		ares_process(channel, &in, &out);
	}
	ares_destroy(channel);
	return status != ARES_SUCCESS;
}
#else
static int resolve(const char *name)
{
	struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM }, *all, *a;
	int status = getaddrinfo(name, 0, &hints, &all);

	if (status) {
		printf("error %s\n", gai_strerror(status));
		return 1;
	}
	for (a = all; a; a = a->ai_next)
		print(a->ai_addr);
	freeaddrinfo(all);
	return 0;
}
#endif

int main(int argc, char **argv)
{
	return argc == 2 ? resolve(argv[1]) : 2;
}
