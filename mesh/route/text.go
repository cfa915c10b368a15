package route

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// text is a mesh.TextMatch that is ready. Its zero value, and one of a kind
// that is not known, holds: its rule is broken, and broken rules must not be
// passed by.
type text struct {
	kind  mesh.TextKind
	value string // in lower case if fold is set
	fold  bool
	re    *regexp.Regexp
	start string // what every match of re begins with
}

func compileText(m mesh.TextMatch) (text, error) {
	t := text{kind: m.Kind, value: m.Value, fold: m.IgnoreCase}
	if t.fold {
		t.value = strings.ToLower(t.value)
	}
	switch m.Kind {
	case mesh.TextExact, mesh.TextPrefix, mesh.TextSuffix, mesh.TextPresence:
		return t, nil
	case mesh.TextRegex:
		re, start, err := compileRegex(m.Value, m.IgnoreCase)
		if err != nil {
			return text{}, err
		}
		t.re, t.start = re, start
		return t, nil
	}
	return text{}, fmt.Errorf("text match of kind %q is not known", m.Kind)
}

// holds reports whether b fits. It is there, if it is empty too.
func (t *text) holds(b []byte) bool {
	switch t.kind {
	case mesh.TextExact:
		return len(b) == len(t.value) && t.equal(b)
	case mesh.TextPrefix:
		return len(b) >= len(t.value) && t.equal(b[:len(t.value)])
	case mesh.TextSuffix:
		return len(b) >= len(t.value) && t.equal(b[len(b)-len(t.value):])
	case mesh.TextRegex:
		return hasPrefix(b, t.start) && t.re.Match(b)
	}
	return true
}

// equal compares b with the value, which is as long.
func (t *text) equal(b []byte) bool {
	if !t.fold {
		return string(b) == t.value
	}
	return equalFold(b, t.value)
}

// compileRegex returns an RE2 expression for whole texts, and what each of them
// begins with.
func compileRegex(expr string, fold bool) (*regexp.Regexp, string, error) {
	if fold {
		expr = "(?i)" + expr
	}
	plain, err := regexp.Compile(expr) // by itself: "a)(b" must not become valid
	if err != nil {
		return nil, "", fmt.Errorf("regular expression %q: %w", expr, err)
	}
	whole, err := regexp.Compile(`\A(?:` + expr + `)\z`)
	if err != nil {
		return nil, "", fmt.Errorf("regular expression %q: %w", expr, err)
	}
	start, _ := plain.LiteralPrefix()
	return whole, start, nil
}

func hasPrefix(b []byte, prefix string) bool {
	return len(b) >= len(prefix) && string(b[:len(prefix)]) == prefix
}

// equalFold compares b with a text in lower case of the same length, without
// regard to the case of ASCII letters.
func equalFold(b []byte, low string) bool {
	for i, c := range b {
		if lower(c) != low[i] {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// toLower returns b in lower case: b itself if it is.
func toLower(b []byte) []byte {
	if bytes.ContainsFunc(b, func(r rune) bool { return 'A' <= r && r <= 'Z' }) {
		return bytes.ToLower(b)
	}
	return b
}

// field is a mesh.FieldMatch that is ready.
type field struct {
	name string
	text
	not bool
}

func compileFields(list []mesh.FieldMatch) ([]field, error) {
	fields := make([]field, 0, len(list))
	var first error
	for _, m := range list {
		t, err := compileText(m.TextMatch)
		if err != nil && first == nil {
			first = fmt.Errorf("%s: %w", m.Name, err)
		}
		if err != nil {
			continue // holds
		}
		fields = append(fields, field{name: m.Name, text: t, not: m.Not})
	}
	return fields, first
}
