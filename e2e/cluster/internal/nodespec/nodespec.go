// Package nodespec is what the cluster tool tells a node's first process: one
// value, handed over as a JSON file.
package nodespec

import (
	"encoding/json"
	"fmt"
	"os"
)

// A Node says how one node of the cluster is to be built. Paths are those of
// the machine; the node sees StateDir and ProgramDir at the same place.
type Node struct {
	Name       string
	StateDir   string   // of the whole cluster
	Dir        string   // of this node, below StateDir
	LogDir     string   // below StateDir
	ImageDir   string   // archives to import before the kubelet starts
	ProgramDir string   // holds Hyper and Self; seen read-only
	Hyper      string   // the Kubernetes programs
	Self       string   // the node program, for the runc wrapper
	Runc       string   // the machine's runc
	PluginDir  string   // the machine's CNI plugins
	Addresses  []string // of the node, IPv4 first
	PodCIDRs   []string // of this node, IPv4 first
	ClusterPod []string // pod CIDRs of the whole cluster, IPv4 first
	ClusterDNS []string
	APIServer  string // host:port

	ClientCA    string // files
	ServingCert string
	ServingKey  string
	Kubeconfig  string
	ProxyConfig string // kube-proxy's kubeconfig

	// Hierarchies are the node's cgroups. With UnifiedOnly only the version 2
	// hierarchy is shown, at /sys/fs/cgroup.
	Hierarchies []Hierarchy
	UnifiedOnly bool
	// NoLimits says that the shown version 2 hierarchy lacks the controllers
	// that containers' limits need, so that runc must not be asked for any.
	NoLimits bool

	ProxyMode string // nftables or iptables
	CNI       string // bridge or ptp
}

// A Hierarchy is one cgroup hierarchy of the machine and our group in it.
type Hierarchy struct {
	// Options are the mount options that choose a version 1 hierarchy, such as
	// "cpu,cpuacct" or "none,name=systemd". Empty means version 2.
	Options string
	// Mount is the name of its mount point, such as "cpu,cpuacct" or "unified".
	Mount string
	// Dir is our group, a path on the machine.
	Dir string
}

// Read reads a Node from a JSON file.
func Read(path string) (Node, error) {
	var n Node
	b, err := os.ReadFile(path)
	if err != nil {
		return n, err
	}
	if err := json.Unmarshal(b, &n); err != nil {
		return n, fmt.Errorf("read %s: %w", path, err)
	}
	return n, nil
}

// Write writes n as a JSON file.
func (n Node) Write(path string) error {
	b, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}
