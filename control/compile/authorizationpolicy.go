package compile

import (
	"fmt"
	"slices"
	"strings"

	securityv1 "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// annotationDryRun makes a policy one that is reported and not enforced.
const annotationDryRun = "istio.io/dry-run"

// compileAuthorizationPolicies adds the policies that ztunnel enforces, the
// index of those that select pods, and a status for each object.
func (w *World) compileAuthorizationPolicies(in []AuthorizationPolicy) {
	for _, ap := range in {
		p, condition := w.settings.authorizationPolicy(ap)
		w.Statuses = append(w.Statuses, Status{
			Kind: KindAuthorizationPolicy, Name: ap.Name, Generation: ap.Generation,
			Conditions: []Condition{condition},
		})
		if p == nil {
			continue
		}
		if p.DryRun && condition.Reason == reasonInvalid {
			w.Statuses[len(w.Statuses)-1].Conditions[0].Message += " (dry run: reported, not enforced)"
		}
		w.Policies = append(w.Policies, *p)
		if p.Scope != mesh.ScopeSelector {
			continue
		}
		ns := ap.Name.Namespace
		if ns == w.settings.RootNamespace {
			ns = "" // selects in every namespace
		}
		w.selectors[ns] = append(w.selectors[ns], policySelector{labels.SelectorFromSet(ap.Selector), p.Name})
	}
}

// authorizationPolicy compiles one policy. It returns nil when ztunnel has
// nothing to do with it. The condition says what became of it.
func (s Settings) authorizationPolicy(ap AuthorizationPolicy) (*mesh.Policy, Condition) {
	if ap.Targeted && len(ap.Selector) == 0 {
		return nil, Condition{Type: WaypointAccepted, Reason: reasonNoWaypoint,
			Message: "not enforced: spec.targetRefs asks for a waypoint or gateway, and this version of Weft has none. " +
				"Use spec.selector to have it enforced by ztunnel."}
	}
	p := &mesh.Policy{Name: ap.Name, Scope: s.scope(ap)}
	where := s.where(ap, p.Scope)
	dryRun, dryRunErr := readDryRun(ap.Annotations)
	p.DryRun = dryRun

	if ap.Err != nil {
		return denyAll(p), invalid(fmt.Sprintf("the policy cannot be read, so every connection to %s is denied: %s", where, ap.Err))
	}
	if ap.Targeted {
		return denyAll(p), invalid(fmt.Sprintf("spec.selector and spec.targetRefs exclude each other, so every connection to %s is denied", where))
	}
	action := ap.Spec.GetAction()
	switch action {
	case securityv1.AuthorizationPolicy_ALLOW, securityv1.AuthorizationPolicy_DENY:
	case securityv1.AuthorizationPolicy_AUDIT:
		return nil, Condition{Type: ZtunnelAccepted, Reason: reasonUnsupported,
			Message: "not enforced: ztunnel does not support the AUDIT action. It would not change what is allowed. " +
				"To see what a policy would deny, annotate it with " + annotationDryRun + "=true."}
	case securityv1.AuthorizationPolicy_CUSTOM:
		return denyAll(p), Condition{Type: ZtunnelAccepted, Reason: reasonUnsupported,
			Message: "ztunnel does not support the CUSTOM action and cannot ask an external authorizer, so every connection to " + where + " is denied. " +
				"Use ALLOW or DENY."}
	default:
		return denyAll(p), invalid(fmt.Sprintf("spec.action %d is not known, so every connection to %s is denied", action, where))
	}

	c := ruleCompiler{namespace: ap.Name.Namespace, deny: action == securityv1.AuthorizationPolicy_DENY}
	for i, r := range ap.Spec.GetRules() {
		if g, ok := c.rule(fmt.Sprintf("spec.rules[%d]", i), r); ok {
			p.Groups = append(p.Groups, g)
		}
	}
	if len(c.invalid) > 0 {
		return c.failClosed(p, where)
	}
	p.Action = mesh.Allow
	if c.deny {
		p.Action = mesh.Deny
	}
	return p, c.condition(where, p.DryRun, dryRunErr)
}

// denyAll makes p deny everything that it applies to.
func denyAll(p *mesh.Policy) *mesh.Policy {
	p.Action = mesh.Deny
	p.Groups = []mesh.Group{{}} // an empty group matches everything
	return p
}

func invalid(message string) Condition {
	return Condition{Type: ZtunnelAccepted, Reason: reasonInvalid, Message: message}
}

// failClosed gives p the safe meaning of a policy with invalid rules: a DENY
// policy denies everything, and an ALLOW policy allows nothing.
func (c *ruleCompiler) failClosed(p *mesh.Policy, where string) (*mesh.Policy, Condition) {
	why := listed(c.invalid)
	if c.deny {
		return denyAll(p), invalid(fmt.Sprintf("the policy is invalid, so every connection to %s is denied: %s", where, why))
	}
	p.Action, p.Groups = mesh.Allow, nil
	return p, invalid(fmt.Sprintf("the policy is invalid, so it allows nothing, and connections to %s that no other ALLOW policy allows are denied: %s", where, why))
}

// condition reports a policy that is enforced.
func (c *ruleCompiler) condition(where string, dryRun bool, dryRunErr error) Condition {
	verb := "enforced"
	if dryRun {
		verb = "evaluated but not enforced (dry run)"
	}
	if len(c.l7) == 0 && dryRunErr == nil {
		return Condition{Type: ZtunnelAccepted, OK: true, Reason: reasonAccepted, Message: verb + " by ztunnel for " + where}
	}
	var notes []string
	if dryRunErr != nil {
		notes = append(notes, dryRunErr.Error())
	}
	if len(c.l7) > 0 {
		fields := strings.Join(c.l7, ", ")
		if c.deny {
			notes = append(notes, "ztunnel cannot check "+fields+" and denies without looking at it: more is denied than the rule says")
		} else {
			notes = append(notes, "ztunnel cannot check "+fields+": a rule with such a field allows nothing")
		}
	}
	return Condition{Type: ZtunnelAccepted, Reason: reasonUnsupported,
		Message: verb + " by ztunnel for " + where + ", but not as written: " + strings.Join(notes, "; ")}
}

// scope returns where the policy applies.
func (s Settings) scope(ap AuthorizationPolicy) mesh.Scope {
	switch {
	case len(ap.Selector) > 0:
		return mesh.ScopeSelector
	case ap.Name.Namespace == s.RootNamespace:
		return mesh.ScopeGlobal
	}
	return mesh.ScopeNamespace
}

// where says in words where the policy applies.
func (s Settings) where(ap AuthorizationPolicy, scope mesh.Scope) string {
	in := "in namespace " + ap.Name.Namespace
	if ap.Name.Namespace == s.RootNamespace {
		in = "in every namespace"
	}
	if scope == mesh.ScopeSelector {
		return "pods " + in + " with " + labels.SelectorFromSet(ap.Selector).String()
	}
	return "every pod " + in
}

// readDryRun reads the dry-run annotation. A value that is not a boolean is
// an error, and the policy is enforced.
func readDryRun(annotations map[string]string) (bool, error) {
	switch v := annotations[annotationDryRun]; v {
	case "true":
		return true, nil
	case "", "false":
		return false, nil
	default:
		return false, fmt.Errorf("annotation %s is %q, want true or false; taken as false", annotationDryRun, v)
	}
}

// note appends path to the list of fields that only a waypoint can check.
func (c *ruleCompiler) note(path string) {
	if !slices.Contains(c.l7, path) {
		c.l7 = append(c.l7, path)
	}
}

// listed joins complaints, and counts those that would make the text too long
// to read.
func listed(complaints []string) string {
	const most = 8
	if n := len(complaints) - most; n > 0 {
		return fmt.Sprintf("%s; and %d more", strings.Join(complaints[:most], "; "), n)
	}
	return strings.Join(complaints, "; ")
}
