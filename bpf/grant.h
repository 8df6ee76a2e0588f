/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The path within a node that does not pass the proxy. connect sends a workload to an instance that it is granted;
 * workload_sockops announces the connection by its exact 4-tuple before the SYN leaves; lookup in the instance's namespace
 * admits that 4-tuple if the grant still stands, and else hands it to the proxy. Without a grant, or with any doubt, that is the way.
 */
#pragma once

#include "maps.h"

/* Of the kernel's own, found by its BTF. */
struct sock_common {
	unsigned long skc_flags;
} __attribute__((preserve_access_index));
struct tcp_sock {
	_Bool is_mptcp;
	__u64 bytes_sent;
	__u64 bytes_retrans;
	__u64 bytes_received;
} __attribute__((preserve_access_index));
#define SOCK_DONE 1 /* of enum sock_flags: the peer's FIN has come */

/* Whether a grant is in force at this moment by the wall clock, which the daemon relates to the kernel's every second. */
static __always_inline int grant_valid(const struct grant *g)
{
	__u32 zero = 0;
	struct heartbeat *h = bpf_map_lookup_elem(&heartbeat, &zero);

	return h && (__s64)bpf_ktime_get_boot_ns() + h->wall < (__s64)g->not_after;
}

/* Whether no listener has closed where the application was seen listening. */
static __always_inline int still_listening(const struct grant_target *t)
{
	__u64 netns = t->netns;
	__u64 *n = bpf_map_lookup_elem(&closes, &netns);

	return n && *n == t->closes;
}
