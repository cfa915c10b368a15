package route

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// A Rewrite is a mesh.Rewrite that is ready.
type Rewrite struct {
	Spec *mesh.Rewrite
	re   *regexp.Regexp
	with string // in the words of package regexp
}

func compileRewrite(spec *mesh.Rewrite) (*Rewrite, error) {
	if spec == nil {
		return nil, nil
	}
	w := &Rewrite{Spec: spec}
	if spec.Regex == nil {
		return w, nil
	}
	re, err := regexp.Compile(spec.Regex.Match)
	if err != nil {
		return nil, fmt.Errorf("rewrite: regular expression %q: %w", spec.Regex.Match, err)
	}
	with, err := template(spec.Regex.Replacement, re.NumSubexp())
	if err != nil {
		return nil, fmt.Errorf("rewrite: %w", err)
	}
	w.re, w.with = re, with
	return w, nil
}

// template turns \0 to \9 and \\ into what package regexp expands.
func template(s string, groups int) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '$':
			b.WriteString("$$")
		case c != '\\':
			b.WriteByte(c)
		case i+1 == len(s):
			return "", fmt.Errorf("replacement %q ends with a backslash", s)
		default:
			i++
			switch n := int(s[i] - '0'); {
			case s[i] == '\\':
				b.WriteByte('\\')
			case s[i] < '0' || s[i] > '9':
				return "", fmt.Errorf("replacement %q: \\%c is not a group", s, s[i])
			case n > groups:
				return "", fmt.Errorf("replacement %q: the expression has %d groups, not %d", s, groups, n)
			default:
				b.WriteString("${" + strconv.Itoa(n) + "}")
			}
		}
	}
	return b.String(), nil
}

// AppendPath appends the path that a request for path, which met res, is
// rewritten to, and returns it. It does not look at queries. The result begins
// with a slash, but for that it is what the rule makes of what the client sent:
// the caller checks that it is still a normalized path.
func (w *Rewrite) AppendPath(dst, path []byte, res *Result) []byte {
	from := len(dst)
	switch spec := w.Spec; {
	case spec.Path != nil:
		dst = append(dst, *spec.Path...)
	case spec.Prefix != nil:
		return AppendPrefix(dst, path, res, *spec.Prefix)
	case w.re != nil:
		dst = append(dst, w.re.ReplaceAll(path, []byte(w.with))...)
	default:
		return append(dst, path...)
	}
	return rooted(dst, from)
}

// AppendPrefix appends path with its part that res has matched replaced by
// prefix. Of two slashes that meet one is left out.
func AppendPrefix(dst, path []byte, res *Result, prefix string) []byte {
	from := len(dst)
	rest := path[min(res.Matched, len(path)):]
	if len(rest) > 0 && rest[0] == '/' {
		prefix = strings.TrimSuffix(prefix, "/")
	}
	return rooted(append(append(dst, prefix...), rest...), from)
}

// rooted puts a slash at from, if there is none.
func rooted(dst []byte, from int) []byte {
	if len(dst) > from && dst[from] == '/' {
		return dst
	}
	dst = append(dst, 0)
	copy(dst[from+1:], dst[from:])
	dst[from] = '/'
	return dst
}
