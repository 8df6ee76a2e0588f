/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One form for every address: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10

#define MAPPED_PREFIX bpf_htonl(0xffff)

struct addr {
	__be32 w[4];
};

/* Clang merges neighbouring context loads into one the verifier refuses: read each field once, through here. */
#define READ(field) (*(volatile typeof(field) *)&(field))

static __always_inline void addr_v4(struct addr *a, __be32 ip)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = MAPPED_PREFIX;
	a->w[3] = ip;
}

static __always_inline void addr_v6(struct addr *a, __be32 w0, __be32 w1, __be32 w2, __be32 w3)
{
	a->w[0] = w0;
	a->w[1] = w1;
	a->w[2] = w2;
	a->w[3] = w3;
}

static __always_inline int addr_is_v4(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == MAPPED_PREFIX;
}

static __always_inline int addr_equal(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

/* 127.0.0.0/8 or ::1 */
static __always_inline int addr_is_loopback(const struct addr *a)
{
	if (addr_is_v4(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && a->w[3] == bpf_htonl(1);
}
