// Package identity knows who we are and who they are: it obtains and renews
// the certificates of local workloads, and makes the TLS configurations that
// prove them and demand the peer's.
//
// A certificate is an X.509-SVID: exactly one URI name, the SPIFFE ID
// "spiffe://trust-domain/ns/namespace/sa/account". Its key is made in this
// process, and is never written to disk, logged or dumped.
//
// Everything fails closed. Without a valid certificate there is no handshake,
// and a peer that is not exactly who was planned ends it.
package identity
