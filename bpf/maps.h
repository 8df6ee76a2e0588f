/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The maps, each with who writes and who reads it. "daemon" is userspace; "connect", "peername", "workload_sockops" and
 * "proxy_sockops" are the programs of outbound.c, "lookup" is that of inbound.c. ARCHITECTURE.md says what full means.
 * How grants work is in grant.h.
 */
#pragma once

#include "addr.h"

#define SECOND 1000000000ULL

/* What userspace must know too. */
enum constant {
	MAP_ABI = 3,	    /* raise it when a key, a value or a meaning changes: the pin directory carries it */
	STALE_SECONDS = 5,  /* heartbeat older than this: the daemon is gone or hung */
	HANDSHAKE_SECONDS = 130, /* the SYN-retry horizon: older entries of pending and direct are nobody's */
	GRANT_TARGETS = 4,  /* of one grant: a power of two */
	PLACE_BITS = 16,    /* of a half of a namespace's cookie, in struct place */
	PLACE_ALIGNED = 3,  /* bits in which contexts do not differ */
};

#define MAX_WORKLOADS 16384
#define MAX_DESTINATIONS 262144
#define MAX_PENDING 65536
#define MAX_PENDING_PER_WORKLOAD 16384
#define MAX_DIRECT 65536
#define MAX_DIRECT_PER_WORKLOAD 16384
#define MAX_GRANTS 262144
#define MAX_GRANTED 131072
#define MAX_GRANTED_PER_WORKLOAD 16384

/* Which workload a cgroup is. Written by the daemon, one write that switches all hooks of the cgroup; read by every
 * cgroup program. workload 0: attached but not enrolled, everything passes. */
enum member_flag {
	MEMBER_HAS_OUTER = 1,	/* an ancestor is enrolled too: leave a mark for it */
	MEMBER_HAS_INNER = 2,	/* a descendant is enrolled too: heed its mark */
	MEMBER_EXCLUDES = 4,	/* it has entries in exclusions (exclude.h) */
	MEMBER_OBSERVES = 8,	/* nothing is redirected or refused: what would be is reported */
};
struct membership {
	__u32 workload;
	__u32 flags;
};

struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_STORAGE);
	__type(key, __u64);
	__type(value, struct membership);
} memberships SEC(".maps");

/* The enrolled workloads. Written by the daemon; the counters by the programs that add and remove entries. */
struct workload {
	__s32 pending; /* entries of pending */
	__s32 direct;  /* entries of direct; the daemon's reaping may race with a program, so neither is exact */
	__u32 group;   /* the workloads of the same services are one group */
	__s32 granted; /* entries of granted */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_WORKLOADS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct workload);
} workloads SEC(".maps");

/* What is redirected. Written by the daemon; read by connect. */
struct destination_key {
	struct addr ip;
	__u32 workload; /* 0: for every workload */
	__be16 port;	/* 0: every port */
	__u16 pad;
};

enum dest_flag {
	DEST_INSTANCE = 1,	/* one instance's own address: on_failure = "open" may let it pass */
	DEST_PASS = 2,	/* not redirected, and not refused where only the mesh is open: port 0 is every port */
	DEST_REFUSE = 4,	/* hands out identities: consul_access = "refuse" */
};
struct destination {
	__u32 flags;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DESTINATIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct destination_key);
	__type(value, struct destination);
} destinations SEC(".maps");

/* What becomes of addresses that are not in destinations, by the longest prefix. Written by the daemon; read by connect. */
enum range_kind {
	RANGE_VIRTUAL = 1,	/* virtual IPs are given out of it: refused */
	RANGE_OUTSIDE = 2,	/* outside the mesh, and only the mesh is open: refused, but for DNS and the workload's own addresses */
	RANGE_OPEN = 3,	/* not refused for that */
};
struct range_key {
	__u32 prefixlen; /* of the 128-bit form */
	struct addr ip;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 64);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct range_key);
	__type(value, __u32);
} virtual_ranges SEC(".maps");

/* The networks whose plaintext a strict port takes (inbound.plaintext_from). Written by the daemon; read by lookup. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct range_key);
	__type(value, __u32);
} plaintext_from SEC(".maps");

/* Where a redirected connection was going and whose it is. */
enum origin_flag {
	ORIGIN_REDIRECTED = 1,	/* to the proxy */
	ORIGIN_PROBE = 2,	/* on an accepted socket: a prober's, which was going nowhere */
	ORIGIN_GRANTED = 4,	/* to the instance itself; none of them: the socket was only marked as seen by this workload */
};
struct origin {
	struct addr dst;
	__be16 dport;
	__u16 flags;
	__u32 workload;
	__u64 netns;
	__u64 cookie;
	__u32 pid;
	__u32 seconds; /* of the monotonic clock, when it was written */
	char comm[16];
	__u64 to;	 /* the destination's namespace: granted, or redirected there since the grant has ended; else 0 */
	__u32 device;	 /* granted: what the socket is bound to */
	__be16 key_port; /* granted: the port in the grant's key */
	__u16 pad;
	__u32 group; /* granted: of the workloads that may accept */
	__u32 pad2;
};

/* On the client's socket. Written by connect; read by connect, peername, workload_sockops. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} sk_out SEC(".maps");

/* On its way from the client's socket to the accepted one. Written by workload_sockops before the SYN leaves; moved by
 * proxy_sockops. Removed at the client's close if nothing accepted it. */
struct tuple {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u32 pad;
	__u64 netns; /* in pending: where the proxy accepts; in direct: the destination's */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PENDING);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, struct origin);
} pending SEC(".maps");

/* On the daemon's accepted socket. Written by proxy_sockops; read by the daemon through the file descriptor. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} sk_accepted SEC(".maps");

/* The namespaces in which the daemon listens. Written by the daemon; read by connect and lookup. */
struct ns_ready {
	__u16 port4; /* of the outbound listener on 127.0.0.1, host order; 0: none */
	__u16 port6; /* on ::1 */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_WORKLOADS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct ns_ready);
} ns_ready SEC(".maps");

/* The daemon's listeners. Written by the daemon, emptied by the kernel when a listener closes; read by lookup. */
enum listener_kind {
	LISTENER_OUTBOUND = 1,
	LISTENER_INBOUND = 2,
};
struct listener_key {
	__u64 netns;
	__u32 kind;
	__u32 family;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4 * MAX_WORKLOADS);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/* The program lookup, which the program of each namespace calls. Written by the daemon. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} guard SEC(".maps");

/* In which namespace a run of lookup is. Written by the program of the namespace just before it calls lookup: two halves of its
 * cookie, each in one word with how far the run's context is from here, by which lookup knows its own. */
struct place {
	__u64 low;
	__u64 high;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct place);
} places SEC(".maps");

/* What an inbound SYN meets. Written by the daemon; read by lookup. */
struct rule_key {
	__u64 netns;
	struct addr ip; /* all zero: any */
	__u16 port;	/* host order; 0: every port */
	__u16 pad[3];
};

enum rule_action {
	RULE_STEER = 1,	/* a mesh port: to our inbound listener */
	RULE_STRICT = 2,	/* plaintext is refused */
	RULE_PERMISSIVE = 3,	/* plaintext is let in, counted */
	RULE_OPEN = 4,	/* not ours */
	RULE_OBSERVE = 5,	/* plaintext is let in; reported as what strict would refuse */
};
struct rule {
	__u32 action;
	__u32 workload; /* for the verdict */
	__u32 group;	/* whose own calls pass */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DESTINATIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct rule_key);
	__type(value, struct rule);
} rules SEC(".maps");

/* Connections that pass a strict port, each by its exact 4-tuple. Written by proxy_sockops (delivery, checks) and
 * workload_sockops (the workload's own); read by lookup; removed when established or closed. */
enum direct_kind {
	DIRECT_DELIVERY = 1,	/* the proxy's own, authorised */
	DIRECT_CHECK = 2,	/* a health check of the daemon */
	DIRECT_OWN = 3,	/* the workload calling its own port */
	DIRECT_GRANTED = 4,	/* a workload calling an instance that it is granted */
	DIRECT_PROBE = 5,	/* a health check of the node's prober, by prober_sockops */
	DIRECT_PATH = 6,	/* the daemon finding out whether a 4-tuple arrives as it left: refused, and marked as seen */
	DIRECT_PATH_SEEN = 7,	/* in sk_peer only: it did */
};
enum direct_seen {
	SEEN_NEVER,
	SEEN_ADMITTED,
	SEEN_REFUSED, /* the grant had ended: it is the proxy's, or nobody's */
	SEEN_IMPOSTOR, /* what answered was not proved to be a workload that may */
};
struct direct {
	__u64 time;
	__u64 cookie; /* of the client's socket */
	__u32 workload;
	__u16 kind;
	__be16 peer_port; /* the client to show to the application; 0: none */
	struct addr peer; /* granted: what was dialled */
	__u64 from;	  /* granted: the client's namespace */
	__be16 key_port;  /* granted: the port in the grant's key */
	__u16 seen;	  /* written by lookup and, of an impostor, by workload_sockops */
	__u32 group;	  /* granted: of the workloads that may accept */
	__u32 listener;	  /* granted: the group of what the SYN reached; 0: no workload's. Written by its workload_sockops */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DIRECT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, struct direct);
} direct SEC(".maps");

/* On the proxy's dialling socket (written by the daemon before it connects) and on the application's accepted socket
 * (written by workload_sockops); read by proxy_sockops and peername. */
struct peer {
	struct addr ip;
	__be16 port; /* 0: nothing to show */
	__u16 kind;  /* DIRECT_* */
	__u32 workload;
	__u64 netns; /* of a path test: the destination's; its ip becomes the source address that the kernel chose */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct peer);
} sk_peer SEC(".maps");

/* What a workload in one of its namespaces may dial without the proxy. Written by the daemon; read by connect, and by lookup
 * at the other end. */
struct grant_key {
	struct addr ip; /* as dialled */
	__u64 netns;	/* the client's */
	__u32 workload;
	__be16 port; /* 0: every port */
	__u16 pad;
};
struct grant_target {
	struct addr ip;
	struct addr src; /* the client's address towards it */
	__u64 netns;
	__u64 closes; /* of its namespace, when the application was last seen listening */
	__be16 port;
	__u16 pad;
	__u32 group; /* of the workloads that may accept */
};
struct grant {
	__u64 not_after; /* ns since 1970: the end of the certificate that ends first */
	__u32 n;
	__u32 pad;
	struct grant_target target[GRANT_TARGETS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_GRANTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct grant_key);
	__type(value, struct grant);
} grants SEC(".maps");

/* How often a listener of a workload has closed in a namespace: what was seen listening there before may be somebody
 * else's port now. Entries are made by the daemon and counted up by workload_sockops; read by connect and lookup. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_WORKLOADS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u64);
} closes SEC(".maps");

/* Every connection on a grant, by its client's socket cookie, from before its SYN until it is closed: what a revocation
 * has to end. Written by workload_sockops; read and reaped by the daemon. */
struct granted {
	struct tuple t; /* netns: the destination's */
	struct addr dialled;
	__u64 netns;  /* the client's */
	__u64 opened; /* monotonic, ns; 0: not yet */
	__u32 workload;
	__u32 pid;
	__u32 device; /* what the client's socket is bound to */
	__be16 dialled_port;
	__u16 accepted; /* the destination's workload has it */
	char comm[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_GRANTED);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct granted);
} granted SEC(".maps");

/* The daemon's pulse. Written by the daemon every second; read by connect and lookup. */
struct heartbeat {
	__u64 beat; /* CLOCK_MONOTONIC, ns; 0: never */
	__u32 open; /* on_failure = "open" */
	__u32 next_workload;
	__s64 wall; /* CLOCK_REALTIME less CLOCK_BOOTTIME, ns */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct heartbeat);
} heartbeat SEC(".maps");

/* Verdicts of the kernel. Written by connect and lookup; read by the daemon. */
enum reason {
	REASON_NONE,
	REASON_UNKNOWN_SERVICE, /* in a virtual range, but no service's */
	REASON_BOUND_DEVICE,
	REASON_STALE,
	REASON_NOT_READY,
	REASON_UNKNOWN_WORKLOAD,
	REASON_CAPACITY,
	REASON_STORAGE,
	REASON_PLAINTEXT,
	REASON_NO_LISTENER,
	REASON_OUTSIDE_MESH, /* MeshDestinationsOnly */
	REASON_CONSUL_ACCESS,
};

enum event_flag {
	EVENT_INBOUND = 1,
	EVENT_ALLOWED = 2,
	EVENT_OBSERVED = 4, /* nothing was done: reason says what would have been refused, none what would have been redirected */
};
struct event {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u16 reason;
	__u16 flags;
	__u32 workload;
	__u32 pid;
	char comm[16];
};

/* What becomes of a connection on a grant. Written by workload_sockops into the same ring; its size tells it from an event. */
enum grant_stage {
	GRANT_OPENED = 1,
	GRANT_CLOSED = 2,
	GRANT_FAILED = 3, /* it was never established */
	GRANT_IMPOSTOR = 4, /* to be reset: it can neither send nor receive */
};
struct grant_event {
	struct addr src;
	struct addr dst;
	struct addr dialled;
	__be16 sport;
	__be16 dport;
	__be16 dialled_port;
	__u16 stage;
	__u64 from; /* the client's namespace */
	__u64 to;   /* the destination's */
	__u64 cookie;
	__u64 opened;	/* monotonic, ns */
	__u64 sent;	/* the client's bytes */
	__u64 received; /* the destination's */
	__u32 rtt_us;
	__u32 workload;
	__u32 pid;
	__u16 seen; /* enum direct_seen */
	__u16 pad;
	__u32 device; /* what the client's socket is bound to */
	__u32 pad2;
	char comm[16];
};

#define EVENTS_SIZE (1 << 20)
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_SIZE);
} events SEC(".maps");

/* Counters. Written by all programs; read by the daemon. */
enum stat {
	STAT_REDIRECTED,
	STAT_REFUSED,
	STAT_STEERED,
	STAT_DELIVERED,
	STAT_PLAINTEXT_REFUSED,
	STAT_PLAINTEXT_ALLOWED,
	STAT_FAILED_OPEN,
	STAT_UNPROTECTED_UDP,
	STAT_EVENTS_LOST,
	STAT_PROBED,
	STAT_GRANTED,
	STAT_GRANT_FAILED,
	STAT_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STAT_MAX);
	__type(key, __u32);
	__type(value, __u64);
} stats SEC(".maps");

/* Keeps the types that userspace shares in the object's BTF. */
#define SHARED(kind, name) const kind name *btf_##name __attribute__((unused))
SHARED(enum, constant);
SHARED(enum, reason);
SHARED(enum, stat);
SHARED(enum, member_flag);
SHARED(enum, dest_flag);
SHARED(enum, range_kind);
SHARED(enum, origin_flag);
SHARED(enum, listener_kind);
SHARED(enum, rule_action);
SHARED(enum, direct_kind);
SHARED(enum, event_flag);
SHARED(enum, direct_seen);
SHARED(enum, grant_stage);
SHARED(struct, event);
SHARED(struct, grant_event);

static __always_inline void count(__u32 which)
{
	__u64 *n = bpf_map_lookup_elem(&stats, &which);

	if (n)
		*n += 1;
}

/* Whether the daemon has not been seen alive for STALE_SECONDS; *open is set when that lets traffic pass. */
static __always_inline int heartbeat_stale(int *open)
{
	__u32 zero = 0;
	struct heartbeat *h = bpf_map_lookup_elem(&heartbeat, &zero);
	__u64 beat;

	if (!h)
		return 1;
	*open = h->open;
	beat = READ(h->beat);
	/* A beat written after it was read here, but before the clock is, must not look like one from the future. */
	return !beat || (__s64)(bpf_ktime_get_ns() - beat) > (__s64)(STALE_SECONDS * SECOND);
}
