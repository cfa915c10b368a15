package compile

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	securityv1 "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// annotationDryRun makes a policy one that is reported and not enforced.
const annotationDryRun = "istio.io/dry-run"

// compileAuthorizationPolicies adds the policies that ztunnel and waypoints enforce, the
// index of those that select pods, and a status for each object.
func (w *World) compileAuthorizationPolicies(in []AuthorizationPolicy) {
	for _, ap := range in {
		p, condition := w.authorizationPolicy(ap)
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

// authorizationPolicy compiles one policy: for the waypoints of its targets if
// it names any, else for ztunnel. It returns nil when nobody has anything to do
// with it. The condition says what became of it.
func (w *World) authorizationPolicy(ap AuthorizationPolicy) (*mesh.Policy, Condition) {
	s := w.settings
	if !ap.Targeted || len(ap.Selector) > 0 {
		scope := s.scope(ap)
		e := enforcement{Policy: mesh.Policy{Name: ap.Name, Scope: scope}, by: "ztunnel", kind: ZtunnelAccepted, what: "connection", where: s.where(ap, scope)}
		if ap.Targeted && ap.Err == nil {
			ap.Err = errBoth
		}
		return s.enforce(ap, e)
	}
	e, problems := w.target(ap)
	if len(e.Targets) == 0 {
		return nil, Condition{Type: WaypointAccepted, Reason: reasonNotFound, Message: "not enforced: " + listed(problems)}
	}
	p, c := s.enforce(ap, e)
	switch {
	case len(problems) == 0:
	case e.nowhere && c.OK:
		c = Condition{Type: e.kind, Reason: reasonNoWaypoint, Message: "not enforced: " + listed(problems)}
	default:
		if c.OK {
			c.OK, c.Reason = false, reasonNoWaypoint
		}
		c.Message += "; but " + listed(problems)
	}
	return p, c
}

// errBoth refuses a policy that says twice where it is enforced.
var errBoth = errors.New("spec has both selector and targetRefs, of which it can have one")

// An enforcement says where a policy is enforced, and by whom.
type enforcement struct {
	mesh.Policy
	by       string // "ztunnel"
	kind     string // of the condition
	what     string // "connection" or "request"
	where    string
	nowhere  bool // it has targets, and none of them has a waypoint
	waypoint bool
}

// enforce compiles one policy for the place where it is enforced.
func (s Settings) enforce(ap AuthorizationPolicy, e enforcement) (*mesh.Policy, Condition) {
	p := &e.Policy
	dryRun, dryRunErr := readDryRun(ap.Annotations)
	p.DryRun = dryRun

	if ap.Err != nil {
		return denyAll(p), e.invalid("the policy cannot be read, so every %s to %s is denied: %s", e.what, e.where, ap.Err)
	}
	action := ap.Spec.GetAction()
	switch action {
	case securityv1.AuthorizationPolicy_ALLOW, securityv1.AuthorizationPolicy_DENY:
	case securityv1.AuthorizationPolicy_AUDIT:
		return nil, Condition{Type: e.kind, Reason: reasonUnsupported,
			Message: "not enforced: " + e.by + " does not support the AUDIT action. It would not change what is allowed. " +
				"To see what a policy would deny, annotate it with " + annotationDryRun + "=true."}
	case securityv1.AuthorizationPolicy_CUSTOM:
		return denyAll(p), Condition{Type: e.kind, Reason: reasonUnsupported,
			Message: e.by + " does not support the CUSTOM action and cannot ask an external authorizer, so every " + e.what + " to " + e.where + " is denied. " +
				"Use ALLOW or DENY."}
	default:
		return denyAll(p), e.invalid("spec.action is %d, which is not known, so every %s to %s is denied", action, e.what, e.where)
	}

	c := ruleCompiler{namespace: ap.Name.Namespace, deny: action == securityv1.AuthorizationPolicy_DENY, waypoint: e.waypoint}
	for i, r := range ap.Spec.GetRules() {
		if g, ok := c.rule(fmt.Sprintf("spec.rules[%d]", i), r); ok {
			p.Groups = append(p.Groups, g)
		}
	}
	if len(c.invalid) > 0 {
		return c.failClosed(p, e)
	}
	p.Action = mesh.Allow
	if c.deny {
		p.Action = mesh.Deny
	}
	return p, c.condition(e, dryRunErr)
}

// denyAll makes p deny everything that it applies to.
func denyAll(p *mesh.Policy) *mesh.Policy {
	p.Action = mesh.Deny
	p.Groups = []mesh.Group{{}} // an empty group matches everything
	return p
}

func (e enforcement) invalid(format string, args ...any) Condition {
	return Condition{Type: e.kind, Reason: reasonInvalid, Message: fmt.Sprintf(format, args...)}
}

func invalid(message string) Condition {
	return Condition{Type: ZtunnelAccepted, Reason: reasonInvalid, Message: message}
}

// failClosed gives p the safe meaning of a policy with invalid rules: a DENY
// policy denies everything, and an ALLOW policy allows nothing.
func (c *ruleCompiler) failClosed(p *mesh.Policy, e enforcement) (*mesh.Policy, Condition) {
	why := listed(c.invalid)
	if c.deny {
		return denyAll(p), e.invalid("the policy is invalid, so every %s to %s is denied: %s", e.what, e.where, why)
	}
	p.Action, p.Groups = mesh.Allow, nil
	return p, e.invalid("the policy is invalid, so it allows nothing, and %ss to %s that no other ALLOW policy allows are denied: %s", e.what, e.where, why)
}

// condition reports a policy that is enforced.
func (c *ruleCompiler) condition(e enforcement, dryRunErr error) Condition {
	verb := "enforced"
	if e.DryRun {
		verb = "evaluated but not enforced (dry run)"
	}
	if len(c.l7) == 0 && dryRunErr == nil {
		return Condition{Type: e.kind, OK: true, Reason: reasonAccepted, Message: verb + " by " + e.by + " for " + e.where}
	}
	var notes []string
	if dryRunErr != nil {
		notes = append(notes, dryRunErr.Error())
	}
	if len(c.l7) > 0 {
		fields := strings.Join(c.l7, ", ")
		if c.deny {
			notes = append(notes, e.by+" cannot check "+fields+" and denies without looking at it: more is denied than the rule says")
		} else {
			notes = append(notes, e.by+" cannot check "+fields+": a rule with such a field allows nothing")
		}
	}
	return Condition{Type: e.kind, Reason: reasonUnsupported,
		Message: verb + " by " + e.by + " for " + e.where + ", but not as written: " + strings.Join(notes, "; ")}
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
