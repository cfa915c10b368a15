package control

import (
	"errors"
	"fmt"
	"net"
	"regexp"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// A Config is what the user says about the control service. Start from
// Defaults.
type Config struct {
	Namespace   string // that Weft runs in; policies here are for the whole mesh
	TrustDomain string
	Cluster     string // id of this cluster in the names of workloads
	Domain      string // DNS domain of the cluster's services
	Network     string // network of this cluster's pods; "" when there is one only
	// NodeAccounts are the service accounts of node proxies. They, and nobody
	// else, may subscribe to the mesh and ask for the identities of the pods
	// on their node.
	NodeAccounts []mesh.Name
	// IstioWaypoints also serves the GatewayClass istio-waypoint: only where
	// Istio itself does not.
	IstioWaypoints bool
	// The addresses to listen on: gRPC over TLS for proxies; the webhook, over
	// TLS; metrics; health; and profiles and log levels, for which nobody is
	// authenticated.
	GRPC, Webhook, Metrics, Health, Debug string
}

// Defaults returns the Config of a service about which nothing is said but
// its namespace.
func Defaults(namespace string) Config {
	if namespace == "" {
		namespace = "weft-system"
	}
	return Config{
		Namespace:    namespace,
		TrustDomain:  "cluster.local",
		Cluster:      "Kubernetes",
		Domain:       "cluster.local",
		NodeAccounts: []mesh.Name{{Namespace: namespace, Name: "ztunnel"}},
		GRPC:         ":15012",
		Webhook:      ":15017",
		Metrics:      ":15014",
		Health:       ":15021",
		Debug:        "127.0.0.1:15000",
	}
}

var (
	// dnsName is RFC 1123: labels of letters, digits and dashes.
	dnsName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	// trustDomain is SPIFFE-ID 2.1.
	trustDomain = regexp.MustCompile(`^[a-z0-9._-]{1,255}$`)
	// plainName may stand between the slashes of a workload's UID.
	plainName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)
)

// Validate returns everything that is wrong with c, joined, or nil.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(dnsName.MatchString(c.Namespace), "namespace %q: want a Kubernetes name", c.Namespace)
	check(trustDomain.MatchString(c.TrustDomain), "trust domain %q: want lower-case letters, digits, dots, dashes and underscores", c.TrustDomain)
	check(plainName.MatchString(c.Cluster), "cluster id %q: want letters, digits, dots, dashes and underscores", c.Cluster)
	check(dnsName.MatchString(c.Domain), "cluster domain %q: want a DNS name such as cluster.local", c.Domain)
	check(c.Network == "" || plainName.MatchString(c.Network), "network %q: want letters, digits, dots, dashes and underscores", c.Network)
	check(len(c.NodeAccounts) > 0, "no node account is named: no proxy could ever get a certificate")
	for _, a := range c.NodeAccounts {
		check(dnsName.MatchString(a.Namespace) && dnsName.MatchString(a.Name), "node account %q: want namespace/name", a)
	}
	for _, l := range []struct{ name, addr string }{{"grpc", c.GRPC}, {"webhook", c.Webhook}, {"metrics", c.Metrics}, {"health", c.Health}, {"debug", c.Debug}} {
		_, _, err := net.SplitHostPort(l.addr)
		check(err == nil, "%s address %q: want host:port", l.name, l.addr)
	}
	return errors.Join(errs...)
}

// Settings returns what compile needs of c.
func (c Config) Settings() compile.Settings {
	return compile.Settings{
		Cluster: c.Cluster, TrustDomain: c.TrustDomain, Domain: c.Domain, Network: c.Network, RootNamespace: c.Namespace,
		IstioWaypoints: c.IstioWaypoints,
	}
}

// ServerNames returns the DNS names by which proxies may know the service:
// its own, and the one that proxies made for Istio look for.
func (c Config) ServerNames() []string {
	svc := "weft-control." + c.Namespace
	return []string{"weft-control", svc, svc + ".svc", svc + ".svc." + c.Domain, "istiod." + c.Namespace + ".svc"}
}
