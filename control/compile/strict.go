package compile

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// readSpecByField reads the object's spec into m, and says of each field that
// cannot be read where it stands. The others are read all the same, so that
// one bad rule does not take the good ones with it.
func readSpecByField(u *unstructured.Unstructured, m proto.Message) findings {
	var f findings
	good := f.readMessage("spec", u.Object["spec"], m.ProtoReflect().Descriptor())
	b, err := json.Marshal(good)
	if err == nil {
		err = protojson.Unmarshal(b, m)
	}
	if err != nil {
		f.bad("spec", "cannot be read: %s", plain(err))
	}
	return f
}

// readMessage returns the part of v that is a message of type d, and notes
// what is not.
func (f *findings) readMessage(path string, v any, d protoreflect.MessageDescriptor) map[string]any {
	out := map[string]any{}
	if v == nil {
		return out
	}
	in, ok := v.(map[string]any)
	if !ok {
		f.bad(path, "is %s, want an object with fields", kindOf(v))
		return out
	}
	chosen := map[protoreflect.FullName]string{}
	for _, key := range slices.Sorted(maps.Keys(in)) {
		at := path + "." + key
		fd := fieldNamed(d, key)
		if fd == nil {
			f.unknown(at, key, in[key], d)
			continue
		}
		if in[key] == nil {
			continue // null is a field that is not there
		}
		if o := fd.ContainingOneof(); o != nil {
			if first, taken := chosen[o.FullName()]; taken {
				f.bad(path, "has both %s and %s, of which it can have one", first, key)
				continue
			}
			chosen[o.FullName()] = key
		}
		if x, ok := f.readField(at, in[key], fd); ok {
			out[string(fd.Name())] = x
		}
	}
	return out
}

// unknown notes a field that is not one of d's. One without a value says
// nothing, and so nothing is lost without it.
func (f *findings) unknown(path, key string, v any, d protoreflect.MessageDescriptor) {
	hint := ""
	if near := nearest(key, d); near != "" {
		hint = fmt.Sprintf("; did you mean %s?", near)
	}
	if v == nil {
		f.warn(path, "is not a field of %s and has no value, so it is passed over (kubectl refuses it unless it is told --validate=false)%s", d.Name(), hint)
		return
	}
	f.bad(path, "is not a field of %s%s", d.Name(), hint)
}

// readField returns the part of v that can be read as the field fd. It reports
// false when nothing of it can.
func (f *findings) readField(path string, v any, fd protoreflect.FieldDescriptor) (any, bool) {
	switch {
	case fd.IsMap():
		in, ok := v.(map[string]any)
		if !ok {
			f.bad(path, "is %s, want names with values", kindOf(v))
			return nil, false
		}
		out := map[string]any{}
		for _, k := range slices.Sorted(maps.Keys(in)) {
			at := fmt.Sprintf("%s[%s]", path, k)
			if x, ok := f.readOne(at, in[k], fd.MapValue(), fd, func(v any) any { return map[string]any{k: v} }); ok {
				out[k] = x
			}
		}
		return out, true
	case fd.IsList():
		in, ok := v.([]any)
		if !ok {
			f.bad(path, "is %s, want a list", kindOf(v))
			return nil, false
		}
		out := []any{}
		for i, e := range in {
			at := fmt.Sprintf("%s[%d]", path, i)
			x, ok := f.readOne(at, e, fd, fd, func(v any) any { return []any{v} })
			if !ok && fd.Message() != nil {
				x, ok = map[string]any{}, true // keep the places of those behind it
			}
			if ok {
				out = append(out, x)
			}
		}
		return out, true
	}
	return f.readOne(path, v, fd, fd, func(v any) any { return v })
}

// readOne reads one value of the field whole, whose element is fd. As tells
// how the value stands in the field.
func (f *findings) readOne(path string, v any, fd, whole protoreflect.FieldDescriptor, as func(any) any) (any, bool) {
	if m := fd.Message(); m != nil && !strings.HasPrefix(string(m.FullName()), "google.protobuf.") {
		return f.readMessage(path, v, m), true
	}
	if text, ok := v.(string); ok && fd.Message() != nil && fd.Message().Name() == "Duration" {
		// Users write "5m", as the type's documentation does; protojson takes
		// nothing but seconds.
		if d, err := time.ParseDuration(text); err == nil {
			v = strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s"
		}
	}
	b, err := json.Marshal(map[string]any{string(whole.Name()): as(v)})
	if err == nil {
		err = protojson.Unmarshal(b, dynamicpb.NewMessage(whole.ContainingMessage()))
	}
	if err != nil {
		f.bad(path, "is %s, want %s", kindOf(v), wanted(fd))
		return nil, false
	}
	return v, true
}

func fieldNamed(d protoreflect.MessageDescriptor, key string) protoreflect.FieldDescriptor {
	if fd := d.Fields().ByJSONName(key); fd != nil {
		return fd
	}
	return d.Fields().ByName(protoreflect.Name(key))
}

// wanted says in words what a field takes.
func wanted(fd protoreflect.FieldDescriptor) string {
	if m := fd.Message(); m != nil {
		switch m.FullName() {
		case "google.protobuf.Duration":
			return "a duration, as 1.5s, 250ms or 1h"
		case "google.protobuf.BoolValue":
			return "true or false"
		case "google.protobuf.StringValue":
			return "text"
		}
		return "a number"
	}
	switch fd.Kind() {
	case protoreflect.EnumKind:
		var names []string
		vs := fd.Enum().Values()
		for i := range vs.Len() {
			names = append(names, string(vs.Get(i).Name()))
		}
		return "one of " + strings.Join(names, ", ")
	case protoreflect.StringKind:
		return "text (in quotes, if it looks like a number)"
	case protoreflect.BytesKind:
		return "base64"
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		return "a whole number that is not negative"
	case protoreflect.Int32Kind, protoreflect.Int64Kind:
		return "a whole number"
	}
	return "a number"
}

func kindOf(v any) string {
	switch v.(type) {
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	case nil:
		return "nothing"
	}
	return literal(v)
}

// literal returns v as it would be written, cut short.
func literal(v any) string {
	b, _ := json.Marshal(v)
	if s := string(b); len(s) <= 80 {
		return s
	}
	return string(b[:77]) + "..."
}

// nearest returns the field of d that differs from key in a few letters at most,
// or begins with it.
func nearest(key string, d protoreflect.MessageDescriptor) string {
	best, least := "", max(3, len(key)/4+1)
	for i := range d.Fields().Len() {
		name := d.Fields().Get(i).JSONName()
		n := distance(strings.ToLower(key), strings.ToLower(name))
		if len(key) > 3 && strings.HasPrefix(strings.ToLower(name), strings.ToLower(key)) {
			n = min(n, 2)
		}
		if n < least {
			best, least = name, n
		}
	}
	return best
}

// distance counts the letters to put in, take out or change to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := last
			if a[i] != b[j] {
				cost++
			}
			last = row[j+1]
			row[j+1] = min(row[j+1]+1, row[j]+1, cost)
		}
	}
	return row[len(b)]
}

// brokenAt returns the first error at the path or below it, or "".
func (f findings) brokenAt(path string) string {
	for _, x := range f {
		if x.Severity == SeverityError && below(x.Path, path) {
			return x.String()
		}
	}
	return ""
}

// below reports whether path is root or something in it.
func below(path, root string) bool {
	rest, ok := strings.CutPrefix(path, root)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// routePath is the path of one rule in a list of rules.
var routePath = regexp.MustCompile(`^spec\.(http|tls|tcp)\[\d+\]`)
