package cluster

import "fmt"

// Every cluster lives in network namespaces of its own that nothing routes to,
// so all clusters use the same addresses and cannot meet. IPv6 is fd57:eff7::/32
// with one /64 for the nodes and one for the pods of each node.
const (
	apiPort      = 6443
	controlIP4   = "172.30.0.1"
	controlIP6   = "fd57:eff7::1"
	serviceCIDR4 = "10.96.0.0/16"
	serviceCIDR6 = "fd57:eff7:96::/112"
	apiServiceIP = "10.96.0.1"
	// DNSAddress4 and DNSAddress6 are where the cluster's DNS answers.
	DNSAddress4 = "10.96.0.10"
	DNSAddress6 = "fd57:eff7:96::a"
	podCIDR4    = "10.244.0.0/16"
	podCIDR6    = "fd57:eff7:244::/48"
)

// nodes is how many nodes a cluster has.
const nodes = 2

// NodeName returns the name of node n, counted from 1.
func NodeName(n int) string { return fmt.Sprintf("node%d", n) }

func nodeAddresses(n int) []string {
	return []string{fmt.Sprintf("172.30.0.%d", 10+n), fmt.Sprintf("fd57:eff7::%d", 10+n)}
}

func nodePodCIDRs(n int) []string {
	return []string{fmt.Sprintf("10.244.%d.0/24", n), fmt.Sprintf("fd57:eff7:244:%d::/64", n)}
}
