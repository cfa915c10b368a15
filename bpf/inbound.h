/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What happens to a packet that reaches the pod from outside. */
#pragma once
#include "packet.h"

static __always_inline int to_listener(struct __sk_buff *skb, __u32 id, const struct packet *p)
{
	__be16 port = p->v6 ? p->tuple.ipv6.dport : p->tuple.ipv4.dport;
	int tunnel = port == bpf_htons(HBONE_PORT);
	struct listener at = { .pod = id, .role = (tunnel ? ROLE_HB4 : ROLE_IN4) + p->v6 };
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &at);
	long err;

	if (!sk) {
		count(id, IN_NO_PROXY_DROP);
		return TC_ACT_SHOT;
	}
	err = bpf_sk_assign(skb, sk, 0);
	bpf_sk_release(sk);
	if (err) {
		count(id, IN_NO_PROXY_DROP);
		return TC_ACT_SHOT;
	}
	if (p->syn)
		count(id, tunnel ? CAPTURED_HBONE : CAPTURED_IN);
	return TC_ACT_UNSPEC;
}

/* may_receive: is sk, which is no listener, one that packets from the wire may
 * reach? The app's own half-open connections (request socks) are not the
 * proxy's; the caller sends their packets to the proxy, which resets them. */
static __always_inline int may_receive(struct bpf_sock *sk, const struct flow *f)
{
	struct bpf_sock *full;
	struct exemption *k;

	if (sk->state == BPF_TCP_TIME_WAIT)
		return 1; /* answers with an ACK or a reset, delivers nothing */
	full = bpf_sk_fullsock(sk);
	if (!full)
		full = bpf_get_listener_sock(sk);
	if (!full)
		return 0;
	if (bpf_sk_storage_get(&blessed, full, 0, 0))
		return 1;
	k = bpf_sk_storage_get(&kept, full, 0, 0);
	return k && same_flow(&k->flow, f);
}

/* keep_probe remembers on the app's socket that the host is at the other end,
 * so that a long connection does not depend on its entry in an LRU map. */
static __always_inline void keep_probe(struct bpf_sock *sk, const struct flow *f)
{
	struct exemption k = { .flow = *f };
	struct bpf_sock *full = bpf_sk_fullsock(sk);

	if (full)
		bpf_sk_storage_get(&kept, full, &k, BPF_SK_STORAGE_GET_F_CREATE);
}

/* The mark makes the app's socket answer by the way the probe came
 * (net.ipv4.tcp_fwmark_accept). On every packet, because with SYN cookies the
 * one that makes the socket is not the SYN. */
static __always_inline int pass_probe(struct __sk_buff *skb)
{
	skb->mark = MARK_PROXY;
	return TC_ACT_UNSPEC;
}

/* host_begins: is the SYN one that the host itself sends? Then the host's
 * namespace has a connecting socket with exactly its addresses and ports. A
 * forwarded or masqueraded SYN may have the node's address, but no such socket.
 */
static __always_inline int host_begins(struct __sk_buff *skb, const struct pod *pod, const struct packet *p)
{
	struct bpf_sock_tuple sender = {};
	struct bpf_sock *sk;
	int yes = 0;

	mirror(p, &sender);
	sk = bpf_skc_lookup_tcp(skb, &sender, tuple_len(p), pod->host_nsid, 0);
	if (sk) {
		yes = sk->state == BPF_TCP_SYN_SENT;
		bpf_sk_release(sk);
	}
	return yes;
}

/* note_probe remembers the flows that the host begins, and forgets one whose
 * tuple has changed hands. */
static __always_inline int note_probe(struct __sk_buff *skb, __u32 id, const struct pod *pod, const struct packet *p, const struct flow *f)
{
	struct probe k = { .flow = *f, .pod = id };
	__u32 one = 1;

	if (host_begins(skb, pod, p)) {
		bpf_map_update_elem(&probes, &k, &one, BPF_ANY);
		return 1;
	}
	if (is_probe(id, f))
		bpf_map_delete_elem(&probes, &k);
	return 0;
}

/* judge_inbound decides about one packet. It is strict but while the capture
 * of a running pod is put on or taken off: connections that are about to be
 * found by the socket iterator must not lose packets. */
static __always_inline int judge_inbound(struct __sk_buff *skb, __u32 id, const struct pod *pod)
{
	int strict = pod->mode == MODE_STRICT;
	struct packet p = {};
	struct flow f = {};
	struct bpf_sock *sk;
	int ok, listening, half_open;

	switch (parse(skb, &p)) {
	case NOT_TCP:
		return TC_ACT_UNSPEC;
	case MALFORMED:
		count(id, IN_MALFORMED_DROP);
		return TC_ACT_SHOT;
	}
	if (!is_to_pod(pod, &p)) {
		count(id, IN_UNKNOWN_ADDR_DROP);
		return TC_ACT_SHOT;
	}
	flow_to_pod(&p, &f);
	if (p.syn) {
		if (note_probe(skb, id, pod, &p, &f)) {
			count(id, PROBE_IN);
			return pass_probe(skb);
		}
		if (p.fragment) {
			/* Reassembly forgets the assigned socket: the SYN
			 * would reach the app. */
			count(id, IN_FRAGMENT_DROP);
			return TC_ACT_SHOT;
		}
		return to_listener(skb, id, &p);
	}
	sk = bpf_skc_lookup_tcp(skb, &p.tuple, tuple_len(&p), BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		listening = sk->state == BPF_TCP_LISTEN;
		half_open = sk->state == BPF_TCP_NEW_SYN_RECV;
		ok = !listening && may_receive(sk, &f);
		if (!ok && is_probe(id, &f)) {
			if (!listening)
				keep_probe(sk, &f);
			bpf_sk_release(sk);
			return pass_probe(skb);
		}
		if (ok && !p.fragment)
			bpf_sk_assign(skb, sk, 0); /* saves the stack its lookup; harmless if refused */
		bpf_sk_release(sk);
		if (ok)
			return TC_ACT_UNSPEC;
		if (!strict && !listening)
			return TC_ACT_UNSPEC;
		if (!listening && !half_open) {
			count(id, IN_UNKNOWN_SOCKET_DROP);
			return TC_ACT_SHOT;
		}
	} else if (is_probe(id, &f)) {
		return pass_probe(skb);
	}
	if (p.fragment) {
		count(id, IN_FRAGMENT_DROP);
		return TC_ACT_SHOT;
	}
	/* No socket yet: the ACK that completes a SYN cookie's handshake. It
	 * goes where the SYN went, never to the app's listener. */
	return to_listener(skb, id, &p);
}
