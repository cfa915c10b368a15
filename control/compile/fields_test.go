package compile

import (
	"bytes"
	"iter"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"
)

// specs are the specs of the kinds that users write.
var specs = map[string]any{
	KindVirtualService:      &networking.VirtualService{},
	KindDestinationRule:     &networking.DestinationRule{},
	KindServiceEntry:        &networking.ServiceEntry{},
	KindWorkloadEntry:       &networking.WorkloadEntry{},
	KindAuthorizationPolicy: &security.AuthorizationPolicy{},
	KindPeerAuthentication:  &security.PeerAuthentication{},
	KindHTTPRoute:           gatewayv1.HTTPRouteSpec{},
	KindGRPCRoute:           gatewayv1.GRPCRouteSpec{},
	KindTCPRoute:            gatewayv1.TCPRouteSpec{},
	KindTLSRoute:            gatewayv1.TLSRouteSpec{},
	KindBackendTLSPolicy:    gatewayv1.BackendTLSPolicySpec{},
	"ReferenceGrant":        gatewayv1.ReferenceGrantSpec{},
}

// TestEveryFieldHasAStory proves that each field of each type, and each value
// of its enumerations, stands in an object of some story: so what becomes of it
// is written down, and a field that a new version of an API brings is noticed.
func TestEveryFieldHasAStory(t *testing.T) {
	all, told := map[string]bool{}, map[string]bool{}
	for _, spec := range specs {
		if m, ok := spec.(proto.Message); ok {
			protoFields(all, m.ProtoReflect().Descriptor())
		} else {
			goFields(all, reflect.TypeOf(spec))
		}
	}
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories in testdata: %v", err)
	}
	for _, path := range files {
		story, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for doc := range bytes.SplitSeq(file(story, "objects.yaml"), []byte("\n---\n")) {
			u := &unstructured.Unstructured{}
			if err := yaml.Unmarshal(doc, &u.Object); err != nil {
				t.Fatal(err)
			}
			if m, ok := specs[u.GetKind()].(proto.Message); ok {
				protoTold(told, m.ProtoReflect().Descriptor(), u.Object["spec"])
			} else if spec := specs[u.GetKind()]; spec != nil {
				goTold(told, reflect.TypeOf(spec), u.Object["spec"])
			}
		}
	}
	for _, f := range slices.Sorted(maps.Keys(all)) {
		if !told[f] {
			t.Errorf("no story has %s", f)
		}
	}
}

// protoFields adds the fields of a message and of those in it, and the values
// of their enumerations: "Type.field" and "Type.field=VALUE".
func protoFields(to map[string]bool, d protoreflect.MessageDescriptor) {
	for i := range d.Fields().Len() {
		fd := d.Fields().Get(i)
		at := string(d.FullName()) + "." + fd.JSONName()
		if to[at] {
			continue
		}
		to[at] = true
		if fd.IsMap() {
			fd = fd.MapValue()
		}
		if e := fd.Enum(); e != nil {
			for j := range e.Values().Len() {
				to[at+"="+string(e.Values().Get(j).Name())] = true
			}
		}
		if m := fd.Message(); m != nil && !strings.HasPrefix(string(m.FullName()), "google.protobuf.") {
			protoFields(to, m)
		}
	}
}

// protoTold adds those of them that stand in v.
func protoTold(to map[string]bool, d protoreflect.MessageDescriptor, v any) {
	for _, in := range objects(v) {
		for k, x := range in {
			fd := fieldNamed(d, k)
			if fd == nil {
				continue
			}
			at := string(d.FullName()) + "." + fd.JSONName()
			to[at] = true
			if s, ok := x.(string); ok {
				to[at+"="+s] = true
			}
			if fd.IsMap() {
				for _, x := range objects(x) {
					if m := fd.MapValue().Message(); m != nil {
						protoTold(to, m, slices.Collect(maps.Values(x)))
					}
				}
			} else if m := fd.Message(); m != nil {
				protoTold(to, m, x)
			}
		}
	}
}

// objects returns v, or the elements of v, as far as they are objects.
func objects(v any) []map[string]any {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	var out []map[string]any
	for _, x := range list {
		if m, ok := x.(map[string]any); ok {
			out = append(out, m)
		}
	}
	return out
}

// goFields adds the fields of a type and of those in it by their names in JSON.
func goFields(to map[string]bool, typ reflect.Type) {
	typ = elem(typ)
	if typ.Kind() != reflect.Struct {
		return
	}
	for f := range jsonNames(typ) {
		if !to[f.name] {
			to[f.name] = true
			goFields(to, f.typ)
		}
	}
}

// goTold adds those of them that stand in v.
func goTold(to map[string]bool, typ reflect.Type, v any) {
	typ = elem(typ)
	if typ.Kind() != reflect.Struct {
		return
	}
	for _, in := range objects(v) {
		for f := range jsonNames(typ) {
			if x, ok := in[f.key]; ok {
				to[f.name] = true
				goTold(to, f.typ, x)
			}
		}
	}
}

func elem(typ reflect.Type) reflect.Type {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	return typ
}

// A jsonName is a field of a Go type as it stands in JSON.
type jsonName struct {
	name string // "Type.key", of the type that it is written in
	key  string
	typ  reflect.Type
}

// jsonNames yields the fields of a struct, with those that are embedded.
func jsonNames(typ reflect.Type) iter.Seq[jsonName] {
	return func(yield func(jsonName) bool) {
		for _, f := range reflect.VisibleFields(typ) {
			of := typ
			for _, i := range f.Index[:len(f.Index)-1] {
				of = of.Field(i).Type
			}
			key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if key != "" && !yield(jsonName{of.String() + "." + key, key, f.Type}) {
				return
			}
		}
	}
}
