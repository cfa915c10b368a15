/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Every map, every struct that user space sees, and every constant that the
 * loader sets. doc.go says what they mean as an ABI; nothing of it is defined
 * anywhere else. All maps are one for the node, and pinned.
 */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* What the programs do for a pod. 0 is none: a pod that is not known is stopped. */
enum mode {
	MODE_IDLE = 1, /* nothing: prepared, not captured */
	MODE_ENROL,    /* new connections are captured, older ones not stopped yet */
	MODE_STRICT,   /* captured */
	MODE_LEAVE,    /* as ENROL, and what misses its way out is held back */
};

/* Keys of `programs`: where a gate of a pod goes on. */
enum slot {
	SLOT_INBOUND,
	SLOT_GUARD_POD,
	SLOT_GUARD_HOST,
	SLOT_GUARD_LO,
	SLOT_OUTBOUND,
	SLOTS = 8,
};

#define POD_ADDRS 8

/* Value of `pods`. */
struct pod {
	enum mode mode;
	__u32 nsid;              /* its namespace as the host's numbers it */
	__u32 host_nsid;         /* the host's namespace as its own numbers it */
	__u32 ip4[POD_ADDRS];    /* network order; 0 where there is none */
	__u32 ip6[POD_ADDRS][4]; /* network order; :: where there is none */
};

/* Which of the proxy's sockets a new connection goes to. */
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

/* What `stats` counts. A name ending in DROP counts packets that were dropped,
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
	LOOP_DROP,         /* the proxy was about to meet itself, the pod's routes are broken */
	COUNTERS = 32,
};

/* Value of `stats`. */
struct counters {
	__u64 n[COUNTERS]; /* by enum counter */
};

/* Key of `listeners`. */
struct listener {
	__u32 pod;
	enum role role;
};

/* One TCP flow as the pod sees it. IPv4 addresses are written as
 * ::ffff:a.b.c.d, so that an IPv6 socket that speaks IPv4 gives the same flow. */
struct flow {
	__u8 local[16];  /* the pod's address, network order */
	__u8 remote[16]; /* network order */
	__be16 local_port;
	__be16 remote_port;
};

/* Key of `probes` and `renewals`. */
struct probe {
	struct flow flow;
	__u32 pod; /* no pod can use another's entry */
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

/* Pods by the number of their network namespace, which is not used again while
 * anything of the namespace lives. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32); /* as in `pods` */
	__type(value, struct counters);
} stats SEC(".maps");

/* The proxy's sockets in the pods. An entry vanishes with the last descriptor
 * of the socket; a missing entry drops, so a dead proxy fails closed. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4096 * ROLE_SLOTS);
	__type(key, struct listener);
	__type(value, __u64);
} listeners SEC(".maps");

/* The packet programs. A pod has gates to them, so that exchanging one here
 * exchanges it for all pods at once. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, enum slot);
	__type(value, __u32);
} programs SEC(".maps");

/* Sockets of the proxy: they may use the wire. Written through the map's
 * descriptor, which no pod has. Accepted sockets inherit it (CLONE). */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, __u32);
} blessed SEC(".maps");

/* Sockets of the app that were connected before capture began. Not inherited. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct exemption);
} kept SEC(".maps");

/* Connections that sockets of the host itself have begun towards pods: kubelet
 * probes. doc.go says why a pod cannot make use of it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct probe);
	__type(value, __u32);
} probes SEC(".maps");

/* Connections whose client uses a port again while the pod's end of the last
 * one waits for stray packets (TIME-WAIT). inbound leaves their SYN to the
 * kernel, and mesh_lookup takes the entry and gives the SYN to the proxy. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct probe);
	__type(value, __u32);
} renewals SEC(".maps");

#define MARK_PROXY 0x539 /* traffic of the proxy: routed as if there were no capture */
#define MARK_LOCAL 0x53a /* traffic that stays in the namespace, captured or not */
#define HBONE_PORT 15008
#define PLAIN_PORT 15006
#define DNS_PORT 53

static __always_inline void count(__u32 id, enum counter which)
{
	struct counters *c = bpf_map_lookup_elem(&stats, &id);

	if (c && which < COUNTERS)
		__sync_fetch_and_add(&c->n[which], 1);
}

/* mapped writes an IPv4 address as struct flow has it. */
static __always_inline void mapped(__u8 out[16], __be32 ip4)
{
	__builtin_memset(out, 0, 10);
	out[10] = out[11] = 0xff;
	__builtin_memcpy(out + 12, &ip4, 4);
}

/* differs is 1 unless d is 0. Without a branch: in a loop over addresses, each
 * would multiply the paths that the verifier walks. */
static __always_inline __u32 differs(__u32 d)
{
	d = (d | -d) >> 31;
	asm volatile("" : "+r"(d));
	return d;
}

static __always_inline int has_ip4(const struct pod *pod, __be32 a)
{
	__u32 none = 1;

	for (int i = 0; i < POD_ADDRS; i++)
		none &= differs(pod->ip4[i] ^ a);
	return !none && a;
}

static __always_inline int has_ip6(const struct pod *pod, __be32 a, __be32 b, __be32 c, __be32 d)
{
	__u32 none = 1;

	for (int i = 0; i < POD_ADDRS; i++)
		none &= differs((pod->ip6[i][0] ^ a) | (pod->ip6[i][1] ^ b) | (pod->ip6[i][2] ^ c) | (pod->ip6[i][3] ^ d));
	return !none && (a | b | c | d);
}
