package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// PluginType is the "type" of our entry in a conflist, and so the name of the
// plugin's binary.
const PluginType = "weft-cni"

// An Entry is our element of a conflist's plugins, without what the runtime
// adds. Its zero value is not usable: the plugin needs to know its agent.
type Entry struct {
	// AgentSocket is the path of the agent's unix socket on the host.
	AgentSocket string `json:"agentSocket"`
	// ExcludeNamespaces are those whose pods start without asking the agent,
	// so that the agent and what it stands on can start.
	ExcludeNamespaces []string `json:"excludeNamespaces"`
}

// MarshalJSON writes the entry with its plugin type, as a conflist has it.
func (e Entry) MarshalJSON() ([]byte, error) {
	type plain Entry // without this method
	return json.Marshal(struct {
		Type string `json:"type"`
		plain
	}{PluginType, plain(e)})
}

// netConf is what the runtime gives the plugin on standard input.
type netConf struct {
	types.PluginConf
	AgentSocket       string   `json:"agentSocket"`
	ExcludeNamespaces []string `json:"excludeNamespaces"`

	// raw is prevResult as it came.
	raw json.RawMessage
}

// parseConf reads the configuration of one call.
func parseConf(stdin []byte) (*netConf, error) {
	var c netConf
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, fmt.Errorf("parse the plugin's configuration: %v", err)
	}
	if c.AgentSocket == "" {
		return nil, fmt.Errorf("parse the plugin's configuration: agentSocket is not set; the weft-node agent repairs the entry when it runs on this node")
	}
	var raw struct {
		PrevResult json.RawMessage `json:"prevResult"`
	}
	if err := json.Unmarshal(stdin, &raw); err != nil {
		return nil, fmt.Errorf("parse the plugin's configuration: %v", err)
	}
	c.raw = raw.PrevResult
	return &c, nil
}

// previous returns the addresses in the result of the plugins before ours, and
// that result byte by byte.
func (c *netConf) previous() ([]netip.Addr, json.RawMessage, error) {
	if c.RawPrevResult == nil {
		return nil, nil, errors.New("read prevResult: there is none; weft-cni has to come after a plugin that makes the pod's interface, in a conflist of cniVersion 0.3.0 or newer")
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, nil, fmt.Errorf("read prevResult: %v", err)
	}
	res, err := current.NewResultFromResult(c.PrevResult)
	if err != nil {
		return nil, nil, fmt.Errorf("read prevResult: %v", err)
	}
	var addrs []netip.Addr
	for _, ip := range res.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, nil, fmt.Errorf("read prevResult: %q is not an address", ip.Address.String())
		}
		addrs = append(addrs, a.Unmap())
	}
	return addrs, c.raw, nil
}

// excluded reports whether pods of namespace ns start without the agent.
func (c *netConf) excluded(ns string) bool {
	return slices.Contains(c.ExcludeNamespaces, ns)
}

// podArgs are the parts of CNI_ARGS that Kubernetes runtimes set.
type podArgs struct {
	namespace, name, uid string
}

// parseArgs reads CNI_ARGS ("KEY=VALUE;KEY=VALUE"). Keys that are not ours are
// passed over. The zero podArgs means that this sandbox is not a pod. One of
// namespace and name without the other is an error: that pod could be in the
// mesh and we could not tell.
func parseArgs(s string) (podArgs, error) {
	var p podArgs
	for part := range strings.SplitSeq(s, ";") {
		k, v, _ := strings.Cut(part, "=")
		switch strings.TrimSpace(k) {
		case "K8S_POD_NAMESPACE":
			p.namespace = strings.TrimSpace(v)
		case "K8S_POD_NAME":
			p.name = strings.TrimSpace(v)
		case "K8S_POD_UID":
			p.uid = strings.TrimSpace(v)
		}
	}
	if (p.namespace == "") != (p.name == "") {
		return podArgs{}, fmt.Errorf("read CNI_ARGS %q: want both of K8S_POD_NAMESPACE and K8S_POD_NAME, or neither", s)
	}
	return p, nil
}
