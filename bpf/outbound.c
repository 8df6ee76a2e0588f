// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The cgroup hooks. connect, peername and workload_sockops are attached to each workload's cgroup, proxy_sockops to the
 * daemon's own. Loaded once for the node: which workload a hook runs for is in the storage of the cgroup it is attached to.
 */
#include "exclude.h"
#include "grant_dial.h"
#include "grant_sockops.h"

#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262
#define ECONNREFUSED 111

#define CONTINUE 1
#define REFUSE 0

/* --- connect ------------------------------------------------------------------------------------------------------ */

/* Forgets an older origin of a reused socket, and tells an outer workload that this one has decided. */
static __always_inline int mark(struct bpf_sock *sk, const struct membership *m)
{
	struct origin *o;

	if (!(m->flags & MEMBER_HAS_OUTER)) {
		bpf_sk_storage_delete(&sk_out, sk);
		return 1;
	}
	o = bpf_sk_storage_get(&sk_out, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!o)
		return 0;
	o->workload = m->workload;
	o->flags = 0;
	return 1;
}

static __always_inline void report(const struct membership *m, const struct dial *d, __u16 reason, __u16 flags)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(STAT_EVENTS_LOST);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->dst = d->dst;
	e->dport = d->port;
	e->reason = reason;
	e->flags = flags;
	e->workload = m->workload;
	e->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	bpf_ringbuf_submit(e, 0);
}

static __always_inline int refuse(struct bpf_sock *sk, const struct membership *m, const struct dial *d, __u16 reason)
{
	mark(sk, m); /* else the outer workload would refuse it again, in its own name */
	count(STAT_REFUSED);
	bpf_set_retval(-ECONNREFUSED);
	report(m, d, reason, 0);
	return REFUSE;
}

static __always_inline struct destination *find_destination(const struct dial *d, __u32 workload)
{
	struct destination_key key = { .ip = d->dst, .workload = workload, .port = d->port };
	struct destination *dest = bpf_map_lookup_elem(&destinations, &key);

	if (dest)
		return dest;
	key.workload = 0;
	dest = bpf_map_lookup_elem(&destinations, &key);
	if (dest)
		return dest;
	key.port = 0;
	return bpf_map_lookup_elem(&destinations, &key);
}

/* Why d, which is no destination, is refused; REASON_NONE lets it pass. */
static __always_inline __u16 refused_range(const struct dial *d, __u32 workload)
{
	struct range_key key = { .prefixlen = 128, .ip = d->dst };
	struct destination_key own = { .ip = d->dst, .workload = workload };
	__u32 *kind = bpf_map_lookup_elem(&virtual_ranges, &key);

	if (!kind)
		return REASON_NONE;
	if (*kind == RANGE_VIRTUAL)
		return REASON_UNKNOWN_SERVICE; /* one that was given back must not leave the node */
	if (*kind != RANGE_OUTSIDE || d->port == bpf_htons(53))
		return REASON_NONE; /* DNS over UDP passes too */
	return bpf_map_lookup_elem(&destinations, &own) ? REASON_NONE : REASON_OUTSIDE_MESH;
}

/* Whether a nearer enrolment has already decided on this socket: inner programs run first and leave a mark. */
static __always_inline int decided_by_inner(struct bpf_sock *sk, const struct membership *m)
{
	struct origin *o;

	if (!(m->flags & MEMBER_HAS_INNER))
		return 0;
	o = bpf_sk_storage_get(&sk_out, sk, 0, 0);
	if (!o || o->workload == m->workload)
		return 0;
	return bpf_map_lookup_elem(&workloads, &o->workload) != 0;
}

/* Lets the socket connect as if we were not here. */
static __always_inline int pass(struct bpf_sock *sk, const struct membership *m)
{
	return mark(sk, m) ? CONTINUE : REFUSE; /* without the mark the outer workload would claim the socket */
}

/* Decides on one connect. Returns 1 when d was changed to where it goes instead, else 0 with *verdict. */
static __always_inline int decide(struct bpf_sock_addr *ctx, struct bpf_sock *sk, struct dial *d, int *verdict)
{
	struct membership *m = bpf_get_local_storage(&memberships, 0);
	struct destination *dest;
	struct workload *w;
	struct ns_ready *ns;
	struct origin *o;
	__u32 device, id;
	__u64 netns;
	__u16 port, reason;
	int open = 0;

	*verdict = CONTINUE;
	id = m->workload;
	if (!id || decided_by_inner(sk, m))
		return 0;
	if ((m->flags & MEMBER_EXCLUDES) && excluded(&d->dst, d->port, id)) {
		*verdict = pass(sk, m);
		return 0; /* its label says so */
	}
	dest = find_destination(d, id);
	reason = dest ? REASON_NONE : refused_range(d, id);
	if (m->flags & MEMBER_OBSERVES) {
		if (reason || (dest && !(dest->flags & DEST_PASS)))
			report(m, d, dest && (dest->flags & DEST_REFUSE) ? REASON_CONSUL_ACCESS : reason, EVENT_OBSERVED);
		*verdict = pass(sk, m);
		return 0; /* it is only watched */
	}
	if (reason) {
		*verdict = refuse(sk, m, d, reason);
		return 0; /* nothing of the mesh's, and not to leave the node */
	}
	if (!dest || (dest->flags & DEST_PASS)) {
		*verdict = pass(sk, m);
		return 0; /* not ours */
	}
	if (dest->flags & DEST_REFUSE) {
		*verdict = refuse(sk, m, d, REASON_CONSUL_ACCESS);
		return 0; /* an agent's port, from which it would get any identity */
	}
	if (heartbeat_stale(&open)) {
		if (open && (dest->flags & DEST_INSTANCE)) {
			count(STAT_FAILED_OPEN);
			*verdict = pass(sk, m);
			return 0; /* on_failure = "open" */
		}
		*verdict = refuse(sk, m, d, REASON_STALE);
		return 0; /* nobody would serve the redirected connection */
	}
	w = bpf_map_lookup_elem(&workloads, &id);
	if (!w) {
		*verdict = refuse(sk, m, d, REASON_UNKNOWN_WORKLOAD);
		return 0; /* being un-enrolled */
	}
	o = bpf_sk_storage_get(&sk_out, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!o) {
		*verdict = refuse(sk, m, d, REASON_STORAGE);
		return 0; /* no memory for the origin */
	}
	netns = bpf_get_netns_cookie(ctx);
	o->dst = d->dst;
	o->dport = d->port;
	o->workload = id;
	o->netns = netns;
	o->cookie = bpf_get_socket_cookie(ctx);
	o->seconds = bpf_ktime_get_ns() / SECOND;
	o->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(o->comm, sizeof(o->comm));
	o->to = 0;
	if (direct_target(ctx, sk, d, netns, w, o)) {
		o->flags = ORIGIN_GRANTED;
		return 1;
	}
	o->flags = ORIGIN_REDIRECTED;
	device = READ(sk->bound_dev_if);
	if (device > 1) {
		*verdict = refuse(sk, m, d, REASON_BOUND_DEVICE);
		return 0; /* bound to another device than lo: loopback is out of reach */
	}
	ns = bpf_map_lookup_elem(&ns_ready, &netns);
	port = ns ? (d->v4 ? ns->port4 : ns->port6) : 0;
	if (!port) {
		*verdict = refuse(sk, m, d, REASON_NOT_READY);
		return 0; /* no listener in this namespace yet */
	}
	if (w->pending >= MAX_PENDING_PER_WORKLOAD) {
		*verdict = refuse(sk, m, d, REASON_CAPACITY);
		return 0; /* too many of its connections are on their way to us */
	}
	if (d->v4)
		addr_v4(&d->dst, bpf_htonl(0x7f000001));
	else
		addr_v6(&d->dst, 0, 0, 0, bpf_htonl(1));
	d->port = bpf_htons(port);
	count(STAT_REDIRECTED);
	return 1;
}

static __always_inline int is_tcp(__u32 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct dial d = { .v4 = 1 };
	int verdict;

	if (!is_tcp(READ(ctx->protocol)) || !sk)
		return CONTINUE; /* UDP and the rest are not ours */
	addr_v4(&d.dst, READ(ctx->user_ip4));
	d.port = READ(ctx->user_port);
	if (!decide(ctx, sk, &d, &verdict))
		return verdict;
	ctx->user_ip4 = d.dst.w[3];
	ctx->user_port = d.port;
	return CONTINUE;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct dial d = {};
	int verdict;

	if (!is_tcp(READ(ctx->protocol)) || !sk)
		return CONTINUE; /* UDP and the rest are not ours */
	addr_v6(&d.dst, READ(ctx->user_ip6[0]), READ(ctx->user_ip6[1]), READ(ctx->user_ip6[2]), READ(ctx->user_ip6[3]));
	d.port = READ(ctx->user_port);
	d.v4 = addr_is_v4(&d.dst);
	if (!decide(ctx, sk, &d, &verdict))
		return verdict;
	ctx->user_ip6[0] = d.dst.w[0];
	ctx->user_ip6[1] = d.dst.w[1];
	ctx->user_ip6[2] = d.dst.w[2];
	ctx->user_ip6[3] = d.dst.w[3];
	ctx->user_port = d.port;
	return CONTINUE;
}

#include "peername.h"

/* --- sockops ------------------------------------------------------------------------------------------------------ */

/* Whether a connection that is not redirected goes to a guarded port of this very namespace. Guards are found by port: an
 * announcement that no SYN here matches admits nothing. */
static __always_inline int guarded_and_own(const struct tuple *t)
{
	struct rule_key key = { .netns = t->netns, .port = bpf_ntohs(t->dport) };

	if (!addr_equal(&t->src, &t->dst) && !addr_is_loopback(&t->dst))
		return 0;
	if (bpf_map_lookup_elem(&rules, &key))
		return 1;
	key.port = 0;
	return !addr_is_loopback(&t->dst) && bpf_map_lookup_elem(&rules, &key);
}

/* The workload dials: its origin must be in pending before the SYN leaves. */
static __always_inline void workload_connects(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u32 id)
{
	struct peer own = { .kind = DIRECT_OWN, .workload = id };
	struct origin *o = bpf_sk_storage_get(&sk_out, sk, 0, 0);
	struct workload *w;
	struct tuple t;

	if (o && o->workload != id)
		return; /* a nearer enrolment's */
	read_tuple(ctx, &t, 0);
	if (o && o->flags & ORIGIN_GRANTED) {
		grant_connects(ctx, &t, o);
		return;
	}
	if (!o || !(o->flags & ORIGIN_REDIRECTED)) {
		if (guarded_and_own(&t))
			announce(ctx, &t, &own);
		return;
	}
	w = bpf_map_lookup_elem(&workloads, &id);
	if (!w || bpf_map_update_elem(&pending, &t, o, BPF_NOEXIST))
		return; /* full: the accepted socket has no origin and is refused */
	__sync_fetch_and_add(&w->pending, 1);
	watch_close(ctx);
}

/* The application accepts: learn the client behind the proxy. */
static __always_inline void workload_accepts(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct granted *g;
	struct direct *d;
	struct peer *p;
	struct tuple t;
	__u64 cookie;

	read_tuple(ctx, &t, 1);
	d = bpf_map_lookup_elem(&direct, &t);
	if (!d)
		return;
	if (d->kind == DIRECT_GRANTED) {
		cookie = d->cookie;
		g = bpf_map_lookup_elem(&granted, &cookie);
		if (g)
			g->accepted = 1;
	} else if (d->peer_port) {
		p = bpf_sk_storage_get(&sk_peer, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (p) {
			p->ip = d->peer;
			p->port = d->peer_port;
		}
	}
	forget_direct(&t);
}

/* A socket of the workload is closed: nothing of it remains in the maps. */
static __always_inline void workload_closes(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct origin *o;
	struct tuple t;

	if (READ(ctx->args[0]) == BPF_TCP_LISTEN) {
		listener_closes(ctx);
		return;
	}
	o = bpf_sk_storage_get(&sk_out, sk, 0, 0);
	if (o && o->flags & ORIGIN_GRANTED) {
		grant_closes(ctx, o);
		return;
	}
	read_tuple(ctx, &t, 0);
	if (o && (o->flags & ORIGIN_REDIRECTED)) {
		if (o->to)
			t.netns = o->to;
		forget_pending(&t, o->workload);
		if (!o->to)
			return;
	}
	forget_direct(&t);
}

SEC("sockops")
int workload_sockops(struct bpf_sock_ops *ctx)
{
	struct membership *m = bpf_get_local_storage(&memberships, 0);
	struct bpf_sock *sk = ctx->sk;
	__u32 op = READ(ctx->op);
	struct origin *o;

	if (!m->workload)
		return 1;
	if (!sk) {
		if (op == BPF_SOCK_OPS_RWND_INIT) /* of a request, which is no socket yet */
			grant_reaches(ctx, m->workload);
		return 1;
	}
	switch (op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		workload_connects(ctx, sk, m->workload);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		o = bpf_sk_storage_get(&sk_out, sk, 0, 0);
		if (o && o->flags & ORIGIN_GRANTED)
			grant_opens(ctx, o);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		workload_accepts(ctx, sk);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		watch_close(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (READ(ctx->args[1]) == BPF_TCP_CLOSE)
			workload_closes(ctx, sk);
		break;
	}
	return 1;
}

#include "prober.h"

SEC("sockops")
int proxy_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct origin *from, *to;
	struct direct *d;
	struct peer *p;
	struct tuple t;

	if (!sk)
		return 1;
	switch (READ(ctx->op)) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		p = bpf_sk_storage_get(&sk_peer, sk, 0, 0);
		if (!p)
			break; /* towards another node */
		read_tuple(ctx, &t, 0);
		if (p->kind == DIRECT_PATH) {
			t.netns = p->netns;
			p->ip = t.src;
		}
		announce(ctx, &t, p);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		read_tuple(ctx, &t, 1);
		from = bpf_map_lookup_elem(&pending, &t);
		if (!from) {
			proxy_accepts_probe(sk, &t);
			break; /* inbound, or nobody we redirected */
		}
		to = bpf_sk_storage_get(&sk_accepted, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (to)
			__builtin_memcpy(to, from, sizeof(*to));
		if (from->to)
			forget_direct(&t);
		forget_pending(&t, from->workload);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (READ(ctx->args[1]) != BPF_TCP_CLOSE)
			break;
		p = bpf_sk_storage_get(&sk_peer, sk, 0, 0);
		if (!p)
			break;
		read_tuple(ctx, &t, 0);
		if (p->kind == DIRECT_PATH) {
			t.netns = p->netns;
			d = bpf_map_lookup_elem(&direct, &t);
			if (d && d->seen)
				p->kind = DIRECT_PATH_SEEN;
		}
		forget_direct(&t);
		break;
	}
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
