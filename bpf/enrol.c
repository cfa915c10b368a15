//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
// The packet programs that are needed only while capture is put on a running
// pod or taken off. They are attached for milliseconds.
#include "inbound.h"

char LICENSE[] SEC("license") = "GPL";

// inbound_lenient stands in for inbound_strict while the iterators run.
SEC("tc")
int inbound_lenient(struct __sk_buff *skb)
{
	return judge_inbound(skb, 0);
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

// hold_lo drops, on lo, packets of connections over the wire that the
// capturing rule has caught before the iterator has marked their socket. The
// proxy's listener would reset them; dropped, they are sent again by the way
// they belong.
SEC("tc")
int hold_lo(struct __sk_buff *skb)
{
	struct packet p = {};

	if (parse(skb, &p) != IS_TCP || p.syn || is_to_pod(&p) || connected(skb, &p))
		return TC_ACT_UNSPEC;
	if (!p.v6 && (p.tuple.ipv4.daddr & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000))
		return TC_ACT_UNSPEC;
	count(STRAY_DROP);
	return TC_ACT_SHOT;
}

// hold_wire is its counterpart while capture is taken off: it replaces
// guard_pod_egress and drops packets of captured connections that the rule no
// longer holds on lo. The end they are meant for lives in this very namespace.
SEC("tc")
int hold_wire(struct __sk_buff *skb)
{
	struct packet p = {};

	if (parse(skb, &p) != IS_TCP || p.syn || !connected(skb, &p))
		return TC_ACT_UNSPEC;
	count(STRAY_DROP);
	return TC_ACT_SHOT;
}
