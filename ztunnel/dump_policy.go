package ztunnel

import (
	"net/netip"

	"github.com/weft-mesh/weft/mesh"
)

type dumpPolicy struct {
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Scope     string          `json:"scope"`
	Action    string          `json:"action"`
	DryRun    bool            `json:"dryRun,omitempty"`
	Rules     [][][]dumpMatch `json:"rules"`
}

// dumpMatch is what a node proxy knows of a mesh.Match. What is about requests
// never comes here: it is Unknown.
type dumpMatch struct {
	Namespaces          []dumpString         `json:"namespaces,omitempty"`
	NotNamespaces       []dumpString         `json:"notNamespaces,omitempty"`
	ServiceAccounts     []dumpServiceAccount `json:"serviceAccounts,omitempty"`
	NotServiceAccounts  []dumpServiceAccount `json:"notServiceAccounts,omitempty"`
	Principals          []dumpString         `json:"principals,omitempty"`
	NotPrincipals       []dumpString         `json:"notPrincipals,omitempty"`
	SourceIPs           []netip.Prefix       `json:"sourceIps,omitempty"`
	NotSourceIPs        []netip.Prefix       `json:"notSourceIps,omitempty"`
	DestinationIPs      []netip.Prefix       `json:"destinationIps,omitempty"`
	NotDestinationIPs   []netip.Prefix       `json:"notDestinationIps,omitempty"`
	DestinationPorts    []uint16             `json:"destinationPorts,omitempty"`
	NotDestinationPorts []uint16             `json:"notDestinationPorts,omitempty"`
	Unknown             bool                 `json:"unknown,omitempty"`
}

// A dumpString is one string under the name of how it is compared: Exact,
// Prefix or Suffix; Presence has an empty list.
type dumpString map[string]any

type dumpServiceAccount struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

func policyDump(p *mesh.Policy) dumpPolicy {
	d := dumpPolicy{Name: p.Name.Name, Namespace: p.Name.Namespace, DryRun: p.DryRun, Rules: [][][]dumpMatch{}}
	d.Scope = map[mesh.Scope]string{
		mesh.ScopeGlobal: "Global", mesh.ScopeNamespace: "Namespace", mesh.ScopeSelector: "WorkloadSelector",
	}[p.Scope]
	d.Action = map[mesh.Action]string{mesh.Allow: "Allow", mesh.Deny: "Deny"}[p.Action]
	for _, g := range p.Groups {
		clauses := [][]dumpMatch{}
		for _, c := range g.Clauses {
			matches := []dumpMatch{}
			for _, m := range c.Matches {
				matches = append(matches, matchDump(m))
			}
			clauses = append(clauses, matches)
		}
		d.Rules = append(d.Rules, clauses)
	}
	return d
}

func matchDump(m mesh.Match) dumpMatch {
	return dumpMatch{
		Namespaces: stringsDump(m.Namespaces), NotNamespaces: stringsDump(m.NotNamespaces),
		ServiceAccounts: accountsDump(m.ServiceAccounts), NotServiceAccounts: accountsDump(m.NotServiceAccounts),
		Principals: stringsDump(m.Principals), NotPrincipals: stringsDump(m.NotPrincipals),
		SourceIPs: m.SourceIPs, NotSourceIPs: m.NotSourceIPs,
		DestinationIPs: m.DestinationIPs, NotDestinationIPs: m.NotDestinationIPs,
		DestinationPorts: m.DestinationPorts, NotDestinationPorts: m.NotDestPorts,
		Unknown: m.Unknown,
	}
}

func stringsDump(ms []mesh.StringMatch) []dumpString {
	var out []dumpString
	for _, m := range ms {
		switch m.Kind {
		case mesh.MatchExact:
			out = append(out, dumpString{"Exact": m.Value})
		case mesh.MatchPrefix:
			out = append(out, dumpString{"Prefix": m.Value})
		case mesh.MatchSuffix:
			out = append(out, dumpString{"Suffix": m.Value})
		case mesh.MatchPresence:
			out = append(out, dumpString{"Presence": []string{}})
		default:
			out = append(out, dumpString{"Unknown": m.Value})
		}
	}
	return out
}

func accountsDump(ms []mesh.ServiceAccountMatch) []dumpServiceAccount {
	var out []dumpServiceAccount
	for _, m := range ms {
		out = append(out, dumpServiceAccount(m))
	}
	return out
}
