package compile

import (
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	securityv1 "istio.io/api/security/v1"

	"github.com/weft-mesh/weft/mesh"
)

// A ruleCompiler compiles the rules of one policy and gathers what is wrong
// with them.
type ruleCompiler struct {
	namespace string // of the policy, for service accounts without one
	deny      bool
	waypoint  bool // it decides on requests, not on connections alone

	invalid []string // complaints about values that mean nothing
	l7      []string // paths of fields that cannot be known where the policy is enforced
}

// A part is one alternative of a clause: what can be checked on a connection,
// and whether something else would have to be checked too.
type part struct {
	match mesh.Match
	l7    bool
}

// rule compiles one rule, and reports false when the rule can never match.
//
// What a connection does not show is unknown, and unknown must not widen
// access. So an ALLOW rule that asks for it anywhere never matches; in a DENY
// rule that question counts as answered with yes.
func (c *ruleCompiler) rule(path string, r *securityv1.Rule) (mesh.Group, bool) {
	var g mesh.Group
	possible := true
	add := func(parts []part) {
		clause, ok := c.clause(parts)
		possible = possible && ok
		if len(clause.Matches) > 0 {
			g.Clauses = append(g.Clauses, clause)
		}
	}
	if from := r.GetFrom(); len(from) > 0 {
		var parts []part
		for i, f := range from {
			parts = append(parts, c.source(fmt.Sprintf("%s.from[%d].source", path, i), f.GetSource()))
		}
		add(parts)
	}
	if to := r.GetTo(); len(to) > 0 {
		var parts []part
		for i, t := range to {
			parts = append(parts, c.operation(fmt.Sprintf("%s.to[%d].operation", path, i), t.GetOperation()))
		}
		add(parts)
	}
	for i, w := range r.GetWhen() {
		add([]part{c.when(fmt.Sprintf("%s.when[%d]", path, i), w)})
	}
	return g, possible
}

// clause joins alternatives. It reports false when the clause makes the whole
// rule impossible. A clause without matches holds always.
func (c *ruleCompiler) clause(parts []part) (mesh.Clause, bool) {
	var out mesh.Clause
	for _, p := range parts {
		if p.l7 && !c.deny {
			return mesh.Clause{}, false
		}
		if reflect.DeepEqual(p.match, mesh.Match{}) {
			return mesh.Clause{}, true // a DENY alternative that holds for every connection
		}
		out.Matches = append(out.Matches, p.match)
	}
	return out, true
}

// A field is one list of a source or operation, as it is written.
type field struct {
	name   string
	values []string
	read   func(path string, values []string) // nil when it cannot be known
}

// read reads the fields of the object at path into the part whose match they
// fill.
func (c *ruleCompiler) read(path string, p *part, fields []field) {
	set := 0
	for _, f := range fields {
		if len(f.values) == 0 {
			continue
		}
		set++
		at := path + "." + f.name
		if f.read == nil {
			p.l7 = true
			c.note(at)
			continue
		}
		f.read(at, f.values)
	}
	if set == 0 {
		c.complain(path, "is empty: name something, or leave it out to match everything")
	}
}

func (c *ruleCompiler) source(path string, s *securityv1.Source) part {
	var p part
	m := &p.match
	c.read(path, &p, []field{
		{"principals", s.GetPrincipals(), c.principals(&m.Principals)},
		{"notPrincipals", s.GetNotPrincipals(), c.principals(&m.NotPrincipals)},
		{"namespaces", s.GetNamespaces(), c.strings(&m.Namespaces)},
		{"notNamespaces", s.GetNotNamespaces(), c.strings(&m.NotNamespaces)},
		{"serviceAccounts", s.GetServiceAccounts(), c.accounts(&m.ServiceAccounts)},
		{"notServiceAccounts", s.GetNotServiceAccounts(), c.accounts(&m.NotServiceAccounts)},
		{"ipBlocks", s.GetIpBlocks(), c.blocks(&m.SourceIPs)},
		{"notIpBlocks", s.GetNotIpBlocks(), c.blocks(&m.NotSourceIPs)},
		{"requestPrincipals", s.GetRequestPrincipals(), nil},
		{"notRequestPrincipals", s.GetNotRequestPrincipals(), nil},
		{"remoteIpBlocks", s.GetRemoteIpBlocks(), c.request(c.blocks(&m.RemoteIPs))},
		{"notRemoteIpBlocks", s.GetNotRemoteIpBlocks(), c.request(c.blocks(&m.NotRemoteIPs))},
		// A connection shows the trust domain, but the wire between control
		// and proxies has no field for it.
		{"trustDomains", s.GetTrustDomains(), nil},
		{"notTrustDomains", s.GetNotTrustDomains(), nil},
	})
	return p
}

// request returns read where requests are decided on, else nil.
func (c *ruleCompiler) request(read func(string, []string)) func(string, []string) {
	if !c.waypoint {
		return nil
	}
	return read
}

func (c *ruleCompiler) operation(path string, o *securityv1.Operation) part {
	var p part
	m := &p.match
	c.read(path, &p, []field{
		{"ports", o.GetPorts(), c.ports(&m.DestinationPorts)},
		{"notPorts", o.GetNotPorts(), c.ports(&m.NotDestPorts)},
		{"hosts", o.GetHosts(), c.request(c.hosts(&m.Hosts))},
		{"notHosts", o.GetNotHosts(), c.request(c.hosts(&m.NotHosts))},
		{"methods", o.GetMethods(), c.request(c.strings(&m.Methods))},
		{"notMethods", o.GetNotMethods(), c.request(c.strings(&m.NotMethods))},
		{"paths", o.GetPaths(), c.request(c.paths(&m.Paths))},
		{"notPaths", o.GetNotPaths(), c.request(c.paths(&m.NotPaths))},
	})
	return p
}

// needsMore reports whether the condition key is known, but needs more than a
// connection to answer.
func needsMore(key string) bool {
	return key == "remote.ip" || key == "connection.sni" || key == "source.trustDomain" ||
		strings.HasPrefix(key, "request.") || strings.HasPrefix(key, "experimental.envoy.filters.")
}

// headerKey returns the name in a key like request.headers[User-Agent].
func headerKey(key string) (string, bool) {
	rest, ok := strings.CutPrefix(key, "request.headers[")
	name, closed := strings.CutSuffix(rest, "]")
	name = strings.ToLower(name)
	return name, ok && closed && (validToken(name) || strings.HasPrefix(name, ":") && validToken(name[1:]))
}

func (c *ruleCompiler) when(path string, w *securityv1.Condition) part {
	var p part
	m := &p.match
	pair := func(values, not func(string, []string)) {
		c.read(path, &p, []field{{"values", w.GetValues(), values}, {"notValues", w.GetNotValues(), not}})
	}
	key := w.GetKey()
	switch header, isHeader := headerKey(key); {
	case c.waypoint && key == "remote.ip":
		pair(c.blocks(&m.RemoteIPs), c.blocks(&m.NotRemoteIPs))
	case c.waypoint && isHeader:
		h := mesh.HeaderMatch{Name: header}
		pair(c.strings(&h.Values), c.strings(&h.NotValues))
		m.Headers = []mesh.HeaderMatch{h}
	case needsMore(key):
		p.l7 = true
		c.note(fmt.Sprintf("%s (%s)", path, key))
	case key == "source.ip":
		pair(c.blocks(&m.SourceIPs), c.blocks(&m.NotSourceIPs))
	case key == "source.namespace":
		pair(c.strings(&m.Namespaces), c.strings(&m.NotNamespaces))
	case key == "source.principal":
		pair(c.principals(&m.Principals), c.principals(&m.NotPrincipals))
	case key == "source.serviceAccount":
		pair(c.accounts(&m.ServiceAccounts), c.accounts(&m.NotServiceAccounts))
	case key == "destination.ip":
		pair(c.blocks(&m.DestinationIPs), c.blocks(&m.NotDestinationIPs))
	case key == "destination.port":
		pair(c.ports(&m.DestinationPorts), c.ports(&m.NotDestPorts))
	default:
		c.complain(path+".key", fmt.Sprintf("is %q, which is not known", key))
	}
	return p
}

func (c *ruleCompiler) complain(path, what string) {
	c.invalid = append(c.invalid, path+" "+what)
}

// eachValue calls read for every value and complains where read does.
func (c *ruleCompiler) eachValue(read func(v string) error) func(string, []string) {
	return func(path string, values []string) {
		for i, v := range values {
			if err := read(v); err != nil {
				c.complain(fmt.Sprintf("%s[%d]", path, i), err.Error())
			}
		}
	}
}

func (c *ruleCompiler) strings(to *[]mesh.StringMatch) func(string, []string) {
	return c.eachValue(func(v string) error {
		m, err := stringMatch(v)
		*to = append(*to, m)
		return err
	})
}

// hosts reads host names, which are compared without regard to case.
func (c *ruleCompiler) hosts(to *[]mesh.StringMatch) func(string, []string) {
	return c.eachValue(func(v string) error {
		m, err := stringMatch(strings.ToLower(v))
		*to = append(*to, m)
		return err
	})
}

// paths reads paths, which may be templates.
func (c *ruleCompiler) paths(to *[]mesh.StringMatch) func(string, []string) {
	return c.eachValue(func(v string) error {
		m, err := pathMatch(v)
		*to = append(*to, m)
		return err
	})
}

// pathMatch reads a path, or a template whose segments may be {*} for any one
// and {**} for any number.
func pathMatch(v string) (mesh.StringMatch, error) {
	if !strings.ContainsAny(v, "{}") {
		return stringMatch(v)
	}
	for i, segment := range strings.Split(v, "/") {
		plain := segment == "{*}" || segment == "{**}" || !strings.ContainsAny(segment, "{}*")
		if i == 0 && segment != "" || !plain {
			return mesh.StringMatch{}, fmt.Errorf("is %q, want a path that begins with / and whose segments are text, {*} or {**}", v)
		}
	}
	return mesh.StringMatch{Kind: mesh.MatchTemplate, Value: v}, nil
}

func (c *ruleCompiler) principals(to *[]mesh.StringMatch) func(string, []string) {
	return c.eachValue(func(v string) error {
		if strings.Contains(v, "://") {
			return fmt.Errorf("is %q: write it without its scheme, as trust-domain/ns/namespace/sa/account", v)
		}
		m, err := stringMatch(v)
		*to = append(*to, m)
		return err
	})
}

func (c *ruleCompiler) accounts(to *[]mesh.ServiceAccountMatch) func(string, []string) {
	return c.eachValue(func(v string) error {
		ns, sa, ok := strings.Cut(v, "/")
		if !ok {
			ns, sa = c.namespace, v
		}
		if ns == "" || sa == "" || strings.ContainsAny(v, "*") || strings.Contains(sa, "/") {
			return fmt.Errorf("is %q, want account or namespace/account without wildcards", v)
		}
		*to = append(*to, mesh.ServiceAccountMatch{Namespace: ns, ServiceAccount: sa})
		return nil
	})
}

func (c *ruleCompiler) blocks(to *[]netip.Prefix) func(string, []string) {
	return c.eachValue(func(v string) error {
		p, err := readBlock(v)
		*to = append(*to, p)
		return err
	})
}

func (c *ruleCompiler) ports(to *[]uint16) func(string, []string) {
	return c.eachValue(func(v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("is %q, want a port from 1 to 65535", v)
		}
		*to = append(*to, uint16(n))
		return nil
	})
}

// readBlock reads an address, or a range of them as CIDR.
func readBlock(v string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(v); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(v)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("is %q, want an IP address or a CIDR", v)
	}
	return p.Masked(), nil
}

// stringMatch reads "abc", "abc*", "*abc" or "*". A star anywhere else never
// meant anything; in a Not list it would silently open what it should close.
func stringMatch(v string) (mesh.StringMatch, error) {
	out := mesh.StringMatch{Kind: mesh.MatchExact, Value: v}
	if v == "*" {
		return mesh.StringMatch{Kind: mesh.MatchPresence}, nil
	}
	if rest, ok := strings.CutSuffix(v, "*"); ok {
		out = mesh.StringMatch{Kind: mesh.MatchPrefix, Value: rest}
	} else if rest, ok := strings.CutPrefix(v, "*"); ok {
		out = mesh.StringMatch{Kind: mesh.MatchSuffix, Value: rest}
	}
	if out.Value == "" || strings.Contains(out.Value, "*") {
		return mesh.StringMatch{}, fmt.Errorf("is %q, want text with at most one star, at its beginning or end", v)
	}
	return out, nil
}
