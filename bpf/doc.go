// Package bpf holds the programs that capture a pod's traffic, the Go bindings
// generated from them, and nothing that loads or attaches them: that is
// node/capture. This text is the contract between the two, and with the proxy.
//
// # How a pod is captured
//
// The proxy has listening sockets in the pod's own network namespace: out4 and
// out6 on port 15001, in4 and in6 on 15006 for plain inbound, hb4 and hb6 on
// 15008 for tunnels. All are transparent (IP_TRANSPARENT), so a connection
// accepted on one has the address it was meant for as its local address. No
// packet is rewritten and no connection is tracked. If name queries are to be
// captured there are dns4 and dns6 too, for UDP, on port 15053.
//
//	app ── rule: all TCP generated here ──► lo ── mesh_lookup ──► out4, out6
//	app ── rule: UDP to port 53 ──► lo ── mesh_lookup ──► dns4, dns6
//	wire ── inbound ──► in4, in6, hb4, hb6 ── proxy ── lo ──► app
//	proxy (mark 0x539, blessed) ── guard_pod ── guard_host ──► wire
//	host's own socket ── inbound (mark 0x539) ──► app
//
// Routing in the pod's namespace, per family, for packets generated there
// ("iif lo"); table 1500 is "local default dev lo":
//
//	 99  mark 0x53a/0xfff, TCP   table 1500     what must stay, captured or not
//	100  mark 0x539/0xfff        table main     the proxy, kept connections, probes
//	101  mark 0x539/0xfff        unreachable    so that the proxy never meets itself
//	102  TCP                     table 1500     the capture
//	103  UDP to port 53          table 1500     name queries, if they are captured
//
// The app's answers to connections that the proxy made in a client's name go
// the same way, over lo to the proxy, and never leave the pod even if every
// program were gone. Other UDP, ICMP and SCTP are not touched.
//
// # Name queries
//
// The capture of names is a service to the pod, not a bound around it: UDP is
// not meshed, no guard looks at it, and a pod that binds its socket to a device
// or sends raw packets asks its server directly. Queries over TCP are outbound
// connections as any other.
//
// A query arrives on dns4 or dns6 with the address that was asked as its
// original destination (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR). The answer
// must come from that address and port: from a transparent socket that is bound
// to it in the pod's namespace, which takes CAP_NET_BIND_SERVICE. What the
// proxy asks itself, from a socket with mark 0x539, leaves. A query to an
// address of the pod, 127.0.0.53 for instance, is not captured.
//
// While no proxy runs, queries wait in the sockets that the agent holds, as
// many as fit, and are answered by the next one. When the sockets are gone too
// they are dropped, so the pod's resolver asks again: to let them go on as if
// they were for the pod would give them to a name server that runs in it,
// which would then ask itself.
//
// # Programs
//
// The packet programs, in capture.c, are loaded once and do the work for all
// pods. Each is behind a gate, a program of seven instructions that is loaded for
// a pod and a hook: it leaves the pod's number in cb[0] of the packet and goes on
// in the map of programs, by a tail call. So a new version of a program is put
// to work for all pods in one step, and what a pod needs is small. If there is no
// program in the map, the gate stops the packet.
//
//	inbound      ingress of the pod's eth0
//	guard_pod    egress of the pod's eth0
//	guard_host   ingress of the host's end of the veth
//	guard_lo     egress of the pod's lo
//
// What they do for a pod is said by its mode: nothing (idle), all (strict), or,
// for the moment in which capture is put on a running pod or taken off (enrol,
// leave), something between. A pod that is not in the map of pods, or has another
// mode, is stopped. To change the mode is one write to the map.
//
// mesh_lookup, in lookup.c, is the sk_lookup program of the pod's namespace and
// loaded for each pod. On kernels without sk_lookup the packet program outbound,
// on ingress of the pod's lo, does the same. The socket iterators keep, drain and destroy, in
// sockets.c, are loaded once. node/capture has the order.
//
// All addresses of the pod's interfaces are known to the programs; TCP to an
// address that is not is dropped on arrival. One address of each family is the
// source of captured connections.
//
// The guards return TC_ACT_UNSPEC for what they let pass, so the programs of a
// CNI plug-in behind them still run.
//
// # The ladder
//
// What a kernel can do is found out by trying. By what it has not got, it gets
// less:
//
//	tcx links         else clsact filters. A process in the pod with NET_ADMIN can
//	                  take off those inside the pod. Nothing leaves by that, for
//	                  guard_host is out of its reach; but the pod can then receive
//	                  past the proxy, and give itself routes past the capture that
//	                  end at guard_host. The agent puts them back.
//	sk_lookup         else outbound on lo. The same holds, but behind IPv6 extension
//	                  headers no name query is seen.
//	socket iterators  else connections are reset by sock_diag when a pod joins or
//	                  leaves; captured ones cannot be told to stay.
//
// Where there is neither, or no socket storage, socket maps or sk_assign for
// packet programs, no pod is captured: the node says why and refuses pods that
// belong to the mesh. Transparent proxying by netfilter with the same routes
// could capture there too, but its only guard would be the mark, which CAP_NET_RAW
// suffices to set: it would promise what it cannot hold.
//
// Filters are used on kernels with tcx links as well, for the first moments of a
// new pod: they hold at once, a link only after a grace period of RCU. The links
// follow, one after the other, and the filters go. Their qdisc, clsact, stays:
// to add or to remove one, the kernel drops for a moment all that the interface
// sends, and nobody sends a name query again in time. A pod that runs gets links
// at once; only a kernel without them adds qdiscs to it. guard_pod follows when
// it is captured: until then a raw packet can spoil a stream of the proxy, as one
// that goes around the queue (PACKET_QDISC_BYPASS) always can, and no more, for
// guard_host is there. In mode leave it is needed for itself, and waited for.
//
// # Maps
//
//	pods       HASH         the pod's number -> struct pod
//	programs   PROG_ARRAY   enum slot -> program
//	listeners  SOCKHASH     pod, role -> socket; a missing one drops: fail closed
//	blessed    SK_STORAGE   u32, on sockets of the proxy; inherited by accept
//	kept       SK_STORAGE   struct exemption, on sockets of the app
//	probes     LRU_HASH     struct probe -> u32
//	renewals   LRU_HASH     struct probe -> u32
//	stats      HASH         the pod's number -> struct counters
//
// There is one of each for the node, pinned as maps/NAME below the root of this
// version of the contract; the links of a pod are pinned below pods/UID. A change
// of a key or value needs a new root. A pod's number is the cookie of its network
// namespace, or the inode number where the kernel has none.
//
// The proxy blesses each socket that it makes for the wire, after socket(2) and
// before connect(2), by writing 1 under the socket's descriptor; only the
// descriptor of the map allows that, and no pod has it. It sets mark 0x539 on
// the same sockets, and mark 0x53a on those that it connects to the app.
//
// # Why it cannot be walked around
//
// A mark proves nothing: CAP_NET_RAW suffices to set one. The guards therefore
// ask the sending socket for its blessing, and let a packet without SYN and
// without data pass from anybody. The guard in the pod can be seen by the pod;
// the one at the host's end cannot be reached from it, and finds the socket by
// the packet's addresses in the pod's namespace: a raw packet finds none, or a
// connection of the proxy, whose stream it can spoil and nothing else. A
// first fragment counts as data. TCP behind IPv6 extension headers is found;
// more than eight of them, or a VLAN tag, do not pass, nor do the tunnels that a
// node might unpack: IP, GRE and MPLS in IP. What is in UDP is not looked into.
//
// Exempt from the guards are connections, never sockets: a kept socket that is
// disconnected and connected elsewhere (connect(2) with AF_UNSPEC) sends from
// another flow than its exemption says, and a SYN only if it was connecting
// when capture began.
//
// Data of the pod may pass without the proxy to a connection that the host has
// begun: a probe. guard_host believes nothing that is said in the pod about
// that. It lets pass what comes from an address of the pod and finds, in the
// host's own namespace, a socket that waits for it and does not listen. The pod
// has not begun that connection: its SYNs do not pass.
//
// Inbound, a SYN is a probe if the host's namespace has a socket in state
// SYN_SENT with exactly its addresses and ports. A pod that sends such a SYN to
// another, with the node's address as its source, owns no such socket; nor does
// a SYN that the node forwards or masquerades. Root in the pod can move eth0 into
// a namespace of its own, where the number of the host's namespace means a third:
// so a probe must find the proxy's listener, blessed, in the namespace in which it
// arrives. The map of probes spares the packets that follow this search. Its key
// holds both addresses, both ports and the pod.
//
// Inbound, a packet that is no SYN reaches only sockets that are blessed or
// kept, for that flow. One that finds no socket, or a handshake that is not the
// proxy's, is given to the proxy's listener: with SYN cookies it is the ACK that
// makes the connection, else the listener resets it. Fragments are dropped,
// because reassembly loses the assigned socket; but for the port of tunnels those
// of a connection pass, since no other listener is there.
//
// A SYN may come for a connection that the pod's end has closed and that waits for
// stray packets (TIME-WAIT). Only the kernel's own lookup lets it begin anew (RFC
// 6191, tcp_timewait_state_process): a listener that is assigned to it cannot
// enter the request beside what waits, and drops it. So inbound leaves that SYN to
// the kernel, and mesh_lookup, which is asked for a listener then, finds the flow
// in renewals and gives it to the proxy. That it will is tried before, with port 0
// of the same client; where mesh_lookup does not answer the SYN is assigned, and
// so is lost, as it is on kernels without sk_lookup. The entry is taken when it is
// used, within the same delivery of the packet: the proxy's own connection to the
// app may have the same flow later.
//
// A pod with NET_ADMIN can change its own routes and rules. Without those of the
// capture its packets meet the guards and go nowhere. If it removes rules 100
// and 101, what the proxy sends would come back to the proxy over lo, and be
// sent again, without end: guard_lo drops what a blessed socket sends over lo to
// others.
//
// What the proxy must do itself: an app that connects to its own pod's address,
// on 15001, 15006 or 15008, is not seen by any program, for what is local to
// the pod stays on lo. So the proxy refuses an outbound connection whose local
// address is the pod's or equals its remote address, and an inbound one to its
// own ports.
package bpf
