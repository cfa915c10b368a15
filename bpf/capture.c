//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
// The programs that hold a pod in the mesh, one set per pod. doc.go explains
// how they play together and why they cannot be walked around.
#include "inbound.h"

char LICENSE[] SEC("license") = "GPL";

// is_own: is the packet for the pod itself? By any of its addresses, also one
// that was added after the program was loaded (the kernel uses the destination
// as the source then): capturing it would make the proxy dial itself without end.
static __always_inline int is_own4(struct bpf_sk_lookup *ctx)
{
	__be32 to = ctx->local_ip4;

	return to == ctx->remote_ip4 || (to & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || is_pod_ip4(to);
}

static __always_inline int is_own6(struct bpf_sk_lookup *ctx)
{
	__be32 a = ctx->local_ip6[0], b = ctx->local_ip6[1], c = ctx->local_ip6[2], d = ctx->local_ip6[3];
	__be32 ra = ctx->remote_ip6[0], rb = ctx->remote_ip6[1], rc = ctx->remote_ip6[2], rd = ctx->remote_ip6[3];

	if (a == ra && b == rb && c == rc && d == rd)
		return 1;
	if (!a && !b && !c && d == bpf_htonl(1))
		return 1;
	return is_pod_ip6(a, b, c, d);
}

// give hands what is being looked up to one of the proxy's sockets.
static __always_inline int give(struct bpf_sk_lookup *ctx, enum role role, enum counter captured, enum counter no_proxy)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &role);
	long err;

	if (!sk) {
		count(no_proxy);
		return SK_DROP;
	}
	err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_REPLACE);
	bpf_sk_release(sk);
	if (err) {
		count(no_proxy);
		return SK_DROP;
	}
	count(captured);
	return SK_PASS;
}

// mesh_lookup gives the pod's own connections and name queries to the proxy. A
// routing rule delivers all TCP that the pod generates to lo, and another UDP
// to port 53; what is not for an address of the pod meets this program instead
// of a listener.
//
// The context's interface cannot tell lo from the wire for the pod's own
// addresses (inet_iif is the interface that owns the address), so inbound
// connections are not its business: judge_inbound assigned them before.
SEC("sk_lookup")
int mesh_lookup(struct bpf_sk_lookup *ctx)
{
	int v6 = ctx->family != AF_INET;
	int query = ctx->protocol == IPPROTO_UDP && ctx->local_port == DNS_PORT && pod_dns;

	if (ctx->protocol != IPPROTO_TCP && !query)
		return SK_PASS;
	if (v6 ? is_own6(ctx) : is_own4(ctx))
		return SK_PASS;
	if (query)
		return give(ctx, ROLE_DNS4 + v6, CAPTURED_DNS, DNS_NO_PROXY_DROP);
	return give(ctx, ROLE_OUT4 + v6, CAPTURED_OUT, OUT_NO_PROXY_DROP);
}

// inbound_strict stands at the pod's end of the wire: new connections go to
// the proxy, packets of others only to sockets of the proxy or kept ones.
SEC("tc")
int inbound_strict(struct __sk_buff *skb)
{
	return judge_inbound(skb, 1);
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
	if (p->syn)
		return GUARD_SYN; /* probes are begun by the host, never by the pod */
	if (!is_probe(&f))
		return GUARD_DATA;
	return GUARD_PASS;
}

// harmless: neither begins a connection nor carries data. ACK, FIN and reset
// often have no full socket (time-wait, no socket at all), a SYN-ACK has none
// with SYN cookies.
static __always_inline int harmless(const struct packet *p)
{
	return !p->syn && !p->data;
}

// guard_pod_egress stands at the pod's end of the wire, outwards. It also
// takes off the mark, which some devices carry across namespaces.
SEC("tc")
int guard_pod_egress(struct __sk_buff *skb)
{
	struct packet p = {};

	switch (parse(skb, &p)) {
	case NOT_TCP:
		return TC_ACT_UNSPEC;
	case MALFORMED:
		count(POD_GUARD_MALFORMED_DROP);
		return TC_ACT_SHOT;
	}
	if (!harmless(&p)) {
		switch (judge_outbound(&p, skb->sk)) {
		case GUARD_SYN:
			count(POD_GUARD_SYN_DROP);
			return TC_ACT_SHOT;
		case GUARD_DATA:
			count(POD_GUARD_DATA_DROP);
			return TC_ACT_SHOT;
		}
	}
	skb->mark = 0;
	return TC_ACT_UNSPEC;
}

// guard_host_ingress is the same guard at the host's end of the wire, where
// nothing in the pod can reach it. The socket is not in the packet here, it is
// looked up in the pod's namespace.
SEC("tc")
int guard_host_ingress(struct __sk_buff *skb)
{
	struct bpf_sock_tuple sender = {};
	struct packet p = {};
	struct bpf_sock *sk;
	int verdict;

	switch (parse(skb, &p)) {
	case NOT_TCP:
		return TC_ACT_UNSPEC;
	case MALFORMED:
		count(HOST_GUARD_MALFORMED_DROP);
		return TC_ACT_SHOT;
	}
	if (!harmless(&p)) {
		mirror(&p, &sender);
		sk = bpf_skc_lookup_tcp(skb, &sender, tuple_len(&p), pod_nsid, 0);
		if (sk) {
			verdict = judge_outbound(&p, sk);
			bpf_sk_release(sk);
		} else {
			verdict = judge_outbound(&p, 0);
		}
		switch (verdict) {
		case GUARD_SYN:
			count(HOST_GUARD_SYN_DROP);
			return TC_ACT_SHOT;
		case GUARD_DATA:
			count(HOST_GUARD_DATA_DROP);
			return TC_ACT_SHOT;
		}
	}
	skb->mark = 0;
	return TC_ACT_UNSPEC;
}

// host_probe stands at the host's end of the wire, towards the pod, and finds
// out which connections the host itself begins: those for which the host's
// namespace has a connecting socket with exactly this packet's addresses and
// ports. A forwarded or masqueraded SYN may have the node's address, but no
// such socket.
SEC("tc")
int host_probe(struct __sk_buff *skb)
{
	struct bpf_sock_tuple sender = {};
	struct packet p = {};
	struct probe k = { .pod = pod_veth };
	struct bpf_sock *sk;
	__u32 one = 1;
	int ours = 0;

	if (parse(skb, &p) != IS_TCP || !p.syn)
		return TC_ACT_UNSPEC; /* the pod's end judges it */
	mirror(&p, &sender);
	sk = bpf_skc_lookup_tcp(skb, &sender, tuple_len(&p), BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		ours = sk->state == BPF_TCP_SYN_SENT;
		bpf_sk_release(sk);
	}
	flow_to_pod(&p, &k.flow);
	if (ours)
		bpf_map_update_elem(&probes, &k, &one, BPF_ANY);
	else
		bpf_map_delete_elem(&probes, &k); /* the tuple changed hands */
	return TC_ACT_UNSPEC;
}
