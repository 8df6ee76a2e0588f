/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a workload dials as if we were not here. */
#pragma once

#include "maps.h"

/* Each workload's excluded ports and networks. Written by the daemon before the workload is switched on; read by connect
 * for workloads with MEMBER_EXCLUDES. */
struct exclusion_key {
	__u32 prefixlen; /* EXCLUDED_PORT, or EXCLUDED_PORT and the length of the network's prefix in the 128-bit form */
	__u32 workload;
	__be16 port; /* 0: a network */
	__u16 pad;
	struct addr ip;
};

enum exclusion_bits {
	EXCLUDED_PORT = 64, /* workload, port and pad */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct exclusion_key);
	__type(value, __u32);
} exclusions SEC(".maps");

SHARED(enum, exclusion_bits);

static __always_inline int excluded(const struct addr *ip, __be16 port, __u32 workload)
{
	struct exclusion_key key = { .prefixlen = EXCLUDED_PORT, .workload = workload, .port = port };

	if (port && bpf_map_lookup_elem(&exclusions, &key))
		return 1;
	key.prefixlen = EXCLUDED_PORT + 128;
	key.port = 0;
	key.ip = *ip;
	return bpf_map_lookup_elem(&exclusions, &key) != 0;
}
