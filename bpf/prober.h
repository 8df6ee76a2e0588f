/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The node's probers: the Consul agent and whoever else checks applications by connecting to them. prober_sockops is
 * attached to their cgroups. Part of outbound.c, whose helpers it uses.
 */
#pragma once

#define MAX_PROBES 65536

/* The places that probers check. Written by the daemon; read by prober_sockops. */
struct probe_key {
	struct addr ip;
	__be16 port;
	__u16 pad;
};
struct probe {
	__u64 netns;	/* of the workload that has the address */
	__u32 workload; /* on whose account the announcement goes */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROBES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct probe_key);
	__type(value, struct probe);
} probes SEC(".maps");

/* Where the node's address translation leads what is dialled at a place that probers check. Written by the daemon; read by prober_sockops. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROBES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct probe_key);
	__type(value, struct probe_key);
} mapped_probes SEC(".maps");

/* What of a prober's connection is announced, or 0. t is completed: its namespace and address are where it arrives. */
static __always_inline struct probe *find_probe(struct bpf_sock_ops *ctx, struct tuple *t)
{
	struct probe_key key = {}, *led;
	struct probe *p;

	read_tuple(ctx, t, 0);
	key.ip = t->dst;
	key.port = t->dport;
	p = bpf_map_lookup_elem(&probes, &key);
	if (!p || (addr_is_loopback(&t->dst) && p->netns != t->netns))
		return 0; /* another namespace's loopback */
	t->netns = p->netns;
	led = bpf_map_lookup_elem(&mapped_probes, &key);
	if (led) {
		t->dst = led->ip;
		t->dport = led->port;
	}
	return p;
}

/* A connect hook is not needed: the address is the one that the SYN goes to, whatever others made of what was dialled. */
SEC("sockops")
int prober_sockops(struct bpf_sock_ops *ctx)
{
	struct peer own = { .kind = DIRECT_PROBE };
	struct probe *p;
	struct tuple t;

	switch (READ(ctx->op)) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		p = find_probe(ctx, &t);
		if (!p)
			break; /* not registered: as anybody's */
		own.workload = p->workload;
		announce(ctx, &t, &own);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (READ(ctx->args[1]) == BPF_TCP_CLOSE && find_probe(ctx, &t))
			forget_direct(&t);
		break;
	}
	return 1;
}

/* A probe of a mesh port is answered by the proxy: its socket is marked, and it learns nothing but that somebody listens. */
static __always_inline void proxy_accepts_probe(struct bpf_sock *sk, const struct tuple *t)
{
	struct direct *d = bpf_map_lookup_elem(&direct, t);
	struct origin *o;

	if (!d || d->kind != DIRECT_PROBE)
		return;
	o = bpf_sk_storage_get(&sk_accepted, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (o)
		o->flags = ORIGIN_PROBE;
	count(STAT_PROBED);
	forget_direct(t);
}
