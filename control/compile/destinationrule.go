package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
	"k8s.io/apimachinery/pkg/api/validate/content"

	"github.com/weft-mesh/weft/mesh"
)

// A subsetKey names a subset of a service.
type subsetKey struct {
	service mesh.ServiceName
	name    string
}

// A destinationRule is one object on its way to TrafficPolicies.
type destinationRule struct {
	DestinationRule
	host    mesh.Host // fully qualified; "" if it has none
	found   findings
	policy  *policyBlocks // nil if it has none
	subsets []subsetBlocks

	refs     complaints
	services map[mesh.ServiceName]mesh.Name // that follow it, and their waypoints
	lost     complaints                     // services that follow another
}

// Blocks are the parts of a policy that override each other as a whole. Nil is
// not said.
type blocks struct {
	balance     *mesh.Balance
	connections *mesh.Connections
	outlier     *mesh.Outlier
	tls         *mesh.UpstreamTLS
	budget      *mesh.RetryBudget
	broken      string // why connections made by it could be other than was meant
}

// A policyBlocks is a policy, and those of single ports.
type policyBlocks struct {
	blocks
	ports map[uint16]blocks
}

// A subsetBlocks is a subset, and what it overrides.
type subsetBlocks struct {
	name   string
	path   string
	labels map[string]string
	policy *policyBlocks
	broken string
}

// compileDestinationRules adds the policies of DestinationRules for every
// service that they are for, and a status for each object.
func (w *World) compileDestinationRules(in []DestinationRule) {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b DestinationRule) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name.Name, b.Name.Name), strings.Compare(a.Name.Namespace, b.Name.Namespace))
	})
	byNamespace := map[string][]*destinationRule{}
	var all []*destinationRule
	for _, dr := range in {
		d := w.settings.checkDestinationRule(dr)
		all = append(all, d)
		byNamespace[dr.Name.Namespace] = append(byNamespace[dr.Name.Namespace], d)
	}
	for i := range w.Services {
		w.applyDestinationRules(&w.Services[i], byNamespace)
	}
	slices.SortFunc(w.TrafficPolicies, compareTrafficPolicy)
	for _, d := range all {
		w.Statuses = append(w.Statuses, d.status())
	}
}

func compareTrafficPolicy(a, b mesh.TrafficPolicy) int {
	return cmp.Or(strings.Compare(a.Service.String(), b.Service.String()), strings.Compare(a.Subset, b.Subset), cmp.Compare(a.Port, b.Port))
}

// applyDestinationRules finds the rules for a service: those of its callers'
// namespace (which is that of its waypoint) come before those of its own, and
// those before the root namespace's. Of one namespace, those with the most
// specific host count, and if they are several they are taken as one.
func (w *World) applyDestinationRules(s *mesh.Service, byNamespace map[string][]*destinationRule) {
	waypoint, bound := w.waypointOf(s.Name)
	client := s.Name.Namespace
	if bound {
		client = waypoint.Namespace
	}
	var taken []*destinationRule
	seen := map[string]bool{}
	for _, ns := range []string{client, s.Name.Namespace, w.settings.RootNamespace} {
		if seen[ns] {
			continue
		}
		seen[ns] = true
		best := mostSpecific(byNamespace[ns], s.Name.Host, client)
		if len(taken) == 0 {
			taken = best
			continue
		}
		for _, d := range best {
			d.lost.add("%s follows DestinationRule %s", s.Name.Host, taken[0].Name)
		}
	}
	if len(taken) == 0 {
		return
	}
	for _, d := range taken {
		d.services[s.Name] = waypoint
	}
	w.addPolicies(s, taken)
}

// mostSpecific returns the rules for the host with the most specific host.
func mostSpecific(in []*destinationRule, host mesh.Host, client string) []*destinationRule {
	var best []*destinationRule
	for _, d := range in {
		if d.host == "" || !hostMatches(d.host, host) || d.Spec.GetWorkloadSelector() != nil ||
			!exported(d.Spec.GetExportTo(), d.Name.Namespace, client) {
			continue
		}
		switch {
		case len(best) == 0 || moreSpecific(d.host, best[0].host):
			for _, b := range best {
				b.lost.add("%s follows DestinationRule %s, whose host is more specific", host, d.Name)
			}
			best = []*destinationRule{d}
		case d.host == best[0].host:
			best = append(best, d)
		default:
			d.lost.add("%s follows DestinationRule %s, whose host is more specific", host, best[0].Name)
		}
	}
	return best
}

// moreSpecific reports whether a covers fewer hosts than b, when both cover
// some host.
func moreSpecific(a, b mesh.Host) bool {
	aw, bw := strings.HasPrefix(string(a), "*"), strings.HasPrefix(string(b), "*")
	if aw != bw {
		return bw
	}
	return len(a) > len(b)
}

// addPolicies adds the cross product of subsets and ports.
func (w *World) addPolicies(s *mesh.Service, rules []*destinationRule) {
	var top policyBlocks
	from := rules[0]
	for _, d := range rules {
		if d.policy == nil {
			continue
		}
		if from.policy == nil || from == d {
			top, from = *d.policy, d
			continue
		}
		d.lost.add("spec.trafficPolicy for %s is that of DestinationRule %s, which is older", s.Name.Host, from.Name)
	}
	w.addSubset(s, from, subsetBlocks{}, top)
	subsets := map[string]mesh.Name{}
	for _, d := range rules {
		for _, sub := range d.subsets {
			if first, ok := subsets[sub.name]; ok {
				if first != d.Name {
					d.lost.add("subset %q of %s is that of DestinationRule %s, which is older", sub.name, s.Name.Host, first)
				}
				continue
			}
			subsets[sub.name] = d.Name
			w.subsets[subsetKey{s.Name, sub.name}] = true
			w.addSubset(s, d, sub, top)
		}
	}
}

// addSubset adds the policies of one subset; one without a name is the whole
// service.
func (w *World) addSubset(s *mesh.Service, d *destinationRule, sub subsetBlocks, top policyBlocks) {
	own := sub.policy
	if own == nil {
		own = &policyBlocks{}
	}
	ports := map[uint16]bool{0: true}
	for p := range top.ports {
		ports[p] = true
	}
	for p := range own.ports {
		ports[p] = true
	}
	for _, p := range slices.Sorted(maps.Keys(ports)) {
		if p != 0 && !slices.ContainsFunc(s.Ports, func(x mesh.Port) bool { return x.Service == p }) {
			d.refs.add("service %s has no port %d", s.Name.Host, p)
			continue
		}
		b := top.blocks
		if of, ok := top.ports[p]; ok {
			b = of.instead(b)
		}
		b = own.over(b)
		if of, ok := own.ports[p]; ok {
			b = of.instead(b)
		}
		w.TrafficPolicies = append(w.TrafficPolicies, b.policy(mesh.TrafficPolicy{
			Service: s.Name, Subset: sub.name, Port: p, From: KindDestinationRule + "/" + d.Name.String(), Labels: sub.labels, Broken: sub.broken}))
		if near := b.balance; near != nil && near.Locality != nil {
			for _, l := range near.Locality.Priority {
				key, _, _ := strings.Cut(l, "=")
				w.labelKeys[key] = true
			}
		}
	}
	for k := range sub.labels {
		w.labelKeys[k] = true
	}
}

// over returns under with the blocks of b in place of its own.
func (b blocks) over(under blocks) blocks {
	return blocks{
		balance:     cmp.Or(b.balance, under.balance),
		connections: cmp.Or(b.connections, under.connections),
		outlier:     cmp.Or(b.outlier, under.outlier),
		tls:         cmp.Or(b.tls, under.tls),
		budget:      cmp.Or(b.budget, under.budget),
		broken:      cmp.Or(b.broken, under.broken),
	}
}

// instead returns b for a port: what a port's policy leaves open is the
// default, and not what the rest of the service has. What a port cannot say
// stays.
func (b blocks) instead(of blocks) blocks {
	b.budget = of.budget
	if b.broken == "" && of.tls == nil {
		b.broken = of.broken
	}
	return b
}

func (b blocks) policy(p mesh.TrafficPolicy) mesh.TrafficPolicy {
	if b.balance != nil {
		p.Balance = *b.balance
	}
	if b.connections != nil {
		p.Connections = *b.connections
	}
	p.Outlier, p.TLS, p.RetryBudget = b.outlier, b.tls, b.budget
	p.Broken = cmp.Or(p.Broken, b.broken)
	return p
}

// checkDestinationRule reads one object for itself.
func (s Settings) checkDestinationRule(dr DestinationRule) *destinationRule {
	d := &destinationRule{DestinationRule: dr, found: slices.Clone(dr.read), services: map[mesh.ServiceName]mesh.Name{}}
	switch h := dr.Spec.GetHost(); {
	case h == "":
		d.found.bad("spec.host", "is empty: name the service that the policy is for")
	case badHost(h, true) != "" && h != "*":
		d.found.bad("spec.host", "is %q, %s", h, badHost(h, true))
	default:
		d.host = s.fullHost(h, dr.Name.Namespace)
	}
	if dr.Spec.GetWorkloadSelector() != nil {
		d.found.warn("spec.workloadSelector", "selects clients by their labels, which waypoints are not: the object is not followed")
	}
	c := drCompiler{&d.found}
	if p := dr.Spec.GetTrafficPolicy(); p != nil {
		d.policy = c.policy("spec.trafficPolicy", p)
	}
	seen := map[string]bool{}
	for i, sub := range dr.Spec.GetSubsets() {
		path := fmt.Sprintf("spec.subsets[%d]", i)
		if seen[sub.GetName()] {
			d.found.bad(path+".name", "is %q, which is there twice: the first counts", sub.GetName())
			continue
		}
		seen[sub.GetName()] = true
		if out := c.subset(path, sub); out.name != "" {
			d.subsets = append(d.subsets, out)
		}
	}
	return d
}

func (c drCompiler) subset(path string, in *networking.Subset) subsetBlocks {
	out := subsetBlocks{name: in.GetName(), path: path, labels: in.GetLabels()}
	if in.GetName() == "" {
		c.found.bad(path+".name", "is empty: routes name subsets")
	}
	for _, k := range slices.Sorted(maps.Keys(in.GetLabels())) {
		if wrong := append(content.IsLabelKey(k), content.IsLabelValue(in.GetLabels()[k])...); len(wrong) > 0 {
			c.found.bad(fmt.Sprintf("%s.labels[%s]", path, k), "is %q, which no pod can have", in.GetLabels()[k])
		}
	}
	out.broken = c.found.brokenAt(path + ".labels")
	if in.GetTrafficPolicy() != nil {
		out.policy = c.policy(path+".trafficPolicy", in.GetTrafficPolicy())
	}
	return out
}

// status tells what became of the object.
func (d *destinationRule) status() Status {
	then := "the blocks concerned have their defaults, and what cannot be connected to safely answers 503"
	return Status{Kind: KindDestinationRule, Name: d.Name, Generation: d.Generation,
		Conditions: []Condition{accepted(d.found, then), resolved(d.refs), d.programmed()}}
}

func (d *destinationRule) programmed() Condition {
	lost := slices.Sorted(maps.Keys(d.lost))
	switch {
	case len(d.services) > 0:
		c := programmed(d.services)
		if len(lost) > 0 {
			c.Message += "; but " + listed(lost)
		}
		return c
	case len(lost) > 0:
		return Condition{Type: Programmed, Reason: reasonOverridden, Message: listed(lost)}
	case d.Spec.GetWorkloadSelector() != nil:
		return Condition{Type: Programmed, Reason: reasonUnsupported, Message: "spec.workloadSelector selects clients by their labels, which waypoints are not"}
	}
	return Condition{Type: Programmed, Reason: reasonNotFound, Message: fmt.Sprintf("no service is named %s, or its callers are not among those of spec.exportTo", cmp.Or(string(d.host), "as spec.host says"))}
}
