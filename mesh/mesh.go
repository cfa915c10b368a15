// Package mesh holds the nouns of the mesh: what exists, who it is and what is
// allowed. Its types are plain values without I/O; they refer to each other by
// name, never by pointer. Their JSON is the one dump format of every component.
//
// The zero value of each type is harmless: a zero Transport is not plain text,
// a zero Action allows nothing, a zero Identity is nobody.
package mesh

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
)

// A UID names a workload for its whole life, for example
// "Kubernetes//Pod/shop/cart-7d9": cluster, API group, kind, namespace, name.
type UID string

// A Host is a service's fully qualified DNS name, lower case, without a
// trailing dot, for example "cart.shop.svc.cluster.local".
type Host string

// A Name is a namespaced name. The zero Name names nothing.
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// String returns "namespace/name", the key used on the wire.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace, then by name.
func (n Name) Compare(o Name) int {
	return cmp.Or(strings.Compare(n.Namespace, o.Namespace), strings.Compare(n.Name, o.Name))
}

// ParseName is the inverse of Name.String. It fails unless s is two non-empty
// parts joined by one slash.
func ParseName(s string) (Name, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok || ns == "" || name == "" || strings.Contains(name, "/") {
		return Name{}, fmt.Errorf("parse name %q: want namespace/name", s)
	}
	return Name{Namespace: ns, Name: name}, nil
}

// A ServiceName is the key of a service: its namespace and host name.
type ServiceName struct {
	Namespace string `json:"namespace"`
	Host      Host   `json:"host"`
}

// String returns "namespace/host", the key used on the wire.
func (n ServiceName) String() string { return n.Namespace + "/" + string(n.Host) }

// ParseServiceName is the inverse of ServiceName.String.
func ParseServiceName(s string) (ServiceName, error) {
	ns, host, ok := strings.Cut(s, "/")
	if !ok || ns == "" || host == "" || strings.Contains(host, "/") {
		return ServiceName{}, fmt.Errorf("parse service name %q: want namespace/host", s)
	}
	return ServiceName{Namespace: ns, Host: Host(host)}, nil
}

// Transport says how a workload is reached. The zero value is unset, and
// traffic to it is refused: what is unknown is never sent in clear.
type Transport uint8

// The transports.
const (
	TransportUnset Transport = iota
	PlainTCP                 // outside the mesh, or opted out of it
	HBONE                    // mutual TLS and HTTP/2 CONNECT on port 15008
)

// A Locality is where a workload runs. Empty parts are unknown.
type Locality struct {
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Subzone string `json:"subzone,omitempty"`
}

// A GatewayRef names the proxy that stands in front of a workload or service:
// by service name, or by address. The zero GatewayRef names none.
type GatewayRef struct {
	Service ServiceName `json:"service,omitzero"`
	Network string      `json:"network,omitempty"`
	Address netip.Addr  `json:"address,omitzero"`
	Port    uint16      `json:"port,omitempty"` // HBONE port; 0 is 15008
}

// IsZero reports whether r names no gateway.
func (r GatewayRef) IsZero() bool { return r == GatewayRef{} }

// A Port maps a port of a service to the port of the workload behind it.
type Port struct {
	Service uint16 `json:"service"`
	// Target is the port on the workload. In Service.Ports, 0 means that it
	// differs by endpoint and each endpoint says its own.
	Target      uint16 `json:"target"`
	AppProtocol string `json:"appProtocol,omitempty"` // "", http, http2, grpc, tcp, tls
}

// A Membership says that a workload is an endpoint of a service, and at which
// ports.
type Membership struct {
	Service ServiceName `json:"service"`
	Ports   []Port      `json:"ports"`
}

// A Workload is one thing that runs and has addresses: a pod, a virtual machine or an
// external endpoint.
type Workload struct {
	UID       UID          `json:"uid"`
	Name      Name         `json:"name"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Host      Host         `json:"host,omitempty"` // set when it is reached by name instead of address
	Network   string       `json:"network,omitempty"`
	Cluster   string       `json:"cluster,omitempty"`
	Node      string       `json:"node,omitempty"`
	Locality  Locality     `json:"locality,omitzero"`

	Identity    Identity  `json:"identity"`
	Transport   Transport `json:"transport"`
	HostNetwork bool      `json:"hostNetwork,omitempty"`
	AppTunnel   AppTunnel `json:"appTunnel,omitzero"`
	// Waypoint is the proxy that all traffic to this workload's own addresses
	// goes through.
	Waypoint GatewayRef `json:"waypoint,omitzero"`

	Healthy bool `json:"healthy"` // takes new connections; false while starting or terminating
	// Capacity is the share of a service's connections that the workload gets,
	// relative to others that are as near. Nil is 1, and 0 gets none.
	Capacity *uint32 `json:"capacity,omitempty"`
	// Direct says that connections with others that are Direct too may stay
	// within a node, without a tunnel, after the same authorization.
	Direct bool `json:"direct,omitempty"`

	CanonicalName     string `json:"canonicalName,omitempty"`
	CanonicalRevision string `json:"canonicalRevision,omitempty"`
	// Owner is the controller the workload belongs to, for telemetry.
	Owner Owner `json:"owner,omitzero"`

	Services []Membership `json:"services,omitempty"` // sorted by service
	// Labels are those of the pod's labels whose keys some subset of a
	// TrafficPolicy asks for.
	Labels map[string]string `json:"labels,omitempty"`
	// Policies are the authorization policies that select this workload by
	// label or were made for it. Policies of its namespace and of the whole
	// mesh apply too and are not listed. A listed policy that has not arrived
	// denies.
	Policies []Name `json:"policies,omitempty"`
}

// An AppTunnel says how the workload itself is told about a connection that
// came to it through a tunnel. The zero AppTunnel tells it nothing.
type AppTunnel struct {
	// Proxy puts a header of the PROXY protocol, version 2, before the bytes:
	// the source, the target, and the identity that the source has proved.
	Proxy bool `json:"proxy,omitempty"`
	// Port is where the workload takes such connections; 0 is the port that
	// was asked for.
	Port uint16 `json:"port,omitempty"`
}

// An Owner is what created a workload.
type Owner struct {
	Kind string `json:"kind"` // deployment, cronjob, pod or job
	Name string `json:"name"`
}

// A VIP is a virtual address of a service, or a range of them.
type VIP struct {
	Network string       `json:"network,omitempty"`
	Prefix  netip.Prefix `json:"prefix"`
}

// Preference is one step of a service's wish for near endpoints.
type Preference string

// The preferences, in the order a service may list them.
const (
	PreferNetwork Preference = "network"
	PreferRegion  Preference = "region"
	PreferZone    Preference = "zone"
	PreferSubzone Preference = "subzone"
	PreferNode    Preference = "node"
	PreferCluster Preference = "cluster"
)

// BalanceMode says what happens when no endpoint meets the preferences.
type BalanceMode string

// The balance modes. The zero value takes any healthy endpoint.
const (
	BalanceAny         BalanceMode = ""
	BalanceStrict      BalanceMode = "strict"      // only endpoints that meet every preference
	BalanceFailover    BalanceMode = "failover"    // those that meet most of them, then fewer
	BalancePassthrough BalanceMode = "passthrough" // dial the asked address itself
)

// A Service is a host name with virtual addresses, and a wish for how its
// endpoints are chosen. Its endpoints are the workloads that list it.
type Service struct {
	Name      ServiceName `json:"name"`
	ShortName string      `json:"shortName"` // the Kubernetes object's name
	VIPs      []VIP       `json:"vips,omitempty"`
	// ExternalAddresses are those at which the service is reached from outside
	// the cluster: of a load balancer, or routed to its nodes. Its name does
	// not resolve to them, and they may be a node's or shared with other
	// services, so they are the service's at its own ports only.
	ExternalAddresses []netip.Addr `json:"externalAddresses,omitempty"`
	Ports             []Port       `json:"ports,omitempty"`
	// SubjectAltNames are identities that may answer for the service beside
	// those of its workloads.
	SubjectAltNames []string     `json:"subjectAltNames,omitempty"`
	Waypoint        GatewayRef   `json:"waypoint,omitzero"`
	Preferences     []Preference `json:"preferences,omitempty"`
	Mode            BalanceMode  `json:"mode,omitempty"`
	AllowUnhealthy  bool         `json:"allowUnhealthy,omitempty"` // publishNotReadyAddresses
	IPFamilies      string       `json:"ipFamilies,omitempty"`     // "", ipv4, ipv6, dual
	// Canonical marks the service that a host name means to those who have none
	// of that name in their own namespace.
	Canonical bool `json:"canonical,omitempty"`
	// Private services are found by name in their own namespace only.
	Private bool `json:"private,omitempty"`
}
