// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What an inbound SYN meets in a network namespace. The hook cannot ask in which one it runs: what is attached to a namespace,
 * for as long as a workload lives in it, is a program of a few instructions that notes which it is, and calls this one.
 */
#include "grant.h"

#define IPPROTO_TCP 6

volatile const __u64 home; /* the node's own namespace; in others loopback is inside the workload's trust boundary */

struct flow {
	struct tuple t; /* src: the client, dst: the address it dialled */
	__u32 family;
	__u16 port; /* dialled, host order */
};

/* Which namespace this run is in, 0 if another run came in between on the same processor. Then the context in one of the halves is
 * that run's, which is on another stack, or elsewhere on the same. */
static __always_inline __u64 find_namespace(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;
	struct place *p = bpf_map_lookup_elem(&places, &zero);
	__u64 low, high, context;

	if (!p)
		return 0;
	context = ((__u64)ctx - (__u64)p) >> PLACE_ALIGNED << PLACE_BITS;
	low = READ(p->low) ^ context;
	high = READ(p->high) ^ context;
	return (low | high) >> PLACE_BITS ? 0 : high << PLACE_BITS | low;
}

static __always_inline void read_flow(struct bpf_sk_lookup *ctx, struct flow *f)
{
	__be32 src4 = READ(ctx->remote_ip4), dst4 = READ(ctx->local_ip4);

	__builtin_memset(f, 0, sizeof(*f));
	f->family = READ(ctx->family);
	f->port = READ(ctx->local_port);
	f->t.netns = find_namespace(ctx);
	f->t.dport = bpf_htons(f->port);
	f->t.sport = READ(ctx->remote_port);
	addr_v6(&f->t.src, READ(ctx->remote_ip6[0]), READ(ctx->remote_ip6[1]), READ(ctx->remote_ip6[2]),
		READ(ctx->remote_ip6[3]));
	addr_v6(&f->t.dst, READ(ctx->local_ip6[0]), READ(ctx->local_ip6[1]), READ(ctx->local_ip6[2]),
		READ(ctx->local_ip6[3]));
	if (f->family == AF_INET) {
		addr_v4(&f->t.src, src4);
		addr_v4(&f->t.dst, dst4);
	}
}

static __always_inline void report(const struct flow *f, const struct rule *r, __u16 reason, __u16 flags)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(STAT_EVENTS_LOST);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->src = f->t.src;
	e->dst = f->t.dst;
	e->sport = f->t.sport;
	e->dport = f->t.dport;
	e->reason = reason;
	e->flags = EVENT_INBOUND | flags;
	e->workload = r ? r->workload : 0;
	bpf_ringbuf_submit(e, 0);
}

/* Hands the SYN to our listener, or drops it: a stranger bound to that port must never get it. */
static __always_inline int steer(struct bpf_sk_lookup *ctx, const struct flow *f, const struct rule *r, __u32 kind)
{
	struct listener_key key = { .netns = f->t.netns, .kind = kind, .family = f->family };
	struct bpf_sock *sk;
	int open, err;

	if (heartbeat_stale(&open)) {
		report(f, r, REASON_STALE, 0);
		return SK_DROP; /* a hung daemon would let the connection wait for ever */
	}
	sk = bpf_map_lookup_elem(&listeners, &key);
	if (!sk) {
		report(f, r, REASON_NO_LISTENER, 0);
		return SK_DROP; /* the daemon is gone */
	}
	err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (err) {
		report(f, r, REASON_NO_LISTENER, 0);
		return SK_DROP; /* the listener is closing */
	}
	count(STAT_STEERED);
	return SK_PASS;
}

static __always_inline int our_outbound_port(const struct flow *f)
{
	__u64 cookie = f->t.netns;
	struct ns_ready *ns = bpf_map_lookup_elem(&ns_ready, &cookie);

	if (!ns || f->port != (f->family == AF_INET ? ns->port4 : ns->port6))
		return 0;
	return f->family == AF_INET ? f->t.dst.w[3] == bpf_htonl(0x7f000001) : addr_is_loopback(&f->t.dst);
}

/* The rule of the port at its address goes first, then that of the port, then that of the namespace. The first is looked for
 * again before another one is believed: it is written before those, and removed after them, by whoever takes a port over. */
static __always_inline struct rule *find_rule(const struct flow *f)
{
	struct rule_key exact = { .netns = f->t.netns, .ip = f->t.dst, .port = f->port };
	struct rule_key key = { .netns = f->t.netns, .port = f->port };
	struct rule *r = bpf_map_lookup_elem(&rules, &exact), *wide;

	if (r)
		return r;
	wide = bpf_map_lookup_elem(&rules, &key);
	if (!wide) {
		key.port = 0;
		wide = bpf_map_lookup_elem(&rules, &key);
	}
	if (!wide)
		return 0;
	r = bpf_map_lookup_elem(&rules, &exact);
	return r ? r : wide;
}

/* Whether the grant that sent a connection here still stands and leads here. */
static __always_inline int granted_here(const struct flow *f, const struct direct *d)
{
	struct grant_key key = { .ip = d->peer, .netns = d->from, .workload = d->workload, .port = d->key_port };
	struct grant *g;
	int open;
	__u32 i;

	if (heartbeat_stale(&open))
		return 0;
	g = bpf_map_lookup_elem(&grants, &key);
	if (!g || !grant_valid(g))
		return 0;
	for (i = 0; i < GRANT_TARGETS; i++) {
		struct grant_target *t = &g->target[i];

		if (i < g->n && t->netns == f->t.netns && t->port == f->t.dport && addr_equal(&t->ip, &f->t.dst))
			return still_listening(t);
	}
	return 0;
}

enum admission {
	ADMIT_UNKNOWN,	/* nobody announced it */
	ADMIT_PASS,
	ADMIT_PROBE,	/* a prober */
	ADMIT_PATH,	/* a path test, which is refused */
	ADMIT_ENDED,	/* by a grant that has just ended */
};

/* Whether exactly this connection was announced by the socket that opens it. The entry stays until it is established: the
 * last ACK of a handshake with SYN cookies is looked up again. */
static __always_inline enum admission announced(const struct flow *f, const struct rule *r)
{
	struct direct *d = bpf_map_lookup_elem(&direct, &f->t);
	struct workload *w;

	if (!d || bpf_ktime_get_ns() - d->time > HANDSHAKE_SECONDS * SECOND)
		return ADMIT_UNKNOWN;
	switch (d->kind) {
	case DIRECT_PATH:
		d->seen = SEEN_ADMITTED;
		return ADMIT_PATH;
	case DIRECT_PROBE:
		return ADMIT_PROBE;
	case DIRECT_GRANTED:
		d->listener = 0; /* to be proved again */
		if (d->seen != SEEN_REFUSED) /* which may be the proxy's by now */
			d->seen = granted_here(f, d) ? SEEN_ADMITTED : SEEN_REFUSED;
		return d->seen == SEEN_ADMITTED ? ADMIT_PASS : ADMIT_ENDED;
	case DIRECT_OWN:
		if (f->t.netns != home)
			return ADMIT_PASS;
		w = bpf_map_lookup_elem(&workloads, &d->workload);
		/* in the node's namespace a workload passes to its own service's port only */
		return w && w->group == r->group ? ADMIT_PASS : ADMIT_UNKNOWN;
	}
	return ADMIT_PASS;
}

/* Makes a connection whose grant ended while its SYN was under way one that connect had redirected: the proxy decides. */
static __always_inline int redirect(const struct flow *f)
{
	struct direct *d = bpf_map_lookup_elem(&direct, &f->t);
	struct origin o = { .flags = ORIGIN_REDIRECTED, .to = f->t.netns };
	struct origin *before = bpf_map_lookup_elem(&pending, &f->t);
	struct workload *w;
	struct granted *g;
	__u64 cookie;

	if (!d)
		return 0;
	if (before) /* the SYN was sent again, or this answers a SYN cookie */
		return before->cookie == d->cookie;
	o.dst = d->peer;
	o.dport = d->peer_port;
	o.workload = d->workload;
	o.netns = d->from;
	o.cookie = cookie = d->cookie;
	o.seconds = bpf_ktime_get_ns() / SECOND;
	g = bpf_map_lookup_elem(&granted, &cookie);
	w = bpf_map_lookup_elem(&workloads, &o.workload);
	if (!g || !w || w->pending >= MAX_PENDING_PER_WORKLOAD)
		return 0;
	o.pid = g->pid;
	__builtin_memcpy(o.comm, g->comm, sizeof(o.comm));
	if (bpf_map_update_elem(&pending, &f->t, &o, BPF_NOEXIST))
		return 0;
	__sync_fetch_and_add(&w->pending, 1);
	return 1;
}

static __always_inline int may_be_plaintext(const struct flow *f, const struct rule *r)
{
	struct range_key key = { .prefixlen = 128, .ip = f->t.src };

	return r->action == RULE_PERMISSIVE || bpf_map_lookup_elem(&plaintext_from, &key);
}

SEC("sk_lookup")
int lookup(struct bpf_sk_lookup *ctx)
{
	struct flow f;
	struct rule *r;
	enum admission admission;
	int open = 0;

	read_flow(ctx, &f);
	if (!f.t.netns) {
		report(&f, 0, REASON_NO_LISTENER, 0);
		return SK_DROP; /* its packet comes again */
	}
	if (READ(ctx->protocol) != IPPROTO_TCP) {
		r = find_rule(&f);
		if (r && r->action != RULE_OPEN && !addr_is_loopback(&f.t.dst))
			count(STAT_UNPROTECTED_UDP);
		return SK_PASS; /* UDP is not ours */
	}
	if (our_outbound_port(&f))
		return steer(ctx, &f, 0, LISTENER_OUTBOUND);
	r = find_rule(&f);
	if (!r || r->action == RULE_OPEN)
		return SK_PASS; /* no workload's port */
	if (r->action == RULE_STEER)
		return steer(ctx, &f, r, LISTENER_INBOUND);
	if (f.t.netns != home && addr_is_loopback(&f.t.dst))
		return SK_PASS; /* the workload talks to itself */
	admission = announced(&f, r);
	if (admission == ADMIT_PASS || admission == ADMIT_PROBE) {
		count(admission == ADMIT_PROBE ? STAT_PROBED : STAT_DELIVERED);
		return SK_PASS;
	}
	if (admission == ADMIT_PATH)
		return SK_DROP;
	if (admission == ADMIT_ENDED)
		return redirect(&f) ? steer(ctx, &f, r, LISTENER_OUTBOUND) : SK_DROP;
	if (r->action == RULE_OBSERVE) {
		if (!may_be_plaintext(&f, r))
			report(&f, r, REASON_PLAINTEXT, EVENT_OBSERVED);
		return SK_PASS; /* its workload is only watched */
	}
	if (may_be_plaintext(&f, r)) {
		count(STAT_PLAINTEXT_ALLOWED);
		report(&f, r, REASON_PLAINTEXT, EVENT_ALLOWED);
		return SK_PASS;
	}
	if (heartbeat_stale(&open) && open) {
		count(STAT_FAILED_OPEN);
		report(&f, r, REASON_STALE, EVENT_ALLOWED);
		return SK_PASS; /* on_failure = "open" */
	}
	count(STAT_PLAINTEXT_REFUSED);
	report(&f, r, REASON_PLAINTEXT, 0);
	return SK_DROP; /* plaintext to a strict port */
}

char _license[] SEC("license") = "Dual BSD/GPL";
