/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What happens to a packet that reaches the pod from outside. */
#pragma once
#include "packet.h"

/* give hands the packet to one of the proxy's sockets. */
static __always_inline int give(struct __sk_buff *skb, __u32 id, enum role role, enum counter no_proxy)
{
	struct listener at = { .pod = id, .role = role };
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &at);
	long err = 1;

	if (sk) {
		err = bpf_sk_assign(skb, sk, 0);
		bpf_sk_release(sk);
	}
	if (err) {
		count(id, no_proxy);
		return TC_ACT_SHOT;
	}
	return TC_ACT_UNSPEC;
}

/* is_tunnel_port: is the packet for the port of tunnels? */
static __always_inline int is_tunnel_port(const struct packet *p)
{
	return (p->v6 ? p->tuple.ipv6.dport : p->tuple.ipv4.dport) == bpf_htons(HBONE_PORT);
}

static __always_inline int to_listener(struct __sk_buff *skb, __u32 id, const struct packet *p)
{
	int tunnel = is_tunnel_port(p);
	int act = give(skb, id, (tunnel ? ROLE_HB4 : ROLE_IN4) + p->v6, IN_NO_PROXY_DROP);

	if (act == TC_ACT_UNSPEC && p->syn)
		count(id, tunnel ? CAPTURED_HBONE : CAPTURED_IN);
	return act;
}

/* waits: does the pod's end of an old connection with the SYN's addresses and
 * ports wait for stray packets? */
static __always_inline int waits(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple t = p->tuple;
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &t, tuple_len(p), BPF_F_CURRENT_NETNS, 0);
	int yes = 0;

	if (sk) {
		yes = sk->state == BPF_TCP_TIME_WAIT;
		bpf_sk_release(sk);
	}
	return yes;
}

/* serves: does mesh_lookup give the proxy what `renewals` holds, in this
 * namespace? It is asked for a port that nobody has. */
static __always_inline int serves(struct __sk_buff *skb, const struct packet *p, struct probe *k)
{
	struct bpf_sock_tuple t = p->tuple;
	__u32 one = 1;
	struct bpf_sock *sk, *full;
	int yes = 0;

	if (p->v6)
		t.ipv6.sport = 0;
	else
		t.ipv4.sport = 0;
	k->flow.remote_port = 0;
	if (bpf_map_update_elem(&renewals, k, &one, BPF_ANY))
		return 0;
	sk = bpf_skc_lookup_tcp(skb, &t, tuple_len(p), BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		full = bpf_sk_fullsock(sk);
		if (full)
			yes = !!bpf_sk_storage_get(&blessed, full, 0, 0);
		bpf_sk_release(sk);
	}
	if (!yes)
		bpf_map_delete_elem(&renewals, k);
	return yes;
}

/* renew gives the proxy a SYN for which an old connection waits. Only by the
 * kernel's own lookup does the wait end (RFC 6191): if the SYN were assigned to
 * the proxy's listener, it would be dropped for a minute, without a word. Where
 * mesh_lookup does not serve, it is all the same: never the app's. */
static __always_inline int renew(struct __sk_buff *skb, __u32 id, const struct packet *p, const struct flow *f)
{
	struct probe k = { .flow = *f, .pod = id };
	__u32 one = 1;

	if (!serves(skb, p, &k))
		return to_listener(skb, id, p);
	k.flow.remote_port = f->remote_port;
	if (bpf_map_update_elem(&renewals, &k, &one, BPF_ANY))
		return to_listener(skb, id, p);
	count(id, is_tunnel_port(p) ? CAPTURED_HBONE : CAPTURED_IN);
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

/* The mark makes the app's socket answer by the way the probe came
 * (net.ipv4.tcp_fwmark_accept). On every packet, because with SYN cookies the
 * one that makes the socket is not the SYN. */
static __always_inline int pass_probe(struct __sk_buff *skb)
{
	skb->mark = MARK_PROXY;
	return TC_ACT_UNSPEC;
}

/* host_socket is the state of the socket of the host, as inbound finds it, that
 * sent the packet; 0 if there is none. A forwarded or masqueraded packet may
 * have the node's address, but no such socket. */
static __always_inline __u32 host_socket(struct __sk_buff *skb, const struct pod *pod, const struct packet *p)
{
	struct bpf_sock_tuple sender = {};
	struct bpf_sock *sk;
	__u32 state = 0;

	mirror(p, &sender);
	sk = bpf_skc_lookup_tcp(skb, &sender, tuple_len(p), pod->host_nsid, 0);
	if (sk) {
		state = sk->state;
		bpf_sk_release(sk);
	}
	return state;
}

/* at_home: is this the pod's own namespace? Root in the pod can move eth0 into
 * another, in which the number of the host's namespace is that of a third. Only
 * the pod's own has the proxy's listener, and only the proxy's is blessed. When
 * there is no listener at all, nobody can tell, and probes must pass. */
static __always_inline int at_home(struct __sk_buff *skb, __u32 id, const struct packet *p)
{
	struct listener at = { .pod = id, .role = ROLE_IN4 + p->v6 };
	struct bpf_sock_tuple t = p->tuple;
	struct bpf_sock *sk, *full;
	int yes = 0;

	sk = bpf_map_lookup_elem(&listeners, &at);
	if (!sk)
		return 1;
	bpf_sk_release(sk);
	if (p->v6)
		t.ipv6.dport = bpf_htons(PLAIN_PORT);
	else
		t.ipv4.dport = bpf_htons(PLAIN_PORT);
	sk = bpf_skc_lookup_tcp(skb, &t, tuple_len(p), BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 0;
	full = bpf_sk_fullsock(sk);
	if (full)
		yes = !!bpf_sk_storage_get(&blessed, full, 0, 0);
	bpf_sk_release(sk);
	return yes;
}

/* begins_probe: is the SYN one that the host itself sends? It remembers the
 * flow, and forgets one whose tuple has changed hands. */
static __always_inline int begins_probe(struct __sk_buff *skb, __u32 id, const struct pod *pod, const struct packet *p, const struct flow *f)
{
	struct probe k = { .flow = *f, .pod = id };
	__u32 one = 1;

	if (host_socket(skb, pod, p) == BPF_TCP_SYN_SENT && at_home(skb, id, p)) {
		bpf_map_update_elem(&probes, &k, &one, BPF_ANY);
		return 1;
	}
	if (is_probe(id, f))
		bpf_map_delete_elem(&probes, &k);
	return 0;
}

/* goes_on_probe: is the packet, which is no SYN, of a connection that the host
 * began? Its entry may have been evicted. */
static __always_inline int goes_on_probe(struct __sk_buff *skb, __u32 id, const struct pod *pod, const struct packet *p, const struct flow *f)
{
	struct probe k = { .flow = *f, .pod = id };
	__u32 one = 1;

	if (is_probe(id, f))
		return 1;
	switch (host_socket(skb, pod, p)) {
	case 0:
	case BPF_TCP_LISTEN:
	case BPF_TCP_NEW_SYN_RECV:
		return 0;
	}
	if (!at_home(skb, id, p))
		return 0;
	bpf_map_update_elem(&probes, &k, &one, BPF_ANY);
	return 1;
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
		if (begins_probe(skb, id, pod, &p, &f)) {
			count(id, PROBE_IN);
			return pass_probe(skb);
		}
		if (p.fragment) {
			/* Reassembly forgets the assigned socket: the SYN
			 * would reach the app. */
			count(id, IN_FRAGMENT_DROP);
			return TC_ACT_SHOT;
		}
		if (waits(skb, &p))
			return renew(skb, id, &p, &f);
		return to_listener(skb, id, &p);
	}
	sk = bpf_skc_lookup_tcp(skb, &p.tuple, tuple_len(&p), BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		listening = sk->state == BPF_TCP_LISTEN;
		half_open = sk->state == BPF_TCP_NEW_SYN_RECV;
		ok = !listening && may_receive(sk, &f);
		if (!ok && goes_on_probe(skb, id, pod, &p, &f)) {
			bpf_sk_release(sk);
			return pass_probe(skb);
		}
		if (ok && !p.fragment)
			bpf_sk_assign(skb, sk, 0); /* saves the stack its lookup; harmless if refused */
		bpf_sk_release(sk);
		/* Reassembly looks for the socket again. If its connection is
		 * gone by then, the app's listener might take what is left for
		 * the answer to a SYN cookie; the port of tunnels is the
		 * proxy's. */
		if (ok && (!p.fragment || is_tunnel_port(&p)))
			return TC_ACT_UNSPEC;
		if (ok) {
			count(id, IN_FRAGMENT_DROP);
			return TC_ACT_SHOT;
		}
		if (!strict && !listening)
			return TC_ACT_UNSPEC;
		if (!listening && !half_open) {
			count(id, IN_UNKNOWN_SOCKET_DROP);
			return TC_ACT_SHOT;
		}
	} else if (goes_on_probe(skb, id, pod, &p, &f)) {
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
