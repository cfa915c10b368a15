package ztunnel

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/internal/testnet"
)

// An enforcer stands in for a CNI plug-in that enforces NetworkPolicy: filters
// on the node, at the host's end of the pod's wire. They see the packets that
// come from other nodes and pods (forward) and those of the node itself
// (output).
type enforcer struct {
	node *realNode
	link string // towards the pod
}

// ingress lets in only what rules accept, and answers.
func (e enforcer) ingress(rules string) {
	e.node.host.Run("nft", fmt.Sprintf(`
		table inet netpol {
			chain pod {
				ct state established,related accept
				icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
				%s
				meta l4proto tcp reject with tcp reset
				drop
			}
			chain forward { type filter hook forward priority filter
				oifname %q jump pod
			}
			chain output { type filter hook output priority filter
				oifname %q jump pod
			}
		}`, rules, e.link, e.link))
}

// egress lets out only what rules accept.
func (e enforcer) egress(rules string) {
	e.node.host.Run("nft", fmt.Sprintf(`
		table inet netpol {
			chain pod {
				ct state established,related accept
				%s
				meta l4proto tcp reject with tcp reset
				drop
			}
			chain forward { type filter hook forward priority filter
				iifname %q jump pod
			}
		}`, rules, e.link))
}

func (e enforcer) lift() { e.node.host.Run("nft", "delete", "table", "inet", "netpol") }

// TestNetworkPolicyBesideTheMesh: a NetworkPolicy sees the tunnel. It has the
// pods' own addresses, and port 15008 whatever the application's is.
func TestNetworkPolicyBesideTheMesh(t *testing.T) {
	score := newCard(t)
	const (
		meshed  = "from a pod of the mesh"
		plain   = "from outside"
		kubelet = "from the node"
	)
	tests := []struct {
		row     string
		egress  bool
		rules   func(s *street) string
		blocked []string
		works   []string
	}{
		{row: "netpol.default_deny", rules: func(*street) string { return "" }, blocked: []string{meshed, plain}},
		{row: "netpol.probes_under_default_deny", rules: func(s *street) string {
			return fmt.Sprintf("ip saddr %v accept\nip6 saddr %v accept", s.two.host.V4, s.two.host.V6) +
				// A bridge's node speaks to its pods from the bridge's addresses.
				"\nfib saddr type local accept"
		}, blocked: []string{meshed, plain}, works: []string{kubelet}},
		{row: "netpol.allow_15008", rules: func(*street) string { return "tcp dport 15008 accept" }, blocked: []string{plain}, works: []string{meshed}},
		{row: "netpol.allow_app_port", rules: func(*street) string { return "tcp dport 8080 accept" }, blocked: []string{meshed}, works: []string{plain}},
		{row: "netpol.pair_allowed", rules: func(s *street) string {
			return fmt.Sprintf("ip saddr %v tcp dport 15008 accept\nip6 saddr %v tcp dport 15008 accept", s.client.V4, s.client.V6)
		}, blocked: []string{plain}, works: []string{meshed}},
		{row: "netpol.pair_denied", rules: func(s *street) string {
			return fmt.Sprintf("ip saddr %v meta l4proto tcp reject with tcp reset\nip6 saddr %v meta l4proto tcp reject with tcp reset\naccept", s.client.V4, s.client.V6)
		}, blocked: []string{meshed}, works: []string{plain}},
		{row: "netpol.egress_app_port", egress: true, rules: func(*street) string { return "tcp dport 8080 accept" }, blocked: []string{meshed}},
		{row: "netpol.egress_15008", egress: true, rules: func(*street) string { return "tcp dport 15008 accept" }, works: []string{meshed}},
	}
	for _, tt := range tests {
		t.Run(tt.row, func(t *testing.T) {
			s := newStreet(t)
			serveApp(t, s.server.Host, ":8080")
			e := enforcer{s.two, "cni0"}
			if tt.egress {
				e = enforcer{s.one, s.client.Veth}
				e.egress(tt.rules(s))
			} else {
				e.ingress(tt.rules(s))
			}
			try := func(way string, to netip.Addr) (string, error) {
				at := netip.AddrPortFrom(to, 8080)
				switch way {
				case meshed:
					return answers(s.client.NS, netip.Addr{}, at)
				case plain:
					return answers(s.outside.NS, netip.Addr{}, at)
				}
				return answers(s.two.host.NS, netip.Addr{}, at)
			}
			to := []netip.Addr{s.server.V4, s.server.V6}
			for _, way := range tt.blocked {
				for _, a := range to {
					for range 3 {
						saw, err := try(way, a)
						score.attack(tt.row+".denied", err != nil)
						if err == nil {
							t.Errorf("%s to %v: answered %q", way, a, saw)
						}
					}
				}
			}
			for _, way := range tt.works {
				for _, a := range to {
					saw, err := try(way, a)
					score.use(tt.row+".allowed", err == nil)
					if err != nil {
						t.Errorf("%s to %v: %v", way, a, err)
					}
					client, _, _ := strings.Cut(saw, " ")
					if way == kubelet && !has(t, s.two.host.Host, client) {
						t.Errorf("the application sees %q, want an address of the node", saw)
					}
				}
			}
			// It was the policy, and nothing else.
			e.lift()
			for _, way := range tt.blocked {
				for _, a := range to {
					if _, err := try(way, a); err != nil {
						t.Errorf("%s to %v, without the policy: %v", way, a, err)
					}
				}
			}
		})
	}
}

// TestPoliciesThatComeLater: a NetworkPolicy ends no open tunnel, and new
// connections go through it. An AuthorizationPolicy does not wait.
func TestPoliciesThatComeLater(t *testing.T) {
	s := newStreet(t)
	score := newCard(t)
	serveApp(t, s.server.Host, ":8080")
	// As kube-proxy does, something makes the node track connections.
	s.two.host.Run("nft", `
		table inet proxy {
			chain forward { type filter hook forward priority -10
				ct state new accept
			}
		}`)
	for _, a := range []netip.Addr{s.server.V4, s.server.V6} {
		if _, err := answers(s.client.NS, netip.Addr{}, netip.AddrPortFrom(a, 8080)); err != nil {
			t.Fatal(err)
		}
	}
	enforcer{s.two, "cni0"}.ingress("")
	for _, denied := range []bool{false, true} {
		if denied {
			s.setPolicies(denyFrom("client", "client"))
		}
		for _, a := range []netip.Addr{s.server.V4, s.server.V6} {
			_, err := answers(s.client.NS, netip.Addr{}, netip.AddrPortFrom(a, 8080))
			if denied {
				score.attack("netpol.late_authorization", err != nil)
			} else if err != nil {
				t.Errorf("through the open tunnel, to %v: %v; say so in docs/security.md", a, err)
			}
		}
	}
}

// has reports whether the host has the address.
func has(t *testing.T, h *testnet.Host, addr string) bool {
	t.Helper()
	own, err := h.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range own {
		if a.String() == addr {
			return true
		}
	}
	return false
}
