package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// meshGateway is the name by which VirtualServices mean the proxies inside the
// mesh.
const meshGateway = "mesh"

// A virtualService is one object on its way to rules.
type virtualService struct {
	VirtualService
	hosts    []mesh.Host // fully qualified, as far as they are valid
	rules    []vsRule    // that the mesh follows, in order
	found    findings
	broken   string // why no rule of it can be trusted
	delegate bool   // without hosts: meant to be named by others

	refs      complaints                     // what it names and is not there
	services  map[mesh.ServiceName]mesh.Name // that follow it, and their waypoints
	elsewhere complaints                     // services that it names and may not have
}

// A vsRule is a rule before it is tied to a service and a port.
type vsRule struct {
	protocol mesh.RouteProtocol
	rule     mesh.Rule // without matches, backends and mirrors
	matches  []vsMatch // that hold in the mesh; none at all if all is set
	all      bool      // written without a match
	backends []vsBackend
	mirrors  []vsMirror
}

// A vsMatch is a match, and the service port that it is for; 0 is every port.
type vsMatch struct {
	match mesh.RequestMatch
	port  uint16
	// path is what of Rewrite.Prefix becomes of the match's path.
	regexPath bool
}

// A vsBackend is a backend before its host is looked up.
type vsBackend struct {
	path    string // where it is written
	host    mesh.Host
	subset  string
	port    uint16 // 0 if none is written
	backend mesh.Backend
}

type vsMirror struct {
	vsBackend
	perMillion uint32
}

// complaints is a set of sentences.
type complaints map[string]bool

func (c *complaints) add(format string, args ...any) {
	if *c == nil {
		*c = complaints{}
	}
	(*c)[fmt.Sprintf(format, args...)] = true
}

// compileVirtualServices adds the rules of VirtualServices to the services
// that they are for, the oldest object first, and a status for each object.
func (w *World) compileVirtualServices(in []VirtualService) {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b VirtualService) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name.Name, b.Name.Name), strings.Compare(a.Name.Namespace, b.Name.Namespace))
	})
	delegates := map[mesh.Name]*virtualService{}
	var all []*virtualService
	for _, vs := range in {
		v := w.settings.checkVirtualService(vs)
		all = append(all, v)
		if v.delegate {
			delegates[vs.Name] = v
		}
	}
	for _, v := range all {
		w.settings.expandVirtualService(v, delegates)
		w.applyVirtualService(v)
	}
	for _, v := range all {
		w.Statuses = append(w.Statuses, v.status())
	}
}

// checkVirtualService reads one object for itself.
func (s Settings) checkVirtualService(vs VirtualService) *virtualService {
	v := &virtualService{VirtualService: vs, services: map[mesh.ServiceName]mesh.Name{}}
	v.found = slices.Clone(vs.read)
	for _, f := range v.found {
		if f.Severity == SeverityError && !routePath.MatchString(f.Path) && v.broken == "" {
			v.broken = f.String()
		}
	}
	v.delegate = len(vs.Spec.GetHosts()) == 0 && v.broken == ""
	v.checkGateways()
	s.readHosts(v)
	if v.delegate {
		v.checkDelegate()
	}
	if len(vs.Spec.GetHttp())+len(vs.Spec.GetTls())+len(vs.Spec.GetTcp()) == 0 {
		v.found.bad("spec", "has no http, tls or tcp rule: give it one")
	}
	c := vsCompiler{settings: s, namespace: vs.Name.Namespace, from: v.from(), gateways: vs.Spec.GetGateways(), found: &v.found}
	for i, r := range vs.Spec.GetHttp() {
		c.http(fmt.Sprintf("spec.http[%d]", i), r)
	}
	return v
}

func (v *virtualService) from() string { return KindVirtualService + "/" + v.Name.String() }

func (v *virtualService) checkGateways() {
	seen := map[string]bool{}
	for i, g := range v.Spec.GetGateways() {
		path := fmt.Sprintf("spec.gateways[%d]", i)
		checkGatewayName(&v.found, path, g)
		if seen[g] {
			v.found.warn(path, "is %q, which is there twice", g)
		}
		seen[g] = true
	}
}

// checkGatewayName checks the name of a Gateway: "name" or "namespace/name".
func checkGatewayName(f *findings, path, g string) {
	ns, name, both := strings.Cut(g, "/")
	if g == "" || both && (ns == "" || name == "" || strings.Contains(name, "/")) {
		f.bad(path, "is %q, want mesh, or a Gateway's name, or its namespace/name", g)
	}
}

// inMesh reports whether a rule, or a match with gateways of its own, is for
// the proxies inside the mesh.
func inMesh(gateways, own []string) bool {
	if len(own) > 0 {
		gateways = own
	}
	return len(gateways) == 0 || slices.Contains(gateways, meshGateway)
}

func (s Settings) readHosts(v *virtualService) {
	seen := map[mesh.Host]bool{}
	for i, h := range v.Spec.GetHosts() {
		path := fmt.Sprintf("spec.hosts[%d]", i)
		if h == "*" {
			if inMesh(v.Spec.GetGateways(), nil) {
				v.found.bad(path, `is "*", which cannot be for the mesh: name the services, or bind the object to a Gateway in spec.gateways`)
			}
			continue
		}
		if why := badHost(h, true); why != "" {
			v.found.bad(path, "is %q, %s", h, why)
			continue
		}
		full := s.fullHost(h, v.Name.Namespace)
		if seen[full] {
			v.found.bad(path, "is %q, which is there twice", h)
			continue
		}
		seen[full] = true
		v.hosts = append(v.hosts, full)
	}
}

// checkDelegate complains about what an object without hosts cannot have.
func (v *virtualService) checkDelegate() {
	if len(v.Spec.GetGateways()) > 0 {
		v.found.bad("spec.hosts", "is empty: name the hosts that the rules are for. (Only a VirtualService that others delegate to has none, and it has no gateways either)")
	} else if len(v.Spec.GetTls())+len(v.Spec.GetTcp()) > 0 {
		v.found.bad("spec.hosts", "is empty: name the hosts that the rules are for. (Only a VirtualService that others delegate to has none, and it has http rules alone)")
	}
	for i, r := range v.Spec.GetHttp() {
		if r.GetDelegate() != nil {
			v.found.bad(fmt.Sprintf("spec.http[%d].delegate", i), "cannot be in a VirtualService that is delegated to: delegation is one step deep")
		}
	}
}

// fullHost returns the fully qualified, lower case form of a host: a short
// name is a service in the namespace.
func (s Settings) fullHost(h, namespace string) mesh.Host {
	h = strings.TrimSuffix(strings.ToLower(h), ".")
	if !strings.Contains(h, ".") && !strings.Contains(h, "*") {
		return s.withDefaults().serviceName(namespace, h).Host
	}
	return mesh.Host(h)
}

// hostMatches reports whether a host, perhaps with a star as its first part,
// covers another.
func hostMatches(pattern, host mesh.Host) bool {
	if rest, ok := strings.CutPrefix(string(pattern), "*"); ok {
		return strings.HasSuffix(string(host), rest) && len(host) > len(rest)
	}
	return pattern == host
}

// expandVirtualService fills in the rules that the mesh follows.
func (s Settings) expandVirtualService(v *virtualService, delegates map[mesh.Name]*virtualService) {
	if v.delegate {
		return
	}
	var discard findings
	c := vsCompiler{settings: s, namespace: v.Name.Namespace, from: v.from(), gateways: v.Spec.GetGateways(), found: &v.found}
	for i, r := range v.Spec.GetTls() {
		v.add(c.tls(fmt.Sprintf("spec.tls[%d]", i), r, v.Spec.GetHosts()))
	}
	for i, r := range v.Spec.GetTcp() {
		v.add(c.tcp(fmt.Sprintf("spec.tcp[%d]", i), r))
	}
	c.found = &discard // checkVirtualService has told
	for i, r := range v.Spec.GetHttp() {
		path := fmt.Sprintf("spec.http[%d]", i)
		if r.GetDelegate() != nil && v.found.brokenAt(path) == "" {
			v.delegateRules(c, path, r, delegates)
			continue
		}
		out, _ := c.http(path, r)
		v.addAt(path, v.found, out)
	}
	for i := range v.rules {
		if v.broken != "" {
			v.rules[i].rule.Broken = v.broken
		}
	}
	if v.broken != "" && len(v.rules) == 0 {
		v.rules = []vsRule{{protocol: mesh.RouteHTTP, all: true, rule: mesh.Rule{From: v.from(), Broken: v.broken}}}
	}
}

func (v *virtualService) add(r vsRule, path string) { v.addAt(path, v.found, r) }

// addAt adds a rule that is written at path, unless the mesh has no part in
// it. Errors in what it is made of break it.
func (v *virtualService) addAt(path string, found findings, r vsRule) {
	if why := found.brokenAt(path); why != "" {
		r.rule = mesh.Rule{Name: r.rule.Name, From: r.rule.From, Broken: why}
		r.backends, r.mirrors = nil, nil
	}
	if r.all || len(r.matches) > 0 {
		v.rules = append(v.rules, r)
	}
}

// applyVirtualService gives the rules to every service that they are for.
func (w *World) applyVirtualService(v *virtualService) {
	if len(v.rules) == 0 || len(v.hosts) == 0 {
		return
	}
	for i := range w.Services {
		s := &w.Services[i]
		if !slices.ContainsFunc(v.hosts, func(h mesh.Host) bool { return hostMatches(h, s.Name.Host) }) {
			continue
		}
		waypoint, bound := w.waypointOf(s.Name)
		client := s.Name.Namespace
		if bound {
			client = waypoint.Namespace
		}
		if ns := v.Name.Namespace; ns != s.Name.Namespace && ns != client {
			v.elsewhere.add("%s (VirtualServices for it are read from namespace %s and from that of its waypoint)", s.Name.Host, s.Name.Namespace)
			continue
		}
		if !exported(v.Spec.GetExportTo(), v.Name.Namespace, client) {
			v.elsewhere.add("%s (spec.exportTo does not list namespace %s)", s.Name.Host, client)
			continue
		}
		v.services[s.Name] = waypoint
		w.addServiceRules(v, s)
	}
}

// exported reports whether an object of a namespace is seen in another.
func exported(to []string, namespace, in string) bool {
	if len(to) == 0 {
		return true
	}
	return slices.ContainsFunc(to, func(t string) bool {
		return t == "*" || t == in || t == "." && namespace == in
	})
}

func (w *World) addServiceRules(v *virtualService, s *mesh.Service) {
	for _, p := range s.Ports {
		for _, r := range v.rules {
			if !carries(p.AppProtocol, r.protocol) {
				continue
			}
			if rules := w.tieRule(v, r, p.Service); len(rules) > 0 {
				d := w.draft(mesh.RouteKey{Service: s.Name, Port: p.Service, Protocol: r.protocol})
				d.istio = append(d.istio, rules...)
			}
		}
	}
}

// carries reports whether a port with the application protocol may have
// traffic that routes of the other protocol are for.
func carries(app string, p mesh.RouteProtocol) bool {
	switch app {
	case "http", "http2", "grpc":
		return p == mesh.RouteHTTP
	case "tls":
		return p == mesh.RouteTLS || p == mesh.RouteTCP
	case "tcp":
		return p == mesh.RouteTCP
	}
	return true // it is found out with each connection
}

// tieRule returns the rule as it is for one port of a service. It is none when
// its matches are for other ports, and several when its rewrite means another
// thing for each match.
func (w *World) tieRule(v *virtualService, r vsRule, port uint16) []mesh.Rule {
	rule := r.rule
	for _, b := range r.backends {
		rule.Backends = append(rule.Backends, w.tieBackend(v, b, port))
	}
	for _, m := range r.mirrors {
		if b := w.tieBackend(v, m.vsBackend, port); b.Unroutable == "" {
			rule.Mirrors = append(rule.Mirrors, mesh.Mirror{Backend: b, PerMillion: m.perMillion})
		}
	}
	if r.all {
		return []mesh.Rule{rule}
	}
	var out []mesh.Rule
	for _, m := range r.matches {
		if m.port != 0 && m.port != port {
			continue
		}
		next := rule
		if rw := rule.Rewrite; rw != nil && rw.Prefix != nil && m.regexPath {
			// A regular expression has no prefix: the whole path is replaced.
			next.Rewrite = &mesh.Rewrite{Authority: rw.Authority, Path: rw.Prefix}
		}
		if n := len(out) - 1; n >= 0 && out[n].Rewrite == next.Rewrite {
			out[n].Matches = append(out[n].Matches, m.match)
			continue
		}
		next.Matches = []mesh.RequestMatch{m.match}
		out = append(out, next)
	}
	return out
}

// tieBackend looks the host up. Without a port, the only one of the service is
// meant, or else the one that was asked for.
func (w *World) tieBackend(v *virtualService, b vsBackend, asked uint16) mesh.Backend {
	out := b.backend
	lost := func(format string, args ...any) mesh.Backend {
		out.Status = 503
		out.Unroutable = fmt.Sprintf(format, args...)
		v.refs.add("%s: %s", b.path, out.Unroutable)
		return out
	}
	s := w.serviceByHost(b.host, v.Name.Namespace)
	if s == nil {
		return lost("there is no service %s%s", b.host, w.meant(b.host, v.Name.Namespace))
	}
	out.Service, out.Subset, out.Port = s.Name, b.subset, b.port
	if out.Port == 0 {
		out.Port = asked
		if len(s.Ports) == 1 {
			out.Port = s.Ports[0].Service
		}
	}
	if !slices.ContainsFunc(s.Ports, func(p mesh.Port) bool { return p.Service == out.Port }) {
		if b.port == 0 {
			return lost("service %s has no port %d, the one that was asked for: write the destination's port", b.host, out.Port)
		}
		return lost("service %s has no port %d", b.host, out.Port)
	}
	if b.subset != "" && !w.subsets[subsetKey{s.Name, b.subset}] {
		return lost("no DestinationRule for %s that is in force has a subset %q", b.host, b.subset)
	}
	return out
}

// meant guesses what a host that is no service's was meant to be.
func (w *World) meant(h mesh.Host, namespace string) string {
	name, ns, ok := strings.Cut(string(h), ".")
	if ok && w.serviceByHost(w.settings.serviceName(strings.TrimSuffix(ns, ".svc"), name).Host, namespace) != nil {
		return fmt.Sprintf("; did you mean %s.%s.svc.%s?", name, strings.TrimSuffix(ns, ".svc"), w.settings.Domain)
	}
	return ""
}

// serviceByHost returns the service that the host means to objects of a
// namespace, or nil, as proxies resolve it: a ServiceEntry of their own, else
// the Service, whose name says its namespace, else the first ServiceEntry by
// namespace that is not private to another one.
func (w *World) serviceByHost(h mesh.Host, namespace string) *mesh.Service {
	if s := w.serviceNamed(mesh.ServiceName{Namespace: namespace, Host: h}); s != nil {
		return s
	}
	if parts := strings.SplitN(string(h), ".", 3); len(parts) == 3 {
		name := mesh.ServiceName{Namespace: parts[1], Host: h}
		if s := w.serviceNamed(name); s != nil && w.origins[name].kind == KindService {
			return s
		}
	}
	for _, name := range w.entryHosts[h] {
		if s := w.serviceNamed(name); s != nil && !s.Private {
			return s
		}
	}
	return nil
}

func (w *World) serviceNamed(n mesh.ServiceName) *mesh.Service {
	i, ok := slices.BinarySearchFunc(w.Services, n.String(), func(s mesh.Service, n string) int { return strings.Compare(s.Name.String(), n) })
	if !ok {
		return nil
	}
	return &w.Services[i]
}

// status tells what became of the object.
func (v *virtualService) status() Status {
	return Status{
		Kind: KindVirtualService, Name: v.Name, Generation: v.Generation,
		Conditions: []Condition{accepted(v.found, "the rules concerned answer 500"), resolved(v.refs), v.programmed()},
	}
}

// accepted reports what was found in an object, and what becomes of the parts
// that mean nothing.
func accepted(f findings, then string) Condition {
	if bad := f.of(SeverityError); len(bad) > 0 {
		return Condition{Type: Accepted, Reason: reasonInvalid, Message: listed(bad) + " (" + then + ")"}
	}
	if notes := f.of(SeverityWarning); len(notes) > 0 {
		return Condition{Type: Accepted, OK: true, Reason: reasonAccepted, Message: "valid, but: " + listed(notes)}
	}
	return Condition{Type: Accepted, OK: true, Reason: reasonAccepted, Message: "valid"}
}

func resolved(refs complaints) Condition {
	if len(refs) == 0 {
		return Condition{Type: ResolvedRefs, OK: true, Reason: reasonResolved, Message: "everything that it names exists"}
	}
	return Condition{Type: ResolvedRefs, Reason: reasonNotFound, Message: listed(slices.Sorted(maps.Keys(refs)))}
}

func (v *virtualService) programmed() Condition {
	no := func(reason, format string, args ...any) Condition {
		return Condition{Type: Programmed, Reason: reason, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case v.delegate && v.found.brokenAt("spec.hosts") != "":
		return no(reasonInvalid, "it has no hosts, so nobody knows what its rules are for")
	case v.delegate:
		return Condition{Type: Programmed, OK: true, Reason: reasonDelegate, Message: "its rules are part of the VirtualServices that delegate to it"}
	case len(v.rules) == 0 && len(v.Spec.GetGateways()) > 0 && !slices.Contains(v.Spec.GetGateways(), meshGateway):
		return no(reasonNoMesh, "bound to %s only, and this version of Weft serves no Istio Gateways: add mesh to spec.gateways to have it followed by waypoints", strings.Join(v.Spec.GetGateways(), ", "))
	case len(v.rules) == 0:
		return no(reasonInvalid, "it has no rule that a waypoint could follow")
	case len(v.services) == 0 && len(v.elsewhere) > 0:
		return no(reasonNotAllowed, "not followed for %s", listed(slices.Sorted(maps.Keys(v.elsewhere))))
	case len(v.services) == 0:
		return no(reasonNotFound, "no service is named %s", joined(v.hosts))
	}
	return programmed(v.services)
}

// programmed tells which waypoints follow an object, by the services that it
// is for.
func programmed(services map[mesh.ServiceName]mesh.Name) Condition {
	at := map[string][]string{}
	var without []string
	for s, wp := range services {
		if wp == (mesh.Name{}) {
			without = append(without, string(s.Host))
			continue
		}
		at[wp.String()] = append(at[wp.String()], string(s.Host))
	}
	var parts []string
	for _, wp := range slices.Sorted(maps.Keys(at)) {
		parts = append(parts, fmt.Sprintf("followed by waypoint %s for %s", wp, some(at[wp])))
	}
	if len(without) > 0 {
		parts = append(parts, fmt.Sprintf("not followed for %s: no waypoint is in front of it (label it, or its namespace, istio.io/use-waypoint)", some(without)))
	}
	c := Condition{Type: Programmed, OK: len(at) > 0, Reason: reasonProgrammed, Message: strings.Join(parts, "; ")}
	if !c.OK {
		c.Reason = reasonNoWaypoint
	}
	return c
}

// some lists a few of the names, sorted, and counts the others.
func some(names []string) string {
	slices.Sort(names)
	const most = 5
	if n := len(names) - most; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), n)
	}
	return strings.Join(names, ", ")
}

func joined(hosts []mesh.Host) string {
	var out []string
	for _, h := range hosts {
		out = append(out, string(h))
	}
	return strings.Join(out, " or ")
}
