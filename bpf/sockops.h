/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What sockops programs announce and forget of a connection. */
#pragma once

#include "maps.h"

/* The connection as its client sees it: src is the client. accepted: ctx is the server's end. */
static __always_inline void read_tuple(struct bpf_sock_ops *ctx, struct tuple *t, int accepted)
{
	struct addr local, remote;
	__u32 family = READ(ctx->family);
	__be16 lport = bpf_htons((__u16)READ(ctx->local_port));
	__be16 rport = READ(ctx->remote_port) >> 16;
	__be32 local4 = READ(ctx->local_ip4), remote4 = READ(ctx->remote_ip4);

	addr_v6(&local, READ(ctx->local_ip6[0]), READ(ctx->local_ip6[1]), READ(ctx->local_ip6[2]), READ(ctx->local_ip6[3]));
	addr_v6(&remote, READ(ctx->remote_ip6[0]), READ(ctx->remote_ip6[1]), READ(ctx->remote_ip6[2]),
		READ(ctx->remote_ip6[3]));
	if (family == AF_INET) {
		addr_v4(&local, local4);
		addr_v4(&remote, remote4);
	}
	__builtin_memset(t, 0, sizeof(*t));
	t->src = accepted ? remote : local;
	t->dst = accepted ? local : remote;
	t->sport = accepted ? rport : lport;
	t->dport = accepted ? lport : rport;
	t->netns = bpf_get_netns_cookie(ctx);
}

static __always_inline void watch_close(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, READ(ctx->bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void forget_pending(const struct tuple *t, __u32 workload)
{
	struct workload *w;

	if (bpf_map_delete_elem(&pending, t))
		return; /* somebody else did */
	w = bpf_map_lookup_elem(&workloads, &workload);
	if (w)
		__sync_fetch_and_add(&w->pending, -1);
}

static __always_inline void forget_direct(const struct tuple *t)
{
	struct direct *d = bpf_map_lookup_elem(&direct, t);
	struct workload *w;
	__u32 workload;

	if (!d)
		return;
	workload = d->workload; /* who announced it pays for it */
	if (bpf_map_delete_elem(&direct, t))
		return; /* somebody else did */
	w = bpf_map_lookup_elem(&workloads, &workload);
	if (w)
		__sync_fetch_and_add(&w->direct, -1);
}

/* Announces a connection to a strict port, by its 4-tuple. When direct or the workload's share of it is full, the SYN is
 * refused. */
static __always_inline void put_direct(struct bpf_sock_ops *ctx, const struct tuple *t, struct direct *d)
{
	__u32 id = d->workload;
	struct workload *w = bpf_map_lookup_elem(&workloads, &id);

	if (!w || w->direct >= MAX_DIRECT_PER_WORKLOAD)
		return;
	d->time = bpf_ktime_get_ns();
	d->cookie = bpf_get_socket_cookie(ctx);
	if (bpf_map_update_elem(&direct, t, d, BPF_NOEXIST)) {
		struct direct *old = bpf_map_lookup_elem(&direct, t);

		if (!old || bpf_map_update_elem(&direct, t, d, BPF_EXIST))
			return;
	} else {
		__sync_fetch_and_add(&w->direct, 1);
	}
	watch_close(ctx);
}

static __always_inline void announce(struct bpf_sock_ops *ctx, const struct tuple *t, const struct peer *p)
{
	struct direct d = { .workload = p->workload, .kind = p->kind, .peer = p->ip, .peer_port = p->port };

	put_direct(ctx, t, &d);
}
