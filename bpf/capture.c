//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
// The packet programs that hold pods in the mesh, one set for the node: a pod's
// gate says for which pod they run. doc.go explains how they play together and
// why they cannot be walked around.
#include "inbound.h"

char LICENSE[] SEC("license") = "GPL";

const enum counter *counter_for_btf __attribute__((unused)); /* so that Go gets the names */

// enter takes the number of the pod that the gate has left in cb. Nobody else
// can: between the two nothing runs.
static __always_inline struct pod *enter(struct __sk_buff *skb, __u32 *id)
{
	*id = skb->cb[0];
	skb->cb[0] = 0;
	return bpf_map_lookup_elem(&pods, id);
}

// inbound stands at the pod's end of the wire: new connections go to the
// proxy, packets of others only to sockets of the proxy or kept ones.
SEC("tc")
int inbound(struct __sk_buff *skb)
{
	__u32 id;
	struct pod *pod = enter(skb, &id);

	if (!pod)
		return TC_ACT_SHOT;
	switch (pod->mode) {
	case MODE_IDLE:
		return TC_ACT_UNSPEC;
	case MODE_ENROL:
	case MODE_LEAVE:
	case MODE_STRICT:
		return judge_inbound(skb, id, pod);
	}
	return TC_ACT_SHOT;
}

enum verdict {
	GUARD_PASS,
	GUARD_SYN,
	GUARD_DATA,
};

// judge_outbound: may a packet that begins a connection or carries data, sent
// by sk (or by nobody: a raw socket), leave the pod? The holder of the socket
// is asked, never a mark: any process with CAP_NET_RAW can set a mark. Only a
// connection or an attempt counts: a listener sends nothing, a handshake with
// it no more than SYN-ACKs, but a raw frame can have their addresses.
static __always_inline int judge_outbound(const struct packet *p, struct bpf_sock *sk)
{
	struct bpf_sock *full = 0;
	struct flow f = {};
	struct exemption *k;

	if (sk)
		full = bpf_sk_fullsock(sk);
	if (full && full->state == BPF_TCP_LISTEN)
		full = 0;
	if (full && bpf_sk_storage_get(&blessed, full, 0, 0))
		return GUARD_PASS;
	flow_from_pod(p, &f);
	if (full) {
		k = bpf_sk_storage_get(&kept, full, 0, 0);
		if (k && same_flow(&k->flow, &f)) {
			if (!p->syn) {
				k->syn_ok = 0; /* connected: from here on a SYN is a new connection */
				return GUARD_PASS;
			}
			if (k->syn_ok)
				return GUARD_PASS;
		}
	}
	return p->syn ? GUARD_SYN : GUARD_DATA;
}

// harmless: neither begins a connection nor carries data. ACK, FIN and reset
// often have no full socket (time-wait, no socket at all), a SYN-ACK has none
// with SYN cookies.
static __always_inline int harmless(const struct packet *p)
{
	return !p->syn && !p->data;
}

// connected: is there a socket in this namespace that waits for p?
static __always_inline int connected(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple t = p->tuple;
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &t, tuple_len(p), BPF_F_CURRENT_NETNS, 0);
	int yes = 0;

	if (sk) {
		yes = sk->state != BPF_TCP_LISTEN;
		bpf_sk_release(sk);
	}
	return yes;
}

// hold_wire is what guard_pod does while capture is taken off: it drops packets
// of captured connections that the rule no longer holds on lo. The end they are
// meant for lives in this very namespace.
static __always_inline int hold_wire(struct __sk_buff *skb, __u32 id)
{
	struct packet p = {};

	if (parse(skb, &p) != IS_TCP || p.syn || !connected(skb, &p))
		return TC_ACT_UNSPEC;
	count(id, STRAY_DROP);
	return TC_ACT_SHOT;
}

// answers_probe: is the data for a connection that the host began? What says so
// in the pod is not beyond doubt; guard_host asks again.
static __always_inline int answers_probe(struct __sk_buff *skb, __u32 id, const struct pod *pod, const struct packet *p)
{
	struct bpf_sock_tuple t = p->tuple;
	struct flow f = {};
	struct bpf_sock *sk;
	int yes = 0;

	flow_from_pod(p, &f);
	if (is_probe(id, &f))
		return 1;
	sk = bpf_skc_lookup_tcp(skb, &t, tuple_len(p), pod->host_nsid, 0);
	if (sk) {
		yes = sk->state != BPF_TCP_LISTEN && sk->state != BPF_TCP_NEW_SYN_RECV;
		bpf_sk_release(sk);
	}
	return yes;
}

// guard_pod stands at the pod's end of the wire, outwards. It also takes off
// the mark, which some devices carry across namespaces.
SEC("tc")
int guard_pod(struct __sk_buff *skb)
{
	__u32 id;
	struct pod *pod = enter(skb, &id);
	struct packet p = {};

	if (!pod)
		return TC_ACT_SHOT;
	switch (pod->mode) {
	case MODE_IDLE:
	case MODE_ENROL:
		return TC_ACT_UNSPEC;
	case MODE_LEAVE:
		return hold_wire(skb, id);
	case MODE_STRICT:
		break;
	}
	switch (parse(skb, &p)) {
	case NOT_TCP:
		return TC_ACT_UNSPEC;
	case MALFORMED:
		count(id, POD_GUARD_MALFORMED_DROP);
		return TC_ACT_SHOT;
	}
	if (!harmless(&p)) {
		switch (judge_outbound(&p, skb->sk)) {
		case GUARD_SYN:
			count(id, POD_GUARD_SYN_DROP);
			return TC_ACT_SHOT;
		case GUARD_DATA:
			if (answers_probe(skb, id, pod, &p))
				break;
			count(id, POD_GUARD_DATA_DROP);
			return TC_ACT_SHOT;
		}
	}
	skb->mark = 0;
	return TC_ACT_UNSPEC;
}

// host_waits: is the data from the pod, and for a connection of the host's own
// namespace, the one in which this runs? The pod has not begun it, for its SYNs
// do not pass; so the host has.
static __always_inline int host_waits(struct __sk_buff *skb, const struct pod *pod, const struct packet *p)
{
	struct bpf_sock_tuple t = p->tuple;
	struct bpf_sock *sk;
	int yes = 0;

	if (!is_from_pod(pod, p))
		return 0;
	sk = bpf_skc_lookup_tcp(skb, &t, tuple_len(p), BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		yes = sk->state != BPF_TCP_LISTEN && sk->state != BPF_TCP_NEW_SYN_RECV;
		bpf_sk_release(sk);
	}
	return yes;
}

// guard_host is the same guard at the host's end of the wire, where nothing in
// the pod can reach it. The socket is not in the packet here, it is looked up
// in the pod's namespace.
SEC("tc")
int guard_host(struct __sk_buff *skb)
{
	__u32 id;
	struct pod *pod = enter(skb, &id);
	struct bpf_sock_tuple sender = {};
	struct packet p = {};
	struct bpf_sock *sk;
	int verdict;

	if (!pod)
		return TC_ACT_SHOT;
	switch (pod->mode) {
	case MODE_IDLE:
	case MODE_ENROL:
	case MODE_LEAVE:
		return TC_ACT_UNSPEC;
	case MODE_STRICT:
		break;
	}
	switch (parse(skb, &p)) {
	case NOT_TCP:
		return TC_ACT_UNSPEC;
	case MALFORMED:
		count(id, HOST_GUARD_MALFORMED_DROP);
		return TC_ACT_SHOT;
	}
	if (!harmless(&p)) {
		mirror(&p, &sender);
		sk = bpf_skc_lookup_tcp(skb, &sender, tuple_len(&p), pod->nsid, 0);
		if (sk) {
			verdict = judge_outbound(&p, sk);
			bpf_sk_release(sk);
		} else {
			verdict = judge_outbound(&p, 0);
		}
		switch (verdict) {
		case GUARD_SYN:
			count(id, HOST_GUARD_SYN_DROP);
			return TC_ACT_SHOT;
		case GUARD_DATA:
			if (host_waits(skb, pod, &p))
				break;
			count(id, HOST_GUARD_DATA_DROP);
			return TC_ACT_SHOT;
		}
	}
	skb->mark = 0;
	return TC_ACT_UNSPEC;
}

// for_itself: is the packet on lo for the pod itself?
static __always_inline int for_itself(struct __sk_buff *skb, const struct pod *pod)
{
	__be32 a[4], b[4];

	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), a, 8))
			return 0;
		return a[0] == a[1] || is_loopback4(a[1]) || has_ip4(pod, a[1]);
	case bpf_htons(ETH_P_IPV6):
		if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), a, 16) ||
		    bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, daddr), b, 16))
			return 0;
		if (!((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])))
			return 1;
		if (!(b[0] | b[1] | b[2]) && b[3] == bpf_htonl(1))
			return 1;
		return has_ip6(pod, b[0], b[1], b[2], b[3]);
	}
	return 1;
}

// guard_lo stands where lo begins. What the proxy sends to others over the wire
// has no business there: it would reach the proxy again, which would send it
// again, without end. It gets there only when the pod has changed the rules.
//
// While capture is put on, it also drops packets of connections over the wire
// that the capturing rule has caught before the iterator has marked their
// socket. The proxy's listener would reset them; dropped, they are sent again
// by the way they belong.
SEC("tc")
int guard_lo(struct __sk_buff *skb)
{
	__u32 id;
	struct pod *pod = enter(skb, &id);
	struct bpf_sock *sk = skb->sk;
	struct packet p = {};

	if (!pod)
		return TC_ACT_UNSPEC; /* keeps nothing in; without the others, nothing leaves */
	if (pod->mode == MODE_IDLE)
		return TC_ACT_UNSPEC;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && bpf_sk_storage_get(&blessed, sk, 0, 0) && !for_itself(skb, pod)) {
		count(id, LOOP_DROP);
		return TC_ACT_SHOT;
	}
	if (pod->mode != MODE_ENROL)
		return TC_ACT_UNSPEC;
	if (parse(skb, &p) != IS_TCP || p.syn || for_itself(skb, pod) || connected(skb, &p))
		return TC_ACT_UNSPEC;
	count(id, STRAY_DROP);
	return TC_ACT_SHOT;
}

// is_query: is it UDP to port 53? Behind extension headers it is not seen.
static __always_inline int is_query(struct __sk_buff *skb, int *v6)
{
	__u32 offset = ETH_HLEN + sizeof(struct ipv6hdr);
	struct iphdr ip;
	__u8 next;
	__be16 port;

	*v6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	if (*v6) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, nexthdr), &next, 1) || next != IPPROTO_UDP)
			return 0;
	} else {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.protocol != IPPROTO_UDP)
			return 0;
		if (ip.frag_off & bpf_htons(IP_OFFSET))
			return 0;
		offset = ETH_HLEN + ip.ihl * 4;
	}
	return !bpf_skb_load_bytes(skb, offset + 2, &port, 2) && port == bpf_htons(DNS_PORT);
}

// outbound stands where lo ends, and does what mesh_lookup does on kernels that
// have no sk_lookup.
SEC("tc")
int outbound(struct __sk_buff *skb)
{
	__u32 id;
	struct pod *pod = enter(skb, &id);
	struct packet p = {};
	int act, v6;

	if (!pod || pod->mode == MODE_IDLE)
		return TC_ACT_UNSPEC;
	if (for_itself(skb, pod))
		return TC_ACT_UNSPEC;
	switch (parse(skb, &p)) {
	case NOT_TCP:
		if (!is_query(skb, &v6))
			return TC_ACT_UNSPEC;
		act = give(skb, id, ROLE_DNS4 + v6, DNS_NO_PROXY_DROP);
		if (act == TC_ACT_UNSPEC)
			count(id, CAPTURED_DNS);
		return act;
	case MALFORMED:
		return TC_ACT_SHOT;
	}
	if (!p.syn && connected(skb, &p))
		return TC_ACT_UNSPEC;
	if (p.fragment) /* reassembly would lose the listener; lo has a large MTU */
		return TC_ACT_SHOT;
	act = give(skb, id, ROLE_OUT4 + p.v6, OUT_NO_PROXY_DROP);
	if (act == TC_ACT_UNSPEC && p.syn)
		count(id, CAPTURED_OUT);
	return act;
}
