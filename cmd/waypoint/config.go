package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/mesh"
)

// config is what the user said. Every field has a flag, whose default may come
// from the environment.
type config struct {
	gateway        string // name of the Gateway; its namespace is the pod's
	controlAddress string // host:port
	controlName    string // DNS name to verify; "" is the host of controlAddress
	trustDomain    string
	cluster        string
	network        string
	rootsFile      string
	tokenFile      string

	podName, podNamespace, podIP, nodeName, serviceAccount string

	accessLog bool
	linger    time.Duration
	drain     time.Duration
	logLevel  string
	logFormat string

	listenAddr, adminAddr, statsAddr, promAddr, readyAddr string
}

// parseConfig reads args; env looks up defaults.
func parseConfig(args []string, env func(string) string) (config, error) {
	var c config
	var errs []error
	fs := flag.NewFlagSet("waypoint", flag.ContinueOnError)
	text := func(p *string, name, key, value, usage string) {
		if key != "" {
			usage += " ($" + key + ")"
			value = cmp.Or(env(key), value)
		}
		fs.StringVar(p, name, value, usage)
	}
	text(&c.gateway, "gateway", "GATEWAY_NAME", "", "name of the Gateway that this is a replica of; its namespace is this pod's")
	text(&c.controlAddress, "control-address", "CONTROL_ADDRESS", "weft-control.weft-system.svc:15012", "host:port of the control service")
	text(&c.controlName, "control-name", "CONTROL_NAME", "", "DNS name that the control service must prove; empty is the host of its address")
	text(&c.trustDomain, "trust-domain", "TRUST_DOMAIN", "cluster.local", "trust domain of the identities of this cluster")
	text(&c.cluster, "cluster-id", "CLUSTER_ID", "Kubernetes", "name of this cluster")
	text(&c.network, "network", "NETWORK", "", "network of this node")
	text(&c.rootsFile, "roots", "ROOTS_FILE", "/var/run/secrets/istio/root-cert.pem", "file with the roots of the trust domain, PEM")
	text(&c.tokenFile, "token", "TOKEN_FILE", "/var/run/secrets/tokens/istio-token", "file with the service-account token for the audience istio-ca")
	text(&c.podName, "pod-name", "POD_NAME", "", "name of this pod")
	text(&c.podNamespace, "pod-namespace", "POD_NAMESPACE", "", "namespace of this pod")
	text(&c.podIP, "pod-ip", "INSTANCE_IP", "", "address of this pod")
	text(&c.nodeName, "node-name", "NODE_NAME", "", "name of this node")
	text(&c.serviceAccount, "service-account", "SERVICE_ACCOUNT", "", "service account of this pod: it is the waypoint's identity")
	var access, linger, drain string
	text(&access, "access-log", "ACCESS_LOG", "true", "write access logs to the standard output, if the mesh wants any: true or false")
	text(&linger, "linger", "LINGER", "1s", "how long new connections are taken after the end was asked for")
	text(&drain, "drain", "DRAIN_TIMEOUT", "20s", "how long what is open may last after that; keep both together under the pod's grace period")
	text(&c.logLevel, "log-level", "LOG_LEVEL", "info", "trace, debug, info, warn or error")
	text(&c.logFormat, "log-format", "LOG_FORMAT", "text", "text or json")
	text(&c.listenAddr, "listen", "", ":15008", "address of the tunnels")
	text(&c.adminAddr, "admin", "", "127.0.0.1:15000", "address of the pages for debugging; they change the process, keep them on localhost")
	text(&c.statsAddr, "stats", "", ":15020", "address of the metrics")
	text(&c.promAddr, "envoy-stats", "", ":15090", "a second address of the metrics, where scrapers look for those of sidecars")
	text(&c.readyAddr, "ready", "", ":15021", "address of the health pages")
	if err := fs.Parse(args); err != nil {
		return config{}, err
	}
	if fs.NArg() > 0 {
		errs = append(errs, fmt.Errorf("arguments %q are not known", fs.Args()))
	}
	var err error
	if c.accessLog, err = strconv.ParseBool(access); err != nil {
		errs = append(errs, fmt.Errorf("access-log is %q: want true or false", access))
	}
	for _, d := range []struct {
		to         *time.Duration
		name, text string
	}{{&c.linger, "linger", linger}, {&c.drain, "drain", drain}} {
		if *d.to, err = time.ParseDuration(d.text); err != nil || *d.to < 0 {
			errs = append(errs, fmt.Errorf("%s is %q: want a duration such as 20s", d.name, d.text))
		}
	}
	return c, errors.Join(append(errs, c.validate())...)
}

// validate returns all that is wrong, joined.
func (c config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, f := range []struct{ name, value, why string }{
		{"gateway", c.gateway, "which services are served depends on it; set $GATEWAY_NAME"},
		{"trust-domain", c.trustDomain, "it is part of every identity"},
		{"roots", c.rootsFile, "without roots nobody can be verified"},
		{"token", c.tokenFile, "the control service wants to know who asks"},
		{"pod-name", c.podName, "set $POD_NAME from metadata.name"},
		{"pod-namespace", c.podNamespace, "set $POD_NAMESPACE from metadata.namespace"},
		{"service-account", c.serviceAccount, "set $SERVICE_ACCOUNT from spec.serviceAccountName"},
	} {
		if f.value == "" {
			bad("%s is empty: %s", f.name, f.why)
		}
	}
	if _, err := netip.ParseAddr(c.podIP); err != nil {
		bad("pod-ip is %q: set $INSTANCE_IP from status.podIP", c.podIP)
	}
	for _, f := range []struct{ name, value string }{
		{"control-address", c.controlAddress}, {"listen", c.listenAddr}, {"admin", c.adminAddr}, {"stats", c.statsAddr},
		{"envoy-stats", c.promAddr}, {"ready", c.readyAddr},
	} {
		if _, _, err := net.SplitHostPort(f.value); err != nil {
			bad("%s is %q: want host:port", f.name, f.value)
		}
	}
	if _, err := obs.ParseLevel(c.logLevel); err != nil {
		bad("log-level: %w", err)
	}
	if c.logFormat != "text" && c.logFormat != "json" {
		bad("log-format is %q: want text or json", c.logFormat)
	}
	return errors.Join(errs...)
}

// id is who this waypoint is.
func (c config) id() mesh.Identity {
	return mesh.Identity{TrustDomain: c.trustDomain, Namespace: c.podNamespace, ServiceAccount: c.serviceAccount}
}

// gatewayName is the Gateway that this is a replica of.
func (c config) gatewayName() mesh.Name {
	return mesh.Name{Namespace: c.podNamespace, Name: c.gateway}
}

// pod is the pod that this runs in.
func (c config) pod() mesh.Name { return mesh.Name{Namespace: c.podNamespace, Name: c.podName} }

// serverName is the name that the control service must prove.
func (c config) serverName() string {
	host, _, _ := net.SplitHostPort(c.controlAddress) // validated
	return cmp.Or(c.controlName, host)
}
