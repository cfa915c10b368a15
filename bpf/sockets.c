//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
// Socket iterators, with which capture is put on a running pod, and taken off,
// without breaking its connections. They are loaded once for all pods; which
// pod's sockets they see is decided by the namespace in which one is opened.
#include "packet.h"
#include "kernel.h"
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "GPL";

#define SOL_SOCKET 1
#define SO_MARK 36
#define LOOPBACK_IFINDEX 1 /* the same in every namespace */

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

// Not inlined, so that the type gets into BTF, and from there into Go.
static __noinline long write_report(struct seq_file *seq, struct report *r)
{
	return bpf_seq_write(seq, r, sizeof(*r));
}

static __always_inline void report(struct bpf_iter__tcp *ctx, struct sock_common *skc, enum outcome outcome)
{
	struct report r = { .outcome = outcome };
	struct flow f __attribute__((aligned(8))) = {};

	flow_of(skc, &f);
	__builtin_memcpy(r.local, f.local, sizeof(r.local));
	write_report(ctx->meta->seq, &r);
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
		report(ctx, skc, OUTCOME_PENDING);
		return 0;
	}
	if (!is_connection(skc))
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp || over_lo(tp))
		return 0;
	/* The proxy's own sockets are not told apart: to keep them does nothing
	 * for a socket that is blessed. */
	k.syn_ok = skc->skc_state == BPF_TCP_SYN_SENT;
	flow_of(skc, &k.flow);
	have = bpf_sk_storage_get(&kept, tp, &k, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!have || set_mark(tp, MARK_PROXY)) {
		report(ctx, skc, OUTCOME_FAILED);
		return 0;
	}
	if (!same_flow(&have->flow, &k.flow))
		*have = k;
	report(ctx, skc, OUTCOME_DONE);
	return 0;
}

// to_itself: are both ends of the flow the same host? A connection between two
// addresses of the pod is not recognized; it drains with the others.
static __always_inline int to_itself(const struct flow *f)
{
	const __u64 *local = (const void *)f->local, *remote = (const void *)f->remote;

	return local[0] == remote[0] && local[1] == remote[1];
}

// drain keeps captured connections with the proxy after the capturing rule is
// gone: their mark selects a rule of its own. The proxy's ends of them get it
// too, which changes nothing, for what is sent to the pod is local anyway.
SEC("iter/tcp")
int drain(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct flow f __attribute__((aligned(8))) = {};
	struct tcp_sock *tp;
	__u32 mark;

	if (!skc || !is_connection(skc))
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return 0;
	mark = ((struct sock *)tp)->sk_mark;
	if (mark == MARK_LOCAL) {
		report(ctx, skc, OUTCOME_DONE);
		return 0;
	}
	if (mark == MARK_PROXY || !over_lo(tp))
		return 0;
	flow_of(skc, &f);
	if (to_itself(&f))
		return 0;
	report(ctx, skc, set_mark(tp, MARK_LOCAL) ? OUTCOME_FAILED : OUTCOME_DONE);
	return 0;
}

extern int bpf_sock_destroy(struct sock_common *sk) __ksym __weak;

// destroy resets the connections that are neither captured nor marked as the
// proxy's.
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
	if (((struct sock *)tp)->sk_mark == MARK_PROXY)
		return 0;
	if (bpf_sock_destroy)
		report(ctx, skc, bpf_sock_destroy(skc) ? OUTCOME_FAILED : OUTCOME_DONE);
	return 0;
}

