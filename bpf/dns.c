// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Name queries of workloads. Attached to a workload's cgroup only where DNS is enabled, beside the hooks of outbound.c and
 * after them: a name server that is itself a mesh destination has been redirected when these run, and is not on port 53
 * any more.
 *
 * A query to port 53 goes to the daemon's listener in the same namespace instead, at an address that says which name server was
 * asked: 127.53.x.y, or one port of ::1 each. What comes from there is shown with that name server's address. Nothing is kept per
 * socket: one socket may ask several name servers at once. Whenever the daemon cannot answer, queries pass as they are.
 */
#include "maps.h"

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262

#define CONTINUE 1

#define PORT_DOMAIN bpf_htons(53)
#define LOOPBACK4 bpf_htonl(0x7f000001)
#define STEERED4 0x7f350000 /* 127.53.0.0 */

enum dns_constant {
	DNS_PORT = 15053,    /* of the listener on every IPv4 address, and the first of those on ::1 */
	DNS_RESOLVERS4 = 256, /* name servers that a namespace can ask by IPv4; further ones are not steered */
	DNS_RESOLVERS6 = 3,
};

#define MAX_RESOLVERS 65536

/* The namespaces in which the daemon answers. Made and removed by the daemon; the counts are the programs'. */
struct dns_space {
	__u32 next4; /* name servers that have got a slot, by IPv4 */
	__u32 next6;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_WORKLOADS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct dns_space);
} dns_spaces SEC(".maps");

/* Which slot stands for a name server. Written by the sending hooks at the first query to it; removed by the daemon with the
 * namespace. */
struct dns_resolver_key {
	__u64 netns;
	struct addr ip;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_RESOLVERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct dns_resolver_key);
	__type(value, __u32);
} dns_slots SEC(".maps");

/* The way back. Written by the sending hooks; read by the receiving ones and the daemon; removed by the daemon. */
struct dns_slot_key {
	__u64 netns;
	__u32 slot; /* 1 to DNS_RESOLVERS4; by IPv6 0 to DNS_RESOLVERS6 - 1 */
	__u32 family;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_RESOLVERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct dns_slot_key);
	__type(value, struct addr);
} dns_resolvers SEC(".maps");

/* On the daemon's sockets, which are recognised by it: whoever else holds the port gets nothing. Written by the daemon. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} dns_listeners SEC(".maps");

/* Verdicts on queries to port 53. Written by the sending hooks; read by the daemon. */
enum dns_stat {
	DNS_STEERED,
	DNS_PASSED, /* the daemon is stopped or hung, or has no listener here */
	DNS_UNREACHABLE, /* the socket or the name server is tied to a device: loopback cannot stand for it */
	DNS_FULL, /* one name server too many */
	DNS_STAT_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DNS_STAT_MAX);
	__type(key, __u32);
	__type(value, __u64);
} dns_stats SEC(".maps");

SHARED(enum, dns_constant);
SHARED(enum, dns_stat);

static __always_inline void count_query(__u32 which)
{
	__u64 *n = bpf_map_lookup_elem(&dns_stats, &which);

	if (n)
		*n += 1;
}

/* --- sending ------------------------------------------------------------------------------------------------------ */

struct query {
	struct addr ip; /* of the name server */
	__u64 netns;
	__u32 family;
	__u32 tcp;
	__u32 slot;
};

/* Whether loopback can stand for the name server: not for a group of them, nor for one that is known on a link only. */
static __always_inline int may_stand_for(const struct query *q)
{
	if (q->family == AF_INET)
		return (q->ip.w[3] & bpf_htonl(0xf0000000)) != bpf_htonl(0xe0000000) && q->ip.w[3] != bpf_htonl(0xffffffff);
	return (q->ip.w[0] & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000) &&
	       (q->ip.w[0] & bpf_htonl(0xffc00000)) != bpf_htonl(0xfe800000);
}

/* Gives the name server a slot of the namespace. Returns 0 when there is none left. */
static __always_inline int new_slot(struct query *q, const struct dns_resolver_key *key)
{
	struct dns_slot_key back = { .netns = q->netns, .family = q->family };
	struct dns_space *space = bpf_map_lookup_elem(&dns_spaces, &q->netns);
	__u32 *other, taken;

	if (!space)
		return 0;
	if (q->family == AF_INET) {
		if (space->next4 >= DNS_RESOLVERS4)
			return 0;
		taken = __sync_fetch_and_add(&space->next4, 1);
		if (taken >= DNS_RESOLVERS4)
			return 0;
		back.slot = taken + 1;
	} else {
		if (space->next6 >= DNS_RESOLVERS6)
			return 0;
		taken = __sync_fetch_and_add(&space->next6, 1);
		if (taken >= DNS_RESOLVERS6)
			return 0;
		back.slot = taken;
	}
	if (bpf_map_update_elem(&dns_resolvers, &back, &q->ip, BPF_ANY))
		return 0;
	q->slot = back.slot;
	if (!bpf_map_update_elem(&dns_slots, key, &q->slot, BPF_NOEXIST))
		return 1;
	other = bpf_map_lookup_elem(&dns_slots, key); /* another socket asked it at the same moment */
	if (!other)
		return 0;
	q->slot = *other;
	return 1;
}

static __always_inline int find_slot(struct query *q)
{
	struct dns_resolver_key key = { .netns = q->netns, .ip = q->ip };
	__u32 *slot = bpf_map_lookup_elem(&dns_slots, &key);

	if (!slot)
		return new_slot(q, &key);
	q->slot = *slot;
	return 1;
}

/* Whether the socket that the query would reach is the daemon's. */
static __always_inline int reaches_daemon(struct bpf_sock_addr *ctx, const struct query *q)
{
	struct bpf_sock_tuple t = {};
	__u32 size = sizeof(t.ipv4);
	struct bpf_sock *sk;
	int ours;

	if (q->family == AF_INET) {
		t.ipv4.saddr = LOOPBACK4;
		t.ipv4.daddr = bpf_htonl(STEERED4 | q->slot);
		t.ipv4.dport = bpf_htons(DNS_PORT);
	} else {
		size = sizeof(t.ipv6);
		t.ipv6.saddr[3] = bpf_htonl(1);
		t.ipv6.daddr[3] = bpf_htonl(1);
		t.ipv6.dport = bpf_htons(DNS_PORT + q->slot);
	}
	if (q->tcp)
		sk = bpf_sk_lookup_tcp(ctx, &t, size, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(ctx, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 0;
	ours = bpf_sk_storage_get(&dns_listeners, sk, 0, 0) != 0;
	bpf_sk_release(sk);
	return ours;
}

/* Whether the query is to be steered, to q->slot. */
static __always_inline int decide(struct bpf_sock_addr *ctx, struct bpf_sock *sk, struct query *q)
{
	int open;

	if (sk->src_port == 53)
		return 0; /* a name server's answer to another one */
	if (READ(sk->bound_dev_if) > 1 || !may_stand_for(q)) {
		count_query(DNS_UNREACHABLE);
		return 0;
	}
	q->netns = bpf_get_netns_cookie(ctx);
	if (heartbeat_stale(&open) || !bpf_map_lookup_elem(&dns_spaces, &q->netns)) {
		count_query(DNS_PASSED);
		return 0;
	}
	if (!find_slot(q)) {
		count_query(DNS_FULL);
		return 0;
	}
	if (!reaches_daemon(ctx, q)) {
		count_query(DNS_PASSED);
		return 0; /* the daemon is gone, or a stranger has its port */
	}
	count_query(DNS_STEERED);
	return 1;
}

static __always_inline int carries_queries(__u32 protocol)
{
	return protocol == IPPROTO_UDP || protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
}

static __always_inline int steer4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct query q = { .family = AF_INET };
	__u32 protocol = READ(ctx->protocol);
	__be32 ip = READ(ctx->user_ip4);
	__be16 port = READ(ctx->user_port);

	if (port != PORT_DOMAIN || !sk || !carries_queries(protocol))
		return CONTINUE;
	addr_v4(&q.ip, ip ? ip : LOOPBACK4); /* the kernel takes 0.0.0.0 for loopback */
	q.tcp = protocol != IPPROTO_UDP;
	if (!decide(ctx, sk, &q))
		return CONTINUE;
	ctx->user_ip4 = bpf_htonl(STEERED4 | q.slot);
	ctx->user_port = bpf_htons(DNS_PORT);
	return CONTINUE;
}

static __always_inline int steer6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct query q = { .family = AF_INET6 };
	__u32 protocol = READ(ctx->protocol);
	__be16 port = READ(ctx->user_port);

	addr_v6(&q.ip, READ(ctx->user_ip6[0]), READ(ctx->user_ip6[1]), READ(ctx->user_ip6[2]), READ(ctx->user_ip6[3]));
	if (port != PORT_DOMAIN || !sk || !carries_queries(protocol))
		return CONTINUE;
	q.tcp = protocol != IPPROTO_UDP;
	if (addr_is_v4(&q.ip)) {
		q.family = AF_INET;
		if (!q.ip.w[3])
			q.ip.w[3] = LOOPBACK4;
	} else if (!q.ip.w[0] && !q.ip.w[1] && !q.ip.w[2] && !q.ip.w[3]) {
		q.ip.w[3] = bpf_htonl(1);
	}
	if (!decide(ctx, sk, &q))
		return CONTINUE;
	ctx->user_ip6[0] = 0;
	ctx->user_ip6[1] = 0;
	ctx->user_ip6[2] = q.family == AF_INET ? MAPPED_PREFIX : 0;
	ctx->user_ip6[3] = q.family == AF_INET ? bpf_htonl(STEERED4 | q.slot) : bpf_htonl(1);
	ctx->user_port = q.family == AF_INET ? bpf_htons(DNS_PORT) : bpf_htons(DNS_PORT + q.slot);
	return CONTINUE;
}

SEC("cgroup/connect4")
int dns_connect4(struct bpf_sock_addr *ctx)
{
	return steer4(ctx);
}

SEC("cgroup/connect6")
int dns_connect6(struct bpf_sock_addr *ctx)
{
	return steer6(ctx);
}

SEC("cgroup/sendmsg4")
int dns_sendmsg4(struct bpf_sock_addr *ctx)
{
	return steer4(ctx);
}

SEC("cgroup/sendmsg6")
int dns_sendmsg6(struct bpf_sock_addr *ctx)
{
	return steer6(ctx);
}

/* --- receiving ---------------------------------------------------------------------------------------------------- */

/* The name server that an address of the daemon's listener stands for. */
static __always_inline struct addr *stood_for(struct bpf_sock_addr *ctx, const struct addr *ip, __be16 port)
{
	struct dns_slot_key key = { .family = AF_INET };
	__u16 number = bpf_ntohs(port);

	if (addr_is_v4(ip)) {
		if (number != DNS_PORT || (ip->w[3] & bpf_htonl(0xffff0000)) != bpf_htonl(STEERED4))
			return 0;
		key.slot = bpf_ntohl(ip->w[3]) & 0xffff;
	} else {
		if (number < DNS_PORT || number >= DNS_PORT + DNS_RESOLVERS6 || !addr_is_loopback(ip))
			return 0;
		key.family = AF_INET6;
		key.slot = number - DNS_PORT;
	}
	key.netns = bpf_get_netns_cookie(ctx);
	return bpf_map_lookup_elem(&dns_resolvers, &key);
}

static __always_inline int show4(struct bpf_sock_addr *ctx)
{
	__be32 from = READ(ctx->user_ip4);
	__be16 port = READ(ctx->user_port);
	struct addr ip, *asked;

	addr_v4(&ip, from);
	asked = stood_for(ctx, &ip, port);
	if (!asked)
		return CONTINUE;
	ctx->user_ip4 = asked->w[3];
	ctx->user_port = PORT_DOMAIN;
	return CONTINUE;
}

static __always_inline int show6(struct bpf_sock_addr *ctx)
{
	__be16 port = READ(ctx->user_port);
	struct addr ip, *asked;

	addr_v6(&ip, READ(ctx->user_ip6[0]), READ(ctx->user_ip6[1]), READ(ctx->user_ip6[2]), READ(ctx->user_ip6[3]));
	asked = stood_for(ctx, &ip, port);
	if (!asked)
		return CONTINUE;
	ctx->user_ip6[0] = asked->w[0];
	ctx->user_ip6[1] = asked->w[1];
	ctx->user_ip6[2] = asked->w[2];
	ctx->user_ip6[3] = asked->w[3];
	ctx->user_port = PORT_DOMAIN;
	return CONTINUE;
}

SEC("cgroup/recvmsg4")
int dns_recvmsg4(struct bpf_sock_addr *ctx)
{
	return show4(ctx);
}

SEC("cgroup/recvmsg6")
int dns_recvmsg6(struct bpf_sock_addr *ctx)
{
	return show6(ctx);
}

SEC("cgroup/getpeername4")
int dns_getpeername4(struct bpf_sock_addr *ctx)
{
	return show4(ctx);
}

SEC("cgroup/getpeername6")
int dns_getpeername6(struct bpf_sock_addr *ctx)
{
	return show6(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
