package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	securityv1 "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// istioVersions are the versions in which the kinds of a group are served.
var istioVersions = map[string][]string{
	"networking.istio.io": {"v1", "v1beta1", "v1alpha3"},
	"security.istio.io":   {"v1", "v1beta1"},
	// Of these, no kind is read yet.
	"telemetry.istio.io":  {"v1", "v1alpha1"},
	"extensions.istio.io": {"v1alpha1"},
}

// Review returns what the author of one object should know about it, without
// looking at any other object: the errors and warnings that Compile would find
// in it, errors first. It reports false for a kind that Weft does not read.
func Review(u *unstructured.Unstructured) ([]Finding, bool) {
	out, known := reviewGatewayAPI(u)
	if !known {
		out, known = reviewIstio(u)
	}
	slices.SortStableFunc(out, func(a, b Finding) int { return cmp.Compare(a.Severity, b.Severity) })
	return out, known
}

func reviewIstio(u *unstructured.Unstructured) ([]Finding, bool) {
	group, version, _ := strings.Cut(u.GetAPIVersion(), "/")
	versions, ours := istioVersions[group]
	if !ours {
		return nil, false
	}
	var f findings
	s := Settings{}.withDefaults()
	switch u.GetKind() {
	case KindVirtualService:
		vs := ReadVirtualService(u)
		v := s.checkVirtualService(vs)
		s.expandVirtualService(v, nil)
		f = v.found
	case KindDestinationRule:
		f = s.checkDestinationRule(ReadDestinationRule(u)).found
	case KindServiceEntry:
		f = s.checkServiceEntry(ReadServiceEntry(u)).found
	case KindWorkloadEntry:
		_, f = checkWorkloadEntry(ReadWorkloadEntry(u))
	case KindAuthorizationPolicy:
		f = s.reviewAuthorizationPolicy(u)
	case KindPeerAuthentication:
		f = reviewPeerAuthentication(u)
	default:
		f.warn("kind", "is %s, which this version of Weft passes over", u.GetKind())
		return f, true
	}
	if !slices.Contains(versions, version) {
		f.bad("apiVersion", "is %s, want %s/ and one of %s", u.GetAPIVersion(), group, strings.Join(versions, ", "))
	}
	for _, k := range slices.Sorted(maps.Keys(u.Object)) {
		if !slices.Contains([]string{"apiVersion", "kind", "metadata", "spec", "status"}, k) {
			f.bad(k, "is not a field of %s: its own fields are below spec", u.GetKind())
		}
	}
	return f, true
}

func (s Settings) reviewAuthorizationPolicy(u *unstructured.Unstructured) findings {
	spec := &securityv1.AuthorizationPolicy{}
	f := readSpecByField(u, spec)
	ap := ReadAuthorizationPolicy(u)
	if ap.Err != nil && len(f.of(SeverityError)) == 0 {
		f.bad("", "%v", ap.Err)
	}
	if ap.Targeted && len(ap.Selector) > 0 {
		f.bad("", "%v", errBoth)
	}
	by := "ztunnel"
	if ap.Targeted {
		by = "a waypoint"
	}
	switch spec.GetAction() {
	case securityv1.AuthorizationPolicy_ALLOW, securityv1.AuthorizationPolicy_DENY:
	case securityv1.AuthorizationPolicy_AUDIT:
		f.warn("spec.action", "is AUDIT, which %s does not support: the policy has no effect", by)
	case securityv1.AuthorizationPolicy_CUSTOM:
		f.warn("spec.action", "is CUSTOM, which %s does not support: everything is denied", by)
	default:
		f.bad("spec.action", "is %d, which is not known", spec.GetAction())
	}
	for _, r := range ap.Targets {
		if why := s.badTarget(ap.Name.Namespace, r); why != "" {
			f.bad(r.Path, "%s", why)
		}
	}
	if len(ap.Targets) > mostTargetRefs {
		f.bad("spec.targetRefs", "has %d targets, want at most %d", len(ap.Targets), mostTargetRefs)
	}
	if _, err := readDryRun(ap.Annotations); err != nil {
		f.warn("metadata.annotations", "%v", err)
	}
	c := ruleCompiler{namespace: ap.Name.Namespace, deny: spec.GetAction() == securityv1.AuthorizationPolicy_DENY, waypoint: ap.Targeted}
	for i, r := range spec.GetRules() {
		path := fmt.Sprintf("spec.rules[%d]", i)
		if f.brokenAt(path) == "" {
			c.rule(path, r)
		}
	}
	for _, text := range c.invalid {
		path, message, _ := strings.Cut(text, " ")
		f.bad(path, "%s", message)
	}
	for _, path := range c.l7 {
		if c.deny {
			f.warn(path, "cannot be checked by %s, which denies without looking at it: more is denied than the rule says", by)
		} else {
			f.warn(path, "cannot be checked by %s: the rule allows nothing", by)
		}
	}
	return f
}

func reviewPeerAuthentication(u *unstructured.Unstructured) findings {
	f := readSpecByField(u, &securityv1.PeerAuthentication{})
	if len(f.of(SeverityError)) > 0 {
		return f
	}
	switch _, c := readPeerAuth(ReadPeerAuthentication(u)); {
	case c.Reason == reasonInvalid:
		f.bad("", "%s", c.Message)
	case !c.OK:
		f.warn("", "%s", c.Message)
	}
	return f
}

// badTarget says what is wrong with a reference, whatever there is in the
// cluster, or "".
func (s Settings) badTarget(namespace string, r TargetRef) string {
	switch {
	case r.Namespace != "" && r.Namespace != namespace:
		return fmt.Sprintf("names namespace %s: a policy protects what is in its own, %s", r.Namespace, namespace)
	case r.Name == "":
		return "has no name"
	case r.Kind == KindService && (r.Group == "" || r.Group == "core"):
	case r.Kind == KindServiceEntry && r.Group == groupNetworking:
	case r.Kind == KindGateway && r.Group == groupGateway:
	case r.Kind == KindGatewayClass && r.Group == groupGateway:
		if namespace != s.RootNamespace {
			return fmt.Sprintf("names a GatewayClass, which only policies in namespace %s can", s.RootNamespace)
		}
	default:
		return fmt.Sprintf("is of kind %s in group %q, want Service, ServiceEntry in group %s, or Gateway or GatewayClass in group %s", cmp.Or(r.Kind, "(none)"), r.Group, groupNetworking, groupGateway)
	}
	return ""
}
