/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Parses an Ethernet frame down to its TCP header. */
#pragma once
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include "maps.h"

#define AF_INET 2
#define AF_INET6 10

#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET 0x1fff
#define IP6_MORE_FRAGMENTS 0x0001
#define IP6_OFFSET 0xfff8
#define MAX_EXTENSION_HEADERS 8

struct packet {
	struct bpf_sock_tuple tuple; /* source and destination as in the packet */
	__u8 v6;
	__u8 syn; /* SYN without ACK: begins a connection */
	__u8 fragment;
	__u8 data; /* carries payload, or is a first fragment whose rest may */
};

enum parsed {
	NOT_TCP,
	IS_TCP,
	MALFORMED, /* cannot be judged, so must not pass */
};

static __always_inline void read_tcp(struct __sk_buff *skb, struct packet *p, const struct tcphdr *th, __u32 offset)
{
	p->syn = th->syn && !th->ack;
	p->data = p->fragment || skb->len > offset + th->doff * 4;
}

/* tuple_len is computed, not stored: the verifier must see a constant. */
static __always_inline __u32 tuple_len(const struct packet *p)
{
	return p->v6 ? sizeof(p->tuple.ipv6) : sizeof(p->tuple.ipv4);
}

/* is_tunnel: IP, or Ethernet, in IP. The node might unpack it, and TCP in it
 * would have passed unseen. */
static __always_inline int is_tunnel(__u8 protocol)
{
	return protocol == IPPROTO_IPIP || protocol == IPPROTO_IPV6 || protocol == IPPROTO_GRE || protocol == IPPROTO_MPLS;
}

/* parse_ipv6_extensions finds TCP behind extension headers (RFC 8200 section
 * 4). It loads byte by byte, which is slow and rare. Not inlined: that would
 * double the size of every program. */
static __noinline int parse_ipv6_extensions(struct __sk_buff *skb, struct packet *p)
{
	__u32 offset = ETH_HLEN + sizeof(struct ipv6hdr);
	struct tcphdr th;
	struct {
		__u8 next, len;
		__be16 fragment;
	} h;
	__u8 next;

	if (!p)
		return MALFORMED;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, nexthdr), &next, 1))
		return MALFORMED;
	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		switch (next) {
		case IPPROTO_TCP:
			if (bpf_skb_load_bytes(skb, offset, &th, sizeof(th)))
				return MALFORMED;
			if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), p->tuple.ipv6.saddr, 32))
				return MALFORMED;
			p->v6 = 1;
			p->tuple.ipv6.sport = th.source;
			p->tuple.ipv6.dport = th.dest;
			read_tcp(skb, p, &th, offset);
			return IS_TCP;
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
		case IPPROTO_AH:
		case IPPROTO_MH:
		case 139: /* HIP, RFC 7401 */
		case 140: /* Shim6, RFC 5533 */
			break;
		default:
			return is_tunnel(next) ? MALFORMED : NOT_TCP;
		}
		if (bpf_skb_load_bytes(skb, offset, &h, sizeof(h)))
			return MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			/* A later fragment is worth nothing without the first,
			 * which holds the TCP header and is judged. */
			if (h.fragment & bpf_htons(IP6_OFFSET))
				return NOT_TCP;
			p->fragment = !!(h.fragment & bpf_htons(IP6_MORE_FRAGMENTS));
			offset += 8;
		} else if (next == IPPROTO_AH) {
			offset += (h.len + 2) * 4;
		} else {
			offset += (h.len + 1) * 8;
		}
		next = h.next;
	}
	return MALFORMED;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *p, struct iphdr *ip, void *end)
{
	struct tcphdr *th;
	__u32 len;

	if ((void *)(ip + 1) > end)
		return MALFORMED;
	if (ip->protocol != IPPROTO_TCP)
		return is_tunnel(ip->protocol) ? MALFORMED : NOT_TCP;
	if (ip->frag_off & bpf_htons(IP_OFFSET)) /* as for IPv6 */
		return NOT_TCP;
	len = ip->ihl * 4;
	if (len < sizeof(*ip))
		return MALFORMED;
	th = (void *)ip + len;
	if ((void *)(th + 1) > end)
		return MALFORMED;
	p->tuple.ipv4.saddr = ip->saddr;
	p->tuple.ipv4.daddr = ip->daddr;
	p->tuple.ipv4.sport = th->source;
	p->tuple.ipv4.dport = th->dest;
	p->fragment = !!(ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS));
	read_tcp(skb, p, th, ETH_HLEN + len);
	return IS_TCP;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *p, struct ipv6hdr *ip, void *end)
{
	struct tcphdr *th = (void *)(ip + 1);

	if ((void *)(ip + 1) > end)
		return MALFORMED;
	if (ip->nexthdr != IPPROTO_TCP)
		return parse_ipv6_extensions(skb, p);
	if ((void *)(th + 1) > end)
		return MALFORMED;
	p->v6 = 1;
	__builtin_memcpy(p->tuple.ipv6.saddr, &ip->saddr, 16);
	__builtin_memcpy(p->tuple.ipv6.daddr, &ip->daddr, 16);
	p->tuple.ipv6.sport = th->source;
	p->tuple.ipv6.dport = th->dest;
	read_tcp(skb, p, th, ETH_HLEN + sizeof(*ip));
	return IS_TCP;
}

/* in_reach: can all headers be read where they are? */
static __always_inline int in_reach(const struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETH_HLEN;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return data + ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct tcphdr) <= end;
	return (void *)(ip + 1) <= end && (void *)ip + ip->ihl * 4 + sizeof(struct tcphdr) <= end;
}

/* parse fills p, which must be zero, if skb is TCP. It pulls no more than it
 * needs: what TCP sends has its headers in reach and its payload elsewhere, and
 * to pull some of that would make the kernel copy the head of every packet, and
 * the receiver unable to merge them. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *p)
{
	const __u32 most = ETH_HLEN + 60 + sizeof(struct tcphdr); /* IPv4 with all options */
	void *data, *end;

	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
	case bpf_htons(ETH_P_IPV6):
		break;
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		/* The kernel takes off the first tag before it runs us. A
		 * second one would hide TCP from us, and a tag with VLAN 0 is
		 * taken off after us and delivered: no pod needs it. */
		return MALFORMED;
	default:
		return NOT_TCP;
	}
	if (!in_reach(skb))
		bpf_skb_pull_data(skb, skb->len < most ? skb->len : most);
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + ETH_HLEN > end)
		return MALFORMED;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, p, data + ETH_HLEN, end);
	return parse_ipv6(skb, p, data + ETH_HLEN, end);
}

/* mirror is the tuple of the answer to p: the one under which the socket that
 * sent p is found. */
static __always_inline void mirror(const struct packet *p, struct bpf_sock_tuple *t)
{
	if (p->v6) {
		__builtin_memcpy(t->ipv6.saddr, p->tuple.ipv6.daddr, 16);
		__builtin_memcpy(t->ipv6.daddr, p->tuple.ipv6.saddr, 16);
		t->ipv6.sport = p->tuple.ipv6.dport;
		t->ipv6.dport = p->tuple.ipv6.sport;
		return;
	}
	t->ipv4.saddr = p->tuple.ipv4.daddr;
	t->ipv4.daddr = p->tuple.ipv4.saddr;
	t->ipv4.sport = p->tuple.ipv4.dport;
	t->ipv4.dport = p->tuple.ipv4.sport;
}

/* flow_to_pod and flow_from_pod are p's flow seen from the pod. */
static __always_inline void flow_to_pod(const struct packet *p, struct flow *f)
{
	if (p->v6) {
		__builtin_memcpy(f->remote, p->tuple.ipv6.saddr, 16);
		__builtin_memcpy(f->local, p->tuple.ipv6.daddr, 16);
		f->remote_port = p->tuple.ipv6.sport;
		f->local_port = p->tuple.ipv6.dport;
		return;
	}
	mapped(f->remote, p->tuple.ipv4.saddr);
	mapped(f->local, p->tuple.ipv4.daddr);
	f->remote_port = p->tuple.ipv4.sport;
	f->local_port = p->tuple.ipv4.dport;
}

static __always_inline void flow_from_pod(const struct packet *p, struct flow *f)
{
	if (p->v6) {
		__builtin_memcpy(f->local, p->tuple.ipv6.saddr, 16);
		__builtin_memcpy(f->remote, p->tuple.ipv6.daddr, 16);
		f->local_port = p->tuple.ipv6.sport;
		f->remote_port = p->tuple.ipv6.dport;
		return;
	}
	mapped(f->local, p->tuple.ipv4.saddr);
	mapped(f->remote, p->tuple.ipv4.daddr);
	f->local_port = p->tuple.ipv4.sport;
	f->remote_port = p->tuple.ipv4.dport;
}

static __always_inline int same_flow(const struct flow *a, const struct flow *b)
{
	const __u32 *x = (const void *)a, *y = (const void *)b;
	__u32 differ = 0;

	for (unsigned i = 0; i < sizeof(*a) / sizeof(*x); i++)
		differ |= x[i] ^ y[i];
	return !differ;
}

static __always_inline int is_to_pod(const struct pod *pod, const struct packet *p)
{
	if (p->v6)
		return has_ip6(pod, p->tuple.ipv6.daddr[0], p->tuple.ipv6.daddr[1], p->tuple.ipv6.daddr[2], p->tuple.ipv6.daddr[3]);
	return has_ip4(pod, p->tuple.ipv4.daddr);
}

static __always_inline int is_from_pod(const struct pod *pod, const struct packet *p)
{
	if (p->v6)
		return has_ip6(pod, p->tuple.ipv6.saddr[0], p->tuple.ipv6.saddr[1], p->tuple.ipv6.saddr[2], p->tuple.ipv6.saddr[3]);
	return has_ip4(pod, p->tuple.ipv4.saddr);
}

static __always_inline int is_loopback4(__be32 a)
{
	return (a & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

static __always_inline int is_probe(__u32 id, const struct flow *f)
{
	struct probe k = { .flow = *f, .pod = id };

	return !!bpf_map_lookup_elem(&probes, &k);
}
