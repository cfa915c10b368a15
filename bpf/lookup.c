//go:build ignore

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
// The socket lookup of a pod. It is loaded once per pod: of all programs, only
// this one is run without a way to be told whose pod it is run for. What it
// knows are constants, so that the verifier walks few paths.
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

#define AF_INET 2

/* Set by the loader; as in struct pod. */
const volatile __u32 pod_id = 0; /* key of `pods` */
const volatile __u32 pod_dns = 0;
const volatile __u32 pod_ip4[POD_ADDRS] = {};
const volatile __u32 pod_ip6[POD_ADDRS][4] = {};

// is_own: is the packet for the pod itself? By any of its addresses, also one
// that was added after the program was loaded (the kernel uses the destination
// as the source then): capturing it would make the proxy dial itself without end.
static __always_inline int is_own4(struct bpf_sk_lookup *ctx)
{
	__be32 to = ctx->local_ip4;

	if (to == ctx->remote_ip4 || (to & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000))
		return 1;
	for (int i = 0; i < POD_ADDRS; i++) {
		if (!pod_ip4[i])
			return 0;
		if (pod_ip4[i] == to)
			return 1;
	}
	return 0;
}

static __always_inline int is_own6(struct bpf_sk_lookup *ctx)
{
	__be32 a = ctx->local_ip6[0], b = ctx->local_ip6[1], c = ctx->local_ip6[2], d = ctx->local_ip6[3];
	__be32 ra = ctx->remote_ip6[0], rb = ctx->remote_ip6[1], rc = ctx->remote_ip6[2], rd = ctx->remote_ip6[3];

	if (a == ra && b == rb && c == rc && d == rd)
		return 1;
	if (!a && !b && !c && d == bpf_htonl(1))
		return 1;
	for (int i = 0; i < POD_ADDRS; i++) {
		if (!(pod_ip6[i][0] | pod_ip6[i][1] | pod_ip6[i][2] | pod_ip6[i][3]))
			return 0;
		if (pod_ip6[i][0] == a && pod_ip6[i][1] == b && pod_ip6[i][2] == c && pod_ip6[i][3] == d)
			return 1;
	}
	return 0;
}

// own is for TCP to an address of the pod: its own, and what the proxy sends the
// app. The context's interface cannot tell lo from the wire for the pod's own
// addresses (inet_iif is the interface that owns the address), so inbound
// connections are not its business: judge_inbound assigned them before, but for
// those that it says.
static __always_inline int own(struct bpf_sk_lookup *ctx, int v6)
{
	int tunnel = ctx->local_port == HBONE_PORT;
	struct listener at = { .pod = pod_id, .role = (tunnel ? ROLE_HB4 : ROLE_IN4) + v6 };
	struct probe k = { .pod = pod_id };
	struct bpf_sock *sk;
	long err = 1;

	if (v6) {
		for (int i = 0; i < 4; i++) {
			((__be32 *)k.flow.local)[i] = ctx->local_ip6[i];
			((__be32 *)k.flow.remote)[i] = ctx->remote_ip6[i];
		}
	} else {
		mapped(k.flow.local, ctx->local_ip4);
		mapped(k.flow.remote, ctx->remote_ip4);
	}
	k.flow.local_port = bpf_htons(ctx->local_port);
	k.flow.remote_port = ctx->remote_port;
	if (bpf_map_delete_elem(&renewals, &k)) /* there is none */
		return SK_PASS;
	sk = bpf_map_lookup_elem(&listeners, &at);
	if (sk) {
		err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_REPLACE);
		bpf_sk_release(sk);
	}
	if (err) {
		count(at.pod, IN_NO_PROXY_DROP);
		return SK_DROP;
	}
	return SK_PASS;
}

// mesh_lookup gives the pod's own connections and name queries to the proxy. A
// routing rule delivers all TCP that the pod generates to lo, and another UDP
// to port 53; what is not for an address of the pod meets this program instead
// of a listener.
SEC("sk_lookup")
int mesh_lookup(struct bpf_sk_lookup *ctx)
{
	int v6 = ctx->family != AF_INET;
	int query = ctx->protocol == IPPROTO_UDP && ctx->local_port == DNS_PORT && pod_dns;
	struct listener at = { .pod = pod_id, .role = (query ? ROLE_DNS4 : ROLE_OUT4) + v6 };
	struct bpf_sock *sk;
	long err = 1;

	if (ctx->protocol != IPPROTO_TCP && !query)
		return SK_PASS;
	if (v6 ? is_own6(ctx) : is_own4(ctx))
		return query ? SK_PASS : own(ctx, v6);
	sk = bpf_map_lookup_elem(&listeners, &at);
	if (sk) {
		err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_REPLACE);
		bpf_sk_release(sk);
	}
	if (err) {
		count(at.pod, query ? DNS_NO_PROXY_DROP : OUT_NO_PROXY_DROP);
		return SK_DROP;
	}
	count(at.pod, query ? CAPTURED_DNS : CAPTURED_OUT);
	return SK_PASS;
}
