//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
// The programs that put capture on a running pod and take it off without
// breaking its connections. They are attached for milliseconds, or run once.
#include "inbound.h"
#include "kernel.h"
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "GPL";

#define SOL_SOCKET 1
#define SO_MARK 36
#define LOOPBACK_IFINDEX 1 /* the same in every namespace */

// What an iterator reports to user space, one byte per socket.
#define REPORT_DONE "d"    /* kept, destroyed, or marked to stay */
#define REPORT_PENDING "p" /* look again: its handshake with the app is not over */
#define REPORT_FAILED "f"

static __always_inline void report(struct bpf_iter__tcp *ctx, const char *what)
{
	bpf_seq_write(ctx->meta->seq, what, 1);
}

// over_lo: is the connection, or the attempt, captured or the pod's with
// itself? The interface of the last packet tells. There is none on record
// while the socket is connecting, and often after it: a peer on the same
// machine answers so fast that the socket is still locked by connect(2), and
// packets that wait for the lock are not recorded. Then the MSS tells that was
// announced in the SYN and never changes: lo has an MTU of 65536. An interface
// with one of the same size is not told from lo, in this short moment.
static __always_inline int over_lo(struct tcp_sock *tp)
{
	struct inet_sock___old *old = (void *)tp;
	struct sock *sk = (void *)tp;
	int received_on = 0;

	if (bpf_core_field_exists(sk->sk_rx_dst_ifindex))
		received_on = sk->sk_rx_dst_ifindex;
	else if (bpf_core_field_exists(old->rx_dst_ifindex))
		received_on = old->rx_dst_ifindex;
	if (received_on)
		return received_on == LOOPBACK_IFINDEX;
	return tp->advmss > 32767;
}

static __always_inline void flow_of(struct sock_common *skc, struct flow *f)
{
	f->local_port = bpf_htons(skc->skc_num);
	f->remote_port = skc->skc_dport;
	if (skc->skc_family == AF_INET) {
		mapped(f->local, skc->skc_rcv_saddr);
		mapped(f->remote, skc->skc_daddr);
		return;
	}
	bpf_probe_read_kernel(f->local, sizeof(f->local), &skc->skc_v6_rcv_saddr);
	bpf_probe_read_kernel(f->remote, sizeof(f->remote), &skc->skc_v6_daddr);
}

static __always_inline int is_connection(struct sock_common *skc)
{
	switch (skc->skc_state) {
	case BPF_TCP_LISTEN:
	case BPF_TCP_TIME_WAIT:
	case BPF_TCP_NEW_SYN_RECV:
	case BPF_TCP_CLOSE:
		return 0;
	}
	return 1;
}

// is_pending: a handshake that a peer began with the app before capture. Its
// connection does not exist yet, so it cannot be kept yet.
static __always_inline int is_pending(struct sock_common *skc)
{
	struct sock *listener;

	if (skc->skc_state != BPF_TCP_NEW_SYN_RECV)
		return 0;
	listener = BPF_CORE_READ(skc, skc_listener);
	return listener && BPF_CORE_READ(listener, sk_mark) != MARK_PROXY;
}

static __always_inline int set_mark(void *sk, int mark)
{
	return bpf_setsockopt(sk, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

// keep lets the connections that exist live on: their mark keeps them off the
// capturing route, their entry in `kept` lets them through the guards.
SEC("iter/tcp")
int keep(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct exemption k = {}, *have;
	struct tcp_sock *tp;

	if (!skc)
		return 0;
	if (is_pending(skc)) {
		report(ctx, REPORT_PENDING);
		return 0;
	}
	if (!is_connection(skc))
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp || over_lo(tp))
		return 0;
	if (bpf_sk_storage_get(&blessed, tp, 0, 0))
		return 0; /* the proxy's */
	k.syn_ok = skc->skc_state == BPF_TCP_SYN_SENT;
	flow_of(skc, &k.flow);
	have = bpf_sk_storage_get(&kept, tp, &k, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!have || set_mark(tp, MARK_PROXY)) {
		report(ctx, REPORT_FAILED);
		return 0;
	}
	if (!same_flow(&have->flow, &k.flow))
		*have = k;
	report(ctx, REPORT_DONE);
	return 0;
}

// to_itself: do both ends of the flow belong to the pod?
static __always_inline int to_itself(const struct flow *f)
{
	const __be32 *a = (const void *)f->remote;

	if (!a[0] && !a[1] && a[2] == bpf_htonl(0xffff))
		return (a[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || is_pod_ip4(a[3]);
	if (!a[0] && !a[1] && !a[2] && a[3] == bpf_htonl(1))
		return 1;
	return is_pod_ip6(a[0], a[1], a[2], a[3]);
}

// drain keeps captured connections with the proxy after the capturing rule is
// gone: their mark selects a rule of its own.
SEC("iter/tcp")
int drain(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct flow f __attribute__((aligned(4))) = {};
	struct tcp_sock *tp;
	__u32 mark;

	if (!skc || !is_connection(skc))
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return 0;
	mark = ((struct sock *)tp)->sk_mark;
	if (mark == MARK_LOCAL) {
		report(ctx, REPORT_DONE);
		return 0;
	}
	if (mark == MARK_PROXY || !over_lo(tp))
		return 0;
	flow_of(skc, &f);
	if (to_itself(&f))
		return 0;
	report(ctx, set_mark(tp, MARK_LOCAL) ? REPORT_FAILED : REPORT_DONE);
	return 0;
}

extern int bpf_sock_destroy(struct sock_common *sk) __ksym __weak;

// destroy resets the connections that are neither captured nor the proxy's.
SEC("iter/tcp")
int destroy(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct tcp_sock *tp;

	if (!skc || !is_connection(skc))
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp || over_lo(tp))
		return 0;
	if (bpf_sk_storage_get(&blessed, tp, 0, 0))
		return 0;
	if (bpf_sock_destroy)
		report(ctx, bpf_sock_destroy(skc) ? REPORT_FAILED : REPORT_DONE);
	return 0;
}

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
