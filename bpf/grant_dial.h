/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whether a connect goes straight to an instance, see grant.h. */
#pragma once

#include "grant.h"
#include <bpf/bpf_core_read.h>

struct dial {
	struct addr dst;
	__be16 port;
	__u16 v4; /* the connection runs over IPv4 */
};

/* Whether it is a subflow: its siblings could be joined later, and destroying it would not end its connection. */
static __always_inline int is_multipath(struct bpf_sock *sk)
{
	struct tcp_sock *tp = 0;

	if (!bpf_core_field_exists(tp->is_mptcp))
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	return tp && tp->is_mptcp;
}

/* Whether the socket is bound to no address, or to the one that was found to reach the target. */
static __always_inline int bound_to(struct bpf_sock *sk, const struct dial *d, const struct addr *src)
{
	__be32 ip4 = READ(sk->src_ip4);
	struct addr bound;

	if (READ(sk->family) == AF_INET) {
		addr_v4(&bound, ip4);
	} else {
		addr_v6(&bound, READ(sk->src_ip6[0]), READ(sk->src_ip6[1]), READ(sk->src_ip6[2]), READ(sk->src_ip6[3]));
		if (!(bound.w[0] | bound.w[1] | bound.w[2] | bound.w[3]))
			return 1;
	}
	return (d->v4 && addr_is_v4(&bound) && !bound.w[3]) || addr_equal(&bound, src);
}

/* Whether the workload may go straight to a target of a grant, and which; then it is noted in d. */
static __always_inline int direct_target(struct bpf_sock_addr *ctx, struct bpf_sock *sk, struct dial *d, __u64 netns,
					 const struct workload *w, struct origin *o)
{
	struct grant_key key = { .ip = d->dst, .netns = netns, .workload = o->workload, .port = d->port };
	struct grant_target *t;
	struct grant *g;
	__u32 device = READ(sk->bound_dev_if);

	g = bpf_map_lookup_elem(&grants, &key);
	if (!g) {
		key.port = 0;
		g = bpf_map_lookup_elem(&grants, &key);
	}
	if (!g || !g->n || !grant_valid(g))
		return 0;
	t = &g->target[bpf_get_prandom_u32() % g->n & (GRANT_TARGETS - 1)];
	if (!still_listening(t) || !bound_to(sk, d, &t->src))
		return 0;
	if (device == 1 || (device && t->netns == netns))
		return 0; /* what is local is reached by lo alone, and nothing else is */
	if (w->direct >= MAX_DIRECT_PER_WORKLOAD || w->granted >= MAX_GRANTED_PER_WORKLOAD)
		return 0;
	if (is_multipath(sk))
		return 0;
	o->to = t->netns;
	o->device = device;
	o->key_port = key.port;
	o->group = t->group;
	d->dst = t->ip;
	d->port = t->port;
	return 1;
}
