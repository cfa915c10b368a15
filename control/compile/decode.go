package compile

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	securityv1 "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/weft-mesh/weft/mesh"
)

// Policy objects are read from what the API server sent, field by field, and
// not through generated types: those skip a field that they do not know, and
// a condition that is skipped is access that is widened. And they refuse a
// whole list for one bad object in it.

// A Meta is the part of an object that every kind has.
type Meta struct {
	Name        mesh.Name
	Generation  int64
	Created     time.Time
	Annotations map[string]string
	// Selector is spec.selector.matchLabels; empty selects everything in
	// scope. It is filled as far as it can be read even when Err is set.
	Selector map[string]string
	// Err says why the spec could not be read. The object then has the
	// safest meaning it could have had.
	Err error
}

// An AuthorizationPolicy is the Kubernetes object of that name, read.
type AuthorizationPolicy struct {
	Meta
	// Targeted is set when the policy names targets instead of selecting
	// pods: it is meant for waypoints and gateways.
	Targeted bool
	// Targets are those, as far as they can be read even when Err is set.
	Targets []TargetRef
	Spec    *securityv1.AuthorizationPolicy // nil when Err is set
}

// A PeerAuthentication is the Kubernetes object of that name, read.
type PeerAuthentication struct {
	Meta
	Spec *securityv1.PeerAuthentication // nil when Err is set
}

// ReadAuthorizationPolicy reads an object of kind AuthorizationPolicy of the
// group security.istio.io, in any version: they all have one shape.
func ReadAuthorizationPolicy(u *unstructured.Unstructured) AuthorizationPolicy {
	spec := &securityv1.AuthorizationPolicy{}
	out := AuthorizationPolicy{Meta: readMeta(u)}
	out.Targeted = hasField(u, "targetRef") || hasField(u, "targetRefs")
	out.Targets = readTargets(u)
	if err := readSpec(u, spec); err != nil {
		out.Err = err
	}
	if out.Err == nil {
		out.Spec = spec
	}
	return out
}

// A TargetRef names what a policy protects.
type TargetRef struct {
	Path                         string // where it is written
	Group, Kind, Namespace, Name string
}

// readTargets reads spec.targetRefs, and spec.targetRef, its older form.
func readTargets(u *unstructured.Unstructured) []TargetRef {
	var out []TargetRef
	add := func(path string, v any) {
		m, _ := v.(map[string]any)
		text := func(k string) string { s, _ := m[k].(string); return s }
		out = append(out, TargetRef{path, text("group"), text("kind"), text("namespace"), text("name")})
	}
	if v, ok, _ := unstructured.NestedFieldNoCopy(u.Object, "spec", "targetRef"); ok && v != nil {
		add("spec.targetRef", v)
	}
	v, _, _ := unstructured.NestedFieldNoCopy(u.Object, "spec", "targetRefs")
	list, _ := v.([]any)
	for i, r := range list {
		add(fmt.Sprintf("spec.targetRefs[%d]", i), r)
	}
	return out
}

// ReadPeerAuthentication reads an object of kind PeerAuthentication of the
// group security.istio.io, in any version.
func ReadPeerAuthentication(u *unstructured.Unstructured) PeerAuthentication {
	spec := &securityv1.PeerAuthentication{}
	out := PeerAuthentication{Meta: readMeta(u)}
	if err := readSpec(u, spec); err != nil {
		out.Err = err
	}
	if out.Err == nil {
		out.Spec = spec
	}
	return out
}

// A VirtualService is the Kubernetes object of that name, read.
type VirtualService struct {
	Meta
	Spec *networkingv1alpha3.VirtualService // what of it could be read
	read findings
}

// ReadVirtualService reads an object of kind VirtualService of the group
// networking.istio.io, in any version: they all have one shape.
func ReadVirtualService(u *unstructured.Unstructured) VirtualService {
	out := VirtualService{Meta: readName(u), Spec: &networkingv1alpha3.VirtualService{}}
	out.read = readSpecByField(u, out.Spec)
	return out
}

// A DestinationRule is the Kubernetes object of that name, read.
type DestinationRule struct {
	Meta
	Spec *networkingv1alpha3.DestinationRule // what of it could be read
	read findings
}

// ReadDestinationRule reads an object of kind DestinationRule of the group
// networking.istio.io, in any version.
func ReadDestinationRule(u *unstructured.Unstructured) DestinationRule {
	out := DestinationRule{Meta: readName(u), Spec: &networkingv1alpha3.DestinationRule{}}
	out.read = readSpecByField(u, out.Spec)
	return out
}

// readName reads what every object has, without a selector.
func readName(u *unstructured.Unstructured) Meta {
	return Meta{
		Name:        mesh.Name{Namespace: u.GetNamespace(), Name: u.GetName()},
		Generation:  u.GetGeneration(),
		Created:     u.GetCreationTimestamp().Time,
		Annotations: u.GetAnnotations(),
	}
}

func readMeta(u *unstructured.Unstructured) Meta {
	m := readName(u)
	var err error
	m.Selector, _, err = unstructured.NestedStringMap(u.Object, "spec", "selector", "matchLabels")
	if err != nil {
		m.Err = fmt.Errorf("spec.selector: %v", err)
		return m
	}
	m.Selector, m.Err = readSelector(m.Selector)
	return m
}

// readSelector takes out of a selector what no pod can have, such as the star
// that means any value elsewhere: it would select nothing, and a policy that
// selects nothing protects nothing.
func readSelector(in map[string]string) (map[string]string, error) {
	var bad []string
	out := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(in)) {
		wrong := append(content.IsLabelKey(k), content.IsLabelValue(in[k])...)
		if len(wrong) == 0 {
			out[k] = in[k]
			continue
		}
		bad = append(bad, fmt.Sprintf("spec.selector.matchLabels %q is %q, which no pod can have", k, in[k]))
	}
	if len(bad) > 0 {
		return out, errors.New(listed(bad))
	}
	return in, nil
}

// hasField reports whether the spec has the named field, with any value that
// is not empty.
func hasField(u *unstructured.Unstructured, field string) bool {
	v, ok, _ := unstructured.NestedFieldNoCopy(u.Object, "spec", field)
	if list, isList := v.([]any); isList {
		return len(list) > 0
	}
	return ok && v != nil
}

// readSpec reads the object's spec into m. A field or enum value that m does
// not know is an error.
func readSpec(u *unstructured.Unstructured, m proto.Message) error {
	spec, ok := u.Object["spec"]
	if !ok || spec == nil {
		return nil // no spec is an empty spec
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("spec: %v", err)
	}
	if err := protojson.Unmarshal(b, m); err == nil {
		return nil
	} else if bad := readSpecByField(u, m.ProtoReflect().New().Interface()).of(SeverityError); len(bad) > 0 {
		return errors.New(listed(bad)) // where it stands, as Review says
	} else {
		return fmt.Errorf("spec: %s", plain(err))
	}
}

// linePos is where protojson stopped, in a text that the user never saw.
var linePos = regexp.MustCompile(`\(line \d+:\d+\):? ?`)

// plain returns what protobuf complains about. The library varies the space
// after its prefix from build to build, so that nobody depends on the text.
func plain(err error) string {
	s := strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\u00a0", " "), "proto:")
	return strings.TrimSpace(linePos.ReplaceAllString(s, ""))
}
