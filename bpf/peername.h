/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* getpeername, and accept, of workloads. */
#pragma once

#include "maps.h"

/* What the application should see as its peer: what it dialled, or the client behind the proxy. */
static __always_inline int shown_peer(struct bpf_sock *sk, struct addr *ip, __be16 *port)
{
	struct peer *p = bpf_sk_storage_get(&sk_peer, sk, 0, 0);
	struct origin *o;

	if (p && p->port) {
		*ip = p->ip;
		*port = p->port;
		return 1;
	}
	o = bpf_sk_storage_get(&sk_out, sk, 0, 0);
	if (!o || !o->flags)
		return 0;
	*ip = o->dst;
	*port = o->dport;
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr ip;
	__be16 port;

	if (!sk || !shown_peer(sk, &ip, &port) || !addr_is_v4(&ip))
		return CONTINUE; /* an IPv6 client cannot be shown on an IPv4 socket */
	ctx->user_ip4 = ip.w[3];
	ctx->user_port = port;
	return CONTINUE;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr ip;
	__be16 port;

	if (!sk || !shown_peer(sk, &ip, &port))
		return CONTINUE;
	ctx->user_ip6[0] = ip.w[0];
	ctx->user_ip6[1] = ip.w[1];
	ctx->user_ip6[2] = ip.w[2];
	ctx->user_ip6[3] = ip.w[3];
	ctx->user_port = port;
	return CONTINUE;
}
