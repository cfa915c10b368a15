package compile

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// compileBackendTLS makes the traffic policies of services speak TLS as
// BackendTLSPolicies say. Of several for the same ports the oldest counts.
func (w *World) compileBackendTLS(in Inputs) {
	if len(in.BackendTLSPolicies) == 0 {
		return
	}
	services := kubeServices(in.Services)
	taken := map[string]mesh.Name{} // by service and section
	for _, p := range oldestFirst(in.BackendTLSPolicies) {
		found := checkBackendTLS(p)
		tls, resolved, broken := readBackendTLS(p, found, in.ConfigMaps)
		out := Status{Kind: KindBackendTLSPolicy, Name: p.Name, Generation: p.Generation}
		for i, ref := range p.Spec.TargetRefs {
			parent := gatewayv1.ParentReference{Group: &ref.Group, Kind: &ref.Kind, Name: ref.Name, SectionName: ref.SectionName}
			cond := Condition{Type: Accepted, OK: true, Reason: string(gatewayv1.PolicyReasonAccepted), Message: "TLS is spoken to the endpoints"}
			name := mesh.Name{Namespace: p.Name.Namespace, Name: string(ref.Name)}
			at := string(ref.Name) + "|" + string(deref(ref.SectionName)) + "|" + p.Name.Namespace
			ports, why := parentPorts(services[name], "Service "+name.String(), gatewayv1.ParentReference{SectionName: ref.SectionName})
			first, conflict := taken[at]
			switch {
			case ref.Group != "" || ref.Kind != "Service":
				cond = Condition{Type: Accepted, Reason: string(gatewayv1.PolicyReasonInvalid), Message: found.brokenAt(fmt.Sprintf("spec.targetRefs[%d]", i))}
			case why != "":
				cond = Condition{Type: Accepted, Reason: string(gatewayv1.PolicyReasonTargetNotFound), Message: why}
			case conflict:
				cond = Condition{Type: Accepted, Reason: string(gatewayv1.PolicyReasonConflicted), Message: fmt.Sprintf("%s is older and has the same target", first)}
			default:
				taken[at] = p.Name
				if ref.SectionName == nil {
					ports = []uint16{0}
				}
				w.setTLS(w.settings.serviceName(name.Namespace, name.Name), ports, tls, broken, "BackendTLSPolicy/"+p.Name.String())
				if broken != "" {
					cond = Condition{Type: Accepted, Reason: string(gatewayv1.PolicyReasonInvalid), Message: broken}
				}
				if broken != "" && !resolved.OK {
					cond.Reason = string(gatewayv1.BackendTLSPolicyReasonNoValidCACertificate)
				}
			}
			out.Parents = append(out.Parents, ParentStatus{parent, []Condition{cond, resolved}})
		}
		w.Statuses = append(w.Statuses, out)
	}
	slices.SortFunc(w.TrafficPolicies, func(a, b mesh.TrafficPolicy) int {
		return cmp.Or(strings.Compare(a.Service.String(), b.Service.String()), strings.Compare(a.Subset, b.Subset), cmp.Compare(a.Port, b.Port))
	})
}

// setTLS puts TLS into every traffic policy of the service's ports, 0 being
// all of them, and makes those that are missing. A policy for one port wins
// over one for all.
func (w *World) setTLS(service mesh.ServiceName, ports []uint16, tls *mesh.UpstreamTLS, broken, from string) {
	subsets := map[string]bool{"": true}
	for _, p := range w.TrafficPolicies {
		if p.Service == service {
			subsets[p.Subset] = true
		}
	}
	set := func(p *mesh.TrafficPolicy) {
		p.TLS, p.Broken = tls, cmp.Or(p.Broken, broken)
		p.From = strings.TrimPrefix(p.From+" "+from, " ")
	}
	for subset := range subsets {
		for _, port := range ports {
			found := false
			var whole mesh.TrafficPolicy
			for i := range w.TrafficPolicies {
				p := &w.TrafficPolicies[i]
				if p.Service != service || p.Subset != subset {
					continue
				}
				if p.Port == 0 {
					whole = *p
				}
				if p.Port == port || port == 0 && !strings.Contains(p.From, "BackendTLSPolicy/") {
					set(p)
					found = found || p.Port == port
				}
			}
			if !found {
				whole.Service, whole.Subset, whole.Port = service, subset, port
				set(&whole)
				w.TrafficPolicies = append(w.TrafficPolicies, whole)
			}
		}
	}
}

// checkBackendTLS reads one object for itself.
func checkBackendTLS(p BackendTLSPolicy) findings {
	var f findings
	if p.Err != nil {
		f.bad("", "cannot be read: %v", p.Err)
	}
	for i, ref := range p.Spec.TargetRefs {
		if ref.Group != "" || ref.Kind != "Service" {
			f.bad(fmt.Sprintf("spec.targetRefs[%d]", i), "is of kind %q of group %q, want a Service of group \"\"", ref.Kind, ref.Group)
		}
	}
	v := p.Spec.Validation
	if why := badHost(string(v.Hostname), false); why != "" {
		f.bad("spec.validation.hostname", "is %q, %s", v.Hostname, why)
	}
	for i, san := range v.SubjectAltNames {
		at := fmt.Sprintf("spec.validation.subjectAltNames[%d]", i)
		switch {
		case san.Type == gatewayv1.HostnameSubjectAltNameType && san.Hostname != "" && san.URI == "":
		case san.Type == gatewayv1.URISubjectAltNameType && san.URI != "" && san.Hostname == "":
		default:
			f.bad(at, "is of type %q, want Hostname with hostname, or URI with uri", san.Type)
		}
	}
	for i, ref := range v.CACertificateRefs {
		if ref.Group != "" || ref.Kind != "ConfigMap" {
			f.bad(fmt.Sprintf("spec.validation.caCertificateRefs[%d]", i), "is of kind %q of group %q, want a ConfigMap of group \"\"", ref.Kind, ref.Group)
		}
	}
	switch w := v.WellKnownCACertificates; {
	case w != nil && *w != gatewayv1.WellKnownCACertificatesSystem:
		f.bad("spec.validation.wellKnownCACertificates", "is %q, want System", *w)
	case w != nil && len(v.CACertificateRefs) > 0:
		f.bad("spec.validation", "has both caCertificateRefs and wellKnownCACertificates, of which it can have one")
	case w == nil && len(v.CACertificateRefs) == 0:
		f.bad("spec.validation", "names no certificate authority: give it caCertificateRefs or wellKnownCACertificates")
	}
	if len(p.Spec.Options) > 0 {
		f.bad("spec.options", "is not supported: there are none that Weft knows")
	}
	return f
}

// readBackendTLS reads what a policy asks for, in which found was found. broken
// says why nothing can be verified as it is written.
func readBackendTLS(p BackendTLSPolicy, found findings, maps []*corev1.ConfigMap) (tls *mesh.UpstreamTLS, resolved Condition, broken string) {
	v := p.Spec.Validation
	tls = &mesh.UpstreamTLS{Mode: mesh.TLSSimple, SNI: string(v.Hostname)}
	resolved = Condition{Type: ResolvedRefs, OK: true, Reason: string(gatewayv1.BackendTLSPolicyReasonResolvedRefs), Message: "everything that the policy names is there"}
	for _, san := range v.SubjectAltNames {
		tls.SubjectAltNames = append(tls.SubjectAltNames, cmp.Or(string(san.Hostname), string(san.URI)))
	}
	var roots strings.Builder
	for i, ref := range v.CACertificateRefs {
		path := fmt.Sprintf("spec.validation.caCertificateRefs[%d]", i)
		if why := found.brokenAt(path); why != "" {
			resolved = Condition{Type: ResolvedRefs, Reason: string(gatewayv1.BackendTLSPolicyReasonInvalidKind), Message: why}
			continue
		}
		at := slices.IndexFunc(maps, func(m *corev1.ConfigMap) bool {
			return m.Namespace == p.Name.Namespace && m.Name == string(ref.Name)
		})
		if at < 0 || !x509.NewCertPool().AppendCertsFromPEM([]byte(maps[at].Data["ca.crt"])) {
			resolved = Condition{Type: ResolvedRefs, Reason: string(gatewayv1.BackendTLSPolicyReasonInvalidCACertificateRef),
				Message: fmt.Sprintf("%s: ConfigMap %s has no certificate in ca.crt", path, ref.Name)}
			continue
		}
		roots.WriteString(maps[at].Data["ca.crt"])
		if !strings.HasSuffix(maps[at].Data["ca.crt"], "\n") {
			roots.WriteByte('\n')
		}
	}
	tls.Roots = roots.String()
	if tls.Roots == "" && len(v.CACertificateRefs) > 0 {
		broken = "there is no certificate authority to verify the endpoints by: " + resolved.Message
	}
	found = slices.DeleteFunc(slices.Clone(found), func(x Finding) bool {
		return below(x.Path, "spec.targetRefs") || below(x.Path, "spec.validation.caCertificateRefs")
	})
	return tls, resolved, cmp.Or(listed(found.of(SeverityError)), broken)
}
