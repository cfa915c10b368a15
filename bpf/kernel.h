/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * The few fields of kernel structs that the socket iterators read. The loader
 * relocates every access to the running kernel's layout by BTF (CO-RE), so
 * only names and types matter here, not offsets.
 */
#pragma once
#include <linux/in6.h>
#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	struct sock *skc_listener;
};

struct sock {
	struct sock_common __sk_common;
	int sk_rx_dst_ifindex; /* 5.17 and later */
	__u32 sk_mark;
};

struct tcp_sock {
	__u16 advmss;
};

/* Where sk_rx_dst_ifindex was before 5.17. */
struct inet_sock___old {
	int rx_dst_ifindex;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

#pragma clang attribute pop
