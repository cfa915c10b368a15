package compile

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
	"k8s.io/apimachinery/pkg/api/validate/content"

	"github.com/weft-mesh/weft/mesh"
)

// httpMatches compiles the matches of a rule that are for the mesh.
func (c vsCompiler) httpMatches(path string, r *networking.HTTPRoute, out *vsRule) {
	if len(r.GetMatch()) == 0 {
		out.all = inMesh(c.gateways, nil)
		return
	}
	for i, m := range r.GetMatch() {
		at := fmt.Sprintf("%s.match[%d]", path, i)
		for j, g := range m.GetGateways() {
			checkGatewayName(c.found, fmt.Sprintf("%s.gateways[%d]", at, j), g)
		}
		compiled := c.httpMatch(at, m, r.GetRewrite().GetUri() != "")
		if inMesh(c.gateways, m.GetGateways()) {
			out.matches = append(out.matches, compiled)
		}
	}
}

func (c vsCompiler) httpMatch(path string, m *networking.HTTPMatchRequest, prefixed bool) vsMatch {
	out := vsMatch{match: mesh.RequestMatch{Name: m.GetName()}, port: c.matchPort(path, m.GetPort())}
	to := &out.match
	to.Path = c.uri(path, m)
	out.regexPath = to.Path != nil && to.Path.Kind == mesh.PathRegex
	if to.Path == nil && prefixed {
		// What is rewritten is what was matched, and that is the root of all.
		to.Path = &mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/"}
	}
	to.Method = c.optional(path+".method", m.GetMethod())
	to.Scheme = c.optional(path+".scheme", m.GetScheme())
	if to.Authority = c.optional(path+".authority", m.GetAuthority()); to.Authority != nil && to.Authority.Kind != mesh.TextRegex {
		to.Authority.Value = strings.ToLower(to.Authority.Value)
		if host, _, err := net.SplitHostPort(to.Authority.Value); err == nil && to.Authority.Kind == mesh.TextExact {
			to.Authority.Value = host
		}
	}
	to.Headers = c.headerMatches(path+".headers", m.GetHeaders(), false)
	to.Headers = append(to.Headers, c.headerMatches(path+".withoutHeaders", m.GetWithoutHeaders(), true)...)
	for _, k := range slices.Sorted(maps.Keys(m.GetQueryParams())) {
		at := fmt.Sprintf("%s.queryParams[%s]", path, k)
		if k == "" {
			c.found.bad(at, "has no name")
		}
		to.Query = append(to.Query, mesh.FieldMatch{Name: k, TextMatch: c.text(at, m.GetQueryParams()[k])})
	}
	c.source(path, m.GetSourceNamespace(), m.GetSourceLabels(), to)
	if m.GetStatPrefix() != "" {
		c.found.warn(path+".statPrefix", "has no effect: metrics have the labels that Istio's have, and routes have names")
	}
	return out
}

func (c vsCompiler) matchPort(path string, port uint32) uint16 {
	if port > 65535 {
		c.found.bad(path+".port", "is %d, want 1 to 65535", port)
		return 0
	}
	return uint16(port)
}

// source compiles who calls. A waypoint knows the caller's identity, and not
// the labels of its pod.
func (c vsCompiler) source(path, namespace string, labels map[string]string, to *mesh.RequestMatch) {
	if namespace != "" {
		to.SourceNamespaces = []string{namespace}
	}
	if len(labels) > 0 {
		to.Never = true
		c.found.warn(path+".sourceLabels", "cannot be known at a waypoint, so this match never holds: use sourceNamespace, or a header")
	}
}

func (c vsCompiler) uri(path string, m *networking.HTTPMatchRequest) *mesh.PathMatch {
	if m.GetUri() == nil {
		return nil
	}
	at := path + ".uri"
	t := c.text(at, m.GetUri())
	out := &mesh.PathMatch{Value: t.Value, IgnoreCase: m.GetIgnoreUriCase()}
	switch t.Kind {
	case mesh.TextPresence:
		if m.GetUri().GetMatchType() != nil {
			c.found.bad(at, "is empty: a path begins with /")
		}
		return nil // every request has a path
	case mesh.TextExact:
		out.Kind = mesh.PathExact
	case mesh.TextPrefix:
		out.Kind = mesh.PathPrefix
	case mesh.TextRegex:
		out.Kind = mesh.PathRegex
		if out.IgnoreCase {
			c.found.warn(path+".ignoreUriCase", "has no effect on a regular expression: begin the expression with (?i)")
			out.IgnoreCase = false
		}
	}
	return out
}

// ignoredHeaders are names under which older objects wrote what has fields of
// its own.
var ignoredHeaders = []string{"uri", "scheme", "method", "authority"}

func (c vsCompiler) headerMatches(path string, in map[string]*networking.StringMatch, not bool) []mesh.FieldMatch {
	var out []mesh.FieldMatch
	for _, k := range slices.Sorted(maps.Keys(in)) {
		at := fmt.Sprintf("%s[%s]", path, k)
		name := strings.ToLower(k)
		switch {
		case slices.Contains(ignoredHeaders, name):
			c.found.warn(at, "is passed over: use the match's own field %s", name)
			continue
		case strings.HasPrefix(name, ":") && slices.Contains(ignoredHeaders, name[1:]), name == ":path":
		case !validToken(name):
			c.found.bad(at, "is no name of a header")
			continue
		}
		out = append(out, mesh.FieldMatch{Name: name, TextMatch: c.text(at, in[k]), Not: not})
	}
	return out
}

// optional compiles a text match that may be absent; an empty one holds always.
func (c vsCompiler) optional(path string, m *networking.StringMatch) *mesh.TextMatch {
	if m == nil {
		return nil
	}
	if t := c.text(path, m); t.Kind != mesh.TextPresence {
		return &t
	}
	return nil
}

// text compiles a text match. One without a kind holds for every value.
func (c vsCompiler) text(path string, m *networking.StringMatch) mesh.TextMatch {
	switch t := m.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		return mesh.TextMatch{Kind: mesh.TextExact, Value: t.Exact}
	case *networking.StringMatch_Prefix:
		if t.Prefix != "" {
			return mesh.TextMatch{Kind: mesh.TextPrefix, Value: t.Prefix}
		}
	case *networking.StringMatch_Regex:
		if t.Regex == "*" { // not RE2, and taken as any value for ages
			return mesh.TextMatch{Kind: mesh.TextPresence}
		}
		if t.Regex == "" {
			c.found.bad(path+".regex", "is empty, want a regular expression")
		} else if _, err := regexp.Compile(t.Regex); err != nil {
			c.found.bad(path+".regex", "is no RE2 expression: %v", err)
		} else if len(t.Regex) > longestRegex {
			c.found.bad(path+".regex", "has %d characters, want at most %d", len(t.Regex), longestRegex)
		}
		return mesh.TextMatch{Kind: mesh.TextRegex, Value: t.Regex}
	}
	return mesh.TextMatch{Kind: mesh.TextPresence}
}

// longestRegex keeps matching within bounds.
const longestRegex = 1024

// tls compiles one rule for TLS connections that are passed on.
func (c vsCompiler) tls(path string, r *networking.TLSRoute, hosts []string) (vsRule, string) {
	out := vsRule{protocol: mesh.RouteTLS, rule: mesh.Rule{From: c.from}}
	if len(r.GetMatch()) == 0 {
		c.found.bad(path+".match", "is empty: name the server names (sniHosts) that the rule is for")
		out.all = inMesh(c.gateways, nil)
	}
	for i, m := range r.GetMatch() {
		at := fmt.Sprintf("%s.match[%d]", path, i)
		to := vsMatch{port: c.matchPort(at, m.GetPort())}
		if len(m.GetSniHosts()) == 0 {
			c.found.bad(at+".sniHosts", "is empty: name the server names that the rule is for")
		}
		for j, h := range m.GetSniHosts() {
			p := fmt.Sprintf("%s.sniHosts[%d]", at, j)
			if why := badHost(h, true); why != "" {
				c.found.bad(p, "is %q, %s", h, why)
			} else if !c.coveredBy(h, hosts) {
				c.found.bad(p, "is %q, which spec.hosts does not cover", h)
			}
			to.match.SNI = append(to.match.SNI, strings.ToLower(h))
		}
		to.match.DestinationSubnets = c.subnets(at, m.GetDestinationSubnets())
		c.source(at, m.GetSourceNamespace(), m.GetSourceLabels(), &to.match)
		if inMesh(c.gateways, m.GetGateways()) {
			out.matches = append(out.matches, to)
		}
	}
	out.backends = c.l4Backends(path+".route", r.GetRoute())
	return out, path
}

// coveredBy reports whether one of the hosts is the name, or covers it with
// its star.
func (c vsCompiler) coveredBy(name string, hosts []string) bool {
	full := c.settings.fullHost(name, c.namespace)
	return slices.ContainsFunc(hosts, func(h string) bool {
		f := c.settings.fullHost(h, c.namespace)
		return f == full || h == "*" || hostMatches(f, mesh.Host(strings.TrimPrefix(string(full), "*")))
	})
}

// tcp compiles one rule for connections.
func (c vsCompiler) tcp(path string, r *networking.TCPRoute) (vsRule, string) {
	out := vsRule{protocol: mesh.RouteTCP, rule: mesh.Rule{From: c.from}}
	out.all = len(r.GetMatch()) == 0 && inMesh(c.gateways, nil)
	for i, m := range r.GetMatch() {
		at := fmt.Sprintf("%s.match[%d]", path, i)
		to := vsMatch{port: c.matchPort(at, m.GetPort())}
		to.match.DestinationSubnets = c.subnets(at, m.GetDestinationSubnets())
		if m.GetSourceSubnet() != "" {
			c.found.bad(at+".sourceSubnet", "is not supported: use sourceNamespace, or an AuthorizationPolicy")
		}
		c.source(at, m.GetSourceNamespace(), m.GetSourceLabels(), &to.match)
		if inMesh(c.gateways, m.GetGateways()) {
			out.matches = append(out.matches, to)
		}
	}
	out.backends = c.l4Backends(path+".route", r.GetRoute())
	return out, path
}

func (c vsCompiler) l4Backends(path string, in []*networking.RouteDestination) []vsBackend {
	if len(in) == 0 {
		c.found.bad(path, "is empty: say where the connections go")
	}
	var bs []vsBackend
	var weights []int32
	for i, d := range in {
		bs = append(bs, c.destination(fmt.Sprintf("%s[%d].destination", path, i), d.GetDestination()))
		weights = append(weights, d.GetWeight())
	}
	return c.weigh(path, weights, bs)
}

func (c vsCompiler) subnets(path string, in []string) []netip.Prefix {
	var out []netip.Prefix
	for i, s := range in {
		p, err := readBlock(s)
		if err != nil {
			c.found.bad(fmt.Sprintf("%s.destinationSubnets[%d]", path, i), "%v", err)
			continue
		}
		out = append(out, p)
	}
	return out
}

// badHost says why h is no host name, or "". A star may stand for the first
// part if stars are allowed.
func badHost(h string, stars bool) string {
	name := strings.TrimSuffix(strings.ToLower(h), ".")
	if stars {
		name = strings.TrimPrefix(name, "*.")
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return "" // addresses are names of what has none
	}
	if strings.Contains(name, "*") {
		if stars {
			return "in which a star may only be the whole first part, as *.example.com"
		}
		return "and requests cannot be sent to a star: name one host"
	}
	if why := content.IsDNS1123Subdomain(name); len(why) > 0 {
		return "which is no host name: want a service's name, or a name with its domain, as reviews.shop.svc.cluster.local"
	}
	return ""
}
