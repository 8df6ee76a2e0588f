/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What becomes of a connection on a grant, see grant.h: told to the daemon and kept in the maps. */
#pragma once

#include "grant.h"
#include "sockops.h"

#define SOL_SOCKET 1
#define SO_BINDTOIFINDEX 62
#define NO_DEVICE 0x7fffffff

/* The daemon is woken whenever another quarter of the ring is full: by the news of the first bytes of it, since of those that come at
 * once none may see exactly where it begins, and not by all that come until it runs. */
#define WAKE_EVERY (EVENTS_SIZE / 4)
#define WAKE_WITHIN 4096

/* The application's own bytes: what was received counts the FIN as one. */
static __always_inline void count_bytes(struct bpf_sock *sk, struct grant_event *e)
{
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : 0;

	if (!tp)
		return;
	e->sent = tp->bytes_sent - tp->bytes_retrans;
	e->received = tp->bytes_received;
	if (e->received && ((struct sock_common *)tp)->skc_flags & (1UL << SOCK_DONE))
		e->received--;
}

static __always_inline void tell(struct bpf_sock_ops *ctx, const struct granted *g, __u64 cookie, __u16 stage, __u16 seen)
{
	struct grant_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	__u64 flags = BPF_RB_NO_WAKEUP; /* the daemon looks by itself: waking it costs more than a connection does */
	__u64 waiting;

	if (!e) {
		count(STAT_EVENTS_LOST);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->src = g->t.src;
	e->dst = g->t.dst;
	e->dialled = g->dialled;
	e->sport = g->t.sport;
	e->dport = g->t.dport;
	e->dialled_port = g->dialled_port;
	e->stage = stage;
	e->seen = seen;
	e->from = g->netns;
	e->to = g->t.netns;
	e->cookie = cookie;
	e->opened = g->opened;
	e->workload = g->workload;
	e->pid = g->pid;
	e->device = g->device;
	__builtin_memcpy(e->comm, g->comm, sizeof(e->comm));
	count_bytes(ctx->sk, e);
	e->rtt_us = READ(ctx->srtt_us) >> 3;
	waiting = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	if (seen == SEEN_IMPOSTOR || (waiting >= WAKE_EVERY && waiting % WAKE_EVERY < WAKE_WITHIN))
		flags = BPF_RB_FORCE_WAKEUP;
	bpf_ringbuf_submit(e, flags);
}

/* A workload dials what it is granted: the connection is in granted and in direct before its SYN leaves. Without room for
 * it the SYN is refused. */
static __always_inline void grant_connects(struct bpf_sock_ops *ctx, struct tuple *t, const struct origin *o)
{
	struct direct d = {
		.workload = o->workload, .kind = DIRECT_GRANTED, .peer = o->dst, .peer_port = o->dport,
		.from = o->netns, .key_port = o->key_port, .group = o->group,
	};
	struct granted g = {
		.dialled = o->dst, .dialled_port = o->dport, .netns = o->netns, .workload = o->workload, .pid = o->pid,
		.device = o->device,
	};
	__u64 cookie = o->cookie;
	__u32 id = o->workload;
	struct workload *w = bpf_map_lookup_elem(&workloads, &id);

	t->netns = o->to;
	g.t = *t;
	__builtin_memcpy(g.comm, o->comm, sizeof(g.comm));
	if (!w || bpf_map_update_elem(&granted, &cookie, &g, BPF_NOEXIST))
		return;
	__sync_fetch_and_add(&w->granted, 1);
	put_direct(ctx, t, &d);
	watch_close(ctx);
}

/* A SYN has reached a listener of this workload. Of nested workloads the nearest runs first, and it is what counts. */
static __always_inline void grant_reaches(struct bpf_sock_ops *ctx, __u32 id)
{
	struct workload *w;
	struct direct *d;
	struct tuple t;

	read_tuple(ctx, &t, 1);
	d = bpf_map_lookup_elem(&direct, &t);
	if (!d || d->kind != DIRECT_GRANTED || d->listener)
		return;
	w = bpf_map_lookup_elem(&workloads, &id);
	if (w)
		d->listener = w->group;
}

/* Cuts a socket off from every device, before it has sent more than its SYN. The daemon resets it. */
static __always_inline void muzzle(struct bpf_sock_ops *ctx, struct granted *g, __u64 cookie)
{
	int nowhere = NO_DEVICE;

	g->device = NO_DEVICE;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &nowhere, sizeof(nowhere));
	tell(ctx, g, cookie, GRANT_IMPOSTOR, SEEN_IMPOSTOR);
}

/* Takes a connection out of granted, unless somebody else did. */
static __always_inline int forget_granted(__u64 cookie, __u32 workload)
{
	struct workload *w;

	if (bpf_map_delete_elem(&granted, &cookie))
		return 0;
	w = bpf_map_lookup_elem(&workloads, &workload);
	if (w)
		__sync_fetch_and_add(&w->granted, -1);
	return 1;
}

static __always_inline void grant_opens(struct bpf_sock_ops *ctx, struct origin *o)
{
	__u64 cookie = o->cookie;
	struct granted *g = bpf_map_lookup_elem(&granted, &cookie);
	__u16 seen = SEEN_ADMITTED;
	struct direct *d;
	struct tuple t;

	if (!g || g->opened)
		return;
	t = g->t;
	d = bpf_map_lookup_elem(&direct, &t);
	if (d && d->cookie == cookie && d->seen == SEEN_REFUSED) {
		o->flags = ORIGIN_REDIRECTED; /* lookup handed it to the proxy */
		forget_granted(cookie, g->workload);
		return;
	}
	if (d && d->cookie == cookie && d->listener != o->group) {
		d->seen = SEEN_IMPOSTOR;
		if (d->listener) {
			muzzle(ctx, g, cookie);
			return;
		}
		seen = SEEN_IMPOSTOR; /* nobody's, or one that answers with a SYN cookie, which runs no program */
	}
	g->opened = bpf_ktime_get_ns();
	count(STAT_GRANTED);
	tell(ctx, g, cookie, GRANT_OPENED, seen);
}

static __always_inline void grant_closes(struct bpf_sock_ops *ctx, const struct origin *o)
{
	__u64 cookie = o->cookie;
	struct granted *found = bpf_map_lookup_elem(&granted, &cookie);
	__u16 seen = SEEN_NEVER;
	struct granted g;
	struct direct *d;

	if (!found)
		return;
	__builtin_memcpy(&g, found, sizeof(g));
	if (!forget_granted(cookie, g.workload))
		return; /* somebody else told of it */
	d = bpf_map_lookup_elem(&direct, &g.t);
	if (d && d->cookie == cookie) {
		seen = d->seen;
		if (seen == SEEN_REFUSED)
			forget_pending(&g.t, g.workload);
		forget_direct(&g.t);
	}
	if (!g.opened)
		count(STAT_GRANT_FAILED);
	tell(ctx, &g, cookie, g.opened ? GRANT_CLOSED : GRANT_FAILED, seen);
}

/* A listener of a workload closes. This runs before its port is free for others. */
static __always_inline void listener_closes(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	__u64 *n = bpf_map_lookup_elem(&closes, &netns);

	if (n)
		__sync_fetch_and_add(n, 1);
}
