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
)

// config is what the user said. Every field has a flag, whose default may come
// from the environment.
type config struct {
	controlAddress string // host:port
	controlName    string // DNS name to verify; "" is the host of controlAddress
	trustDomain    string
	cluster        string
	network        string
	rootsFile      string
	tokenFile      string
	handoffPath    string
	handoverPath   string

	podName, podNamespace, podIP, nodeName string

	standby   bool
	sameNode  bool
	accessLog bool
	drain     time.Duration
	hold      time.Duration
	logLevel  string
	logFormat string

	adminAddr, statsAddr, readyAddr string
}

// parseConfig reads args; env looks up defaults.
func parseConfig(args []string, env func(string) string) (config, error) {
	var c config
	var errs []error
	fs := flag.NewFlagSet("ztunnel", flag.ContinueOnError)
	text := func(p *string, name, key, value, usage string) {
		if key != "" {
			usage += " ($" + key + ")"
			value = cmp.Or(env(key), value)
		}
		fs.StringVar(p, name, value, usage)
	}
	yes := func(p *bool, name, key string, value bool, usage string) {
		if s := env(key); s != "" {
			b, err := strconv.ParseBool(s)
			if err != nil {
				errs = append(errs, fmt.Errorf("$%s is %q: want true or false", key, s))
			}
			value = b
		}
		fs.BoolVar(p, name, value, usage+" ($"+key+")")
	}
	text(&c.controlAddress, "control-address", "CONTROL_ADDRESS", "weft-control.weft-system.svc:15012", "host:port of the control service")
	text(&c.controlName, "control-name", "CONTROL_NAME", "", "DNS name that the control service must prove; empty is the host of its address")
	text(&c.trustDomain, "trust-domain", "TRUST_DOMAIN", "cluster.local", "trust domain of the identities of this cluster")
	text(&c.cluster, "cluster-id", "CLUSTER_ID", "Kubernetes", "name of this cluster")
	text(&c.network, "network", "NETWORK", "", "network of this node")
	text(&c.rootsFile, "roots", "ROOTS_FILE", "/var/run/secrets/istio/root-cert.pem", "file with the roots of the trust domain, PEM")
	text(&c.tokenFile, "token", "TOKEN_FILE", "/var/run/secrets/tokens/istio-token", "file with the service-account token for the audience istio-ca")
	text(&c.handoffPath, "handoff", "HANDOFF_SOCKET", "/var/run/weft/handoff.sock", "socket of the node agent")
	text(&c.handoverPath, "handover", "HANDOVER_SOCKET", "/var/run/weft/handover.sock", "socket by which ztunnels of this node hand established connections over to their successors; its directory is root's")
	text(&c.podName, "pod-name", "POD_NAME", "", "name of this pod")
	text(&c.podNamespace, "pod-namespace", "POD_NAMESPACE", "", "namespace of this pod")
	text(&c.podIP, "pod-ip", "INSTANCE_IP", "", "address of this pod")
	text(&c.nodeName, "node-name", "NODE_NAME", "", "name of this node")
	yes(&c.sameNode, "same-node", "SAME_NODE", false, "carry connections between two pods of this node without TLS and past the pods' interfaces, after the same authorization; the CNI's NetworkPolicy does not see them")
	yes(&c.accessLog, "access-log", "ACCESS_LOG", true, "write a line for each connection to the standard output; of one that went well only if the log level is info or lower")
	yes(&c.standby, "standby", "STANDBY", false, "stand by for the other ztunnel of this pod: take pods and certificates, and accept connections when the other one is gone")
	drain := "20s"
	text(&drain, "drain", "DRAIN_TIMEOUT", drain, "how long open connections may last after the end was asked for; keep it under the pod's grace period")
	hold := "10s"
	text(&hold, "waypoint-hold", "WAYPOINT_HOLD", hold, "how long a connection waits for a waypoint that is not there or not ready, before it is refused")
	text(&c.logLevel, "log-level", "LOG_LEVEL", "info", "trace, debug, info, warn or error")
	text(&c.logFormat, "log-format", "LOG_FORMAT", "text", "text or json")
	text(&c.adminAddr, "admin", "", "127.0.0.1:15000", "address of the pages for debugging; they change the process, keep them on localhost")
	text(&c.statsAddr, "stats", "", ":15020", "address of the metrics")
	text(&c.readyAddr, "ready", "", ":15021", "address of the health pages")
	if err := fs.Parse(args); err != nil {
		return config{}, err
	}
	if fs.NArg() > 0 {
		errs = append(errs, fmt.Errorf("arguments %q are not known", fs.Args()))
	}
	var err error
	if c.drain, err = time.ParseDuration(drain); err != nil {
		errs = append(errs, fmt.Errorf("drain is %q: want a duration such as 20s", drain))
	}
	if c.hold, err = time.ParseDuration(hold); err != nil || c.hold <= 0 {
		errs = append(errs, fmt.Errorf("waypoint-hold is %q: want a duration such as 10s", hold))
	}
	return c, errors.Join(append(errs, c.validate())...)
}

// validate returns all that is wrong, joined.
func (c config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, f := range []struct{ name, value, why string }{
		{"trust-domain", c.trustDomain, "it is part of every identity"},
		{"roots", c.rootsFile, "without roots nobody can be verified"},
		{"token", c.tokenFile, "the control service wants to know who asks"},
		{"handoff", c.handoffPath, "pods come from there"},
		{"handover", c.handoverPath, "connections are handed over there"},
		{"pod-name", c.podName, "set $POD_NAME from metadata.name"},
		{"pod-namespace", c.podNamespace, "set $POD_NAMESPACE from metadata.namespace"},
		{"node-name", c.nodeName, "set $NODE_NAME from spec.nodeName"},
	} {
		if f.value == "" {
			bad("%s is empty: %s", f.name, f.why)
		}
	}
	if _, err := netip.ParseAddr(c.podIP); err != nil {
		bad("pod-ip is %q: set $INSTANCE_IP from status.podIP", c.podIP)
	}
	for _, f := range []struct{ name, value string }{
		{"control-address", c.controlAddress}, {"admin", c.adminAddr}, {"stats", c.statsAddr}, {"ready", c.readyAddr},
	} {
		if _, _, err := net.SplitHostPort(f.value); err != nil {
			bad("%s is %q: want host:port", f.name, f.value)
		}
	}
	if c.drain < 0 {
		bad("drain is %v: want a duration that is not negative", c.drain)
	}
	if _, err := obs.ParseLevel(c.logLevel); err != nil {
		bad("log-level: %w", err)
	}
	if c.logFormat != "text" && c.logFormat != "json" {
		bad("log-format is %q: want text or json", c.logFormat)
	}
	return errors.Join(errs...)
}

// instance names this process in logs: two of one pod differ.
func (c config) instance() string {
	if c.standby {
		return c.podName + "/standby"
	}
	return c.podName
}

// serverName is the name that the control service must prove.
func (c config) serverName() string {
	host, _, _ := net.SplitHostPort(c.controlAddress) // validated
	return cmp.Or(c.controlName, host)
}
