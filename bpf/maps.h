/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Every map, every struct that user space sees, and every constant that the
 * loader sets. doc.go says what they mean as an ABI; nothing of it is defined
 * anywhere else. The object files share the maps through their pins.
 */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* Keys of `listeners`: which of the proxy's sockets a new connection goes to. */
enum role {
	ROLE_OUT4, /* outbound, :15001 */
	ROLE_OUT6,
	ROLE_IN4, /* plain inbound, :15006 */
	ROLE_IN6,
	ROLE_HB4, /* inbound tunnel, :15008 */
	ROLE_HB6,
	ROLE_DNS4, /* name queries over UDP, :15053 */
	ROLE_DNS6,
	ROLE_SLOTS = 8,
};

/* Keys of `stats`. A name ending in DROP counts packets that were dropped,
 * the others connections or packets that were let pass and why. */
enum counter {
	CAPTURED_OUT,           /* new outbound connections given to the proxy */
	CAPTURED_IN,            /* new plain inbound connections given to the proxy */
	CAPTURED_HBONE,         /* new inbound tunnels given to the proxy */
	PROBE_IN,               /* new connections of the host's own sockets, let pass */
	OUT_NO_PROXY_DROP,      /* outbound, but no listener: the proxy is gone */
	IN_NO_PROXY_DROP,       /* inbound, but no listener: the proxy is gone */
	IN_UNKNOWN_SOCKET_DROP, /* inbound, for a socket that is neither the proxy's nor kept */
	IN_UNKNOWN_ADDR_DROP,   /* inbound, to an address that is not the pod's */
	IN_FRAGMENT_DROP,       /* inbound SYN in fragments */
	IN_MALFORMED_DROP,      /* inbound, not parsed as TCP/IP or VLAN tagged */
	POD_GUARD_SYN_DROP,     /* outbound SYN that is not the proxy's, seen in the pod */
	POD_GUARD_DATA_DROP,    /* outbound data that is not the proxy's, seen in the pod */
	POD_GUARD_MALFORMED_DROP,
	HOST_GUARD_SYN_DROP, /* the same three, seen on the host's side of the veth */
	HOST_GUARD_DATA_DROP,
	HOST_GUARD_MALFORMED_DROP,
	STRAY_DROP, /* packet that lost its way while capture was put on or off; TCP sends it again */
	CAPTURED_DNS,      /* name queries given to the proxy */
	DNS_NO_PROXY_DROP, /* name queries, but no socket: the proxy is gone */
	COUNTERS = 32,
};

/* One TCP flow as the pod sees it. IPv4 addresses are written as
 * ::ffff:a.b.c.d, so that an IPv6 socket that speaks IPv4 gives the same flow. */
struct flow {
	__u8 local[16];  /* the pod's address, network order */
	__u8 remote[16]; /* network order */
	__be16 local_port;
	__be16 remote_port;
};

/* Key of `probes`. */
struct probe {
	struct flow flow;
	__u32 pod; /* index of the pod's veth in the host namespace: no pod can use another's entry */
};

/* Value of `kept`: a connection of the pod's own that may bypass the proxy,
 * and the only flow for which it may. A socket outlives its connection
 * (connect(2) to AF_UNSPEC), hence the flow. */
struct exemption {
	struct flow flow;
	__u32 syn_ok; /* not 0: was connecting when capture began, so its SYN may be sent again */
};

/* What a socket iterator did with a socket. */
enum outcome {
	OUTCOME_DONE = 1, /* kept, destroyed, or marked to stay */
	OUTCOME_PENDING,  /* look again: its handshake with the app is not over */
	OUTCOME_FAILED,
};

/* What a socket iterator writes for each socket that it cares about. */
struct report {
	enum outcome outcome;
	__u8 local[16]; /* the socket's address, as in struct flow */
};

/* The proxy's sockets in this pod. An entry vanishes with the last descriptor
 * of the socket; a missing entry drops, so a dead proxy fails closed. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, ROLE_SLOTS);
	__type(key, enum role);
	__type(value, __u64);
} listeners SEC(".maps");

/* Sockets of the proxy: they may use the wire. Written through the map's
 * descriptor, which no pod has. Accepted sockets inherit it (CLONE). */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, __u32);
} blessed SEC(".maps");

/* Sockets of the app that were connected before capture began, and those that
 * the host itself connected to. One map for the node; not inherited. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct exemption);
} kept SEC(".maps");

/* Connections that sockets of the host itself have begun towards pods: kubelet
 * probes. One map for the node; host_probe writes it, see doc.go for why a pod
 * cannot make use of it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct probe);
	__type(value, __u32);
} probes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, enum counter);
	__type(value, __u64);
} stats SEC(".maps");

/* Constants of one pod, set by the loader before the verifier sees them. */
#define POD_ADDRS 8
const volatile __u32 pod_ip4[POD_ADDRS] = {};    /* network order; 0 ends the list */
const volatile __u32 pod_ip6[POD_ADDRS][4] = {}; /* network order; :: ends the list */
const volatile __u32 pod_nsid = 0;               /* the pod's namespace as the host namespace numbers it */
const volatile __u32 pod_veth = 0;               /* index of the host's side of the veth */
const volatile __u32 pod_dns = 0;                /* not 0: its name queries over UDP are captured */

#define MARK_PROXY 0x539 /* traffic of the proxy: routed as if there were no capture */
#define MARK_LOCAL 0x53a /* traffic that stays in the namespace, captured or not */
#define HBONE_PORT 15008
#define DNS_PORT 53

static __always_inline void count(enum counter which)
{
	__u64 *n = bpf_map_lookup_elem(&stats, &which);
	if (n)
		*n += 1;
}
