// Package handoff is the unix socket by which the node agent gives ztunnel a
// pod: who it is, its network namespace and its listeners.
//
// The agent listens (Server), ztunnel dials (Client). The socket is
// SOCK_SEQPACKET: one packet is one JSON message, and the files of that message travel beside
// it as SCM_RIGHTS. Each request is answered before the next is sent.
//
//	ztunnel → agent   hello, then one hold for each pod that it already serves, then holdEnd
//	agent → ztunnel   one add for each captured pod, then snapshotEnd; after that add and del as pods come and go
//	agent → ztunnel   activate, when it is to be the active one of its pair
//	ztunnel → agent   an ack for each of those
//
// The holds let an agent that was restarted adopt the listeners of a ztunnel
// that was not, and the other way round the snapshot gives a restarted ztunnel
// the listeners, with their backlog, that the agent kept open.
//
// A ztunnel says in its hello whether it takes the sockets for name queries.
// One that does not, such as those of releases that have no name server, gets
// pods without them. To go back to an agent of such a release, first turn the
// capture of name queries off: it refuses holds that carry these sockets.
package handoff

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// Version is the version of the messages. Both ends must agree on it.
const Version = 1

// A Role says what a listener of a pod is for. It is the listener's place in
// Files.Listeners, and its key in the pod's map of listeners.
type Role int

// The roles. Out is what the pod's own processes dial, In is plain text that
// arrives at the pod, HB is HBONE (port 15008) that arrives at the pod, DNS is
// what they ask of name servers over UDP; the digit is the IP family. DNS4 and
// DNS6 are datagram sockets, the others listen for TCP.
const (
	Out4 Role = iota
	Out6
	In4
	In6
	HB4
	HB6
	DNS4
	DNS6
	Roles int = iota // how many there are
)

// String returns the role's name on the wire, such as "out4".
func (r Role) String() string {
	if r < 0 || int(r) >= Roles {
		return fmt.Sprintf("role(%d)", int(r))
	}
	return [Roles]string{"out4", "out6", "in4", "in6", "hb4", "hb6", "dns4", "dns6"}[r]
}

// A Pod is who a captured pod is. Its namespace and service account are what
// ztunnel asks certificates for: they come from the agent, which saw the pod
// on its own node, and from nowhere else.
type Pod struct {
	UID            string       `json:"uid"` // of the Kubernetes object
	Name           string       `json:"name"`
	Namespace      string       `json:"namespace"`
	ServiceAccount string       `json:"serviceAccount"`
	Addresses      []netip.Addr `json:"addresses,omitempty"`
	Node           string       `json:"node,omitempty"`
}

// Validate reports whether p can be served: it has a UID that is safe as a
// file name, a name, a namespace, a service account and valid addresses.
func (p Pod) Validate() error {
	if err := validUID(p.UID); err != nil {
		return err
	}
	for _, f := range []struct{ what, value string }{
		{"name", p.Name}, {"namespace", p.Namespace}, {"service account", p.ServiceAccount},
	} {
		if f.value == "" || strings.ContainsAny(f.value, "/\x00") {
			return fmt.Errorf("pod %s: %s %q is not valid", p.UID, f.what, f.value)
		}
	}
	for _, a := range p.Addresses {
		if !a.IsValid() {
			return fmt.Errorf("pod %s: it has an invalid address", p.UID)
		}
	}
	return nil
}

// validUID keeps to the characters of Kubernetes UIDs: these name pods in
// paths and logs.
func validUID(uid string) error {
	if uid == "" || len(uid) > 128 || strings.Trim(uid, ".") == "" {
		return fmt.Errorf("pod UID %q is not valid", uid)
	}
	for _, r := range uid {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '-', r == '_', r == '.':
		default:
			return fmt.Errorf("pod UID %q is not valid: character %q", uid, r)
		}
	}
	return nil
}

// Files are the open files of a pod. Whoever is given them closes them, unless
// the function that takes them says otherwise.
type Files struct {
	Netns   *os.File // the pod's network namespace
	Blessed *os.File // the sk_storage map that marks ztunnel's own sockets
	// Listeners by Role; nil where the pod has no address of that family, and
	// for DNS4 and DNS6 where its queries are not captured.
	Listeners [Roles]*os.File
}

// Close closes every file that is there.
func (f Files) Close() error {
	var errs []error
	for _, file := range f.list() {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	return errors.Join(errs...)
}

// list returns all files in the order of slots; absent ones are nil.
func (f Files) list() []*os.File {
	return append([]*os.File{f.Netns, f.Blessed}, f.Listeners[:]...)
}

// An Entry is a pod with its files.
type Entry struct {
	Pod   Pod
	Files Files
}

// ErrNoProxy is returned by Server.Add when no ztunnel is connected that could
// serve the pod.
var ErrNoProxy = errors.New("no ztunnel is connected: see why the istio-proxy container of this node's ztunnel pod is not running")
