package l7

import (
	"bytes"
	"net/url"
	stdpath "path"
	"strings"
	"testing"
)

func TestNormalizePath(t *testing.T) {
	const refused = "refused"
	for _, tt := range []struct{ name, in, want string }{
		{"nothing to do", "/a/b", "/a/b"},
		{"the root", "/", "/"},
		{"OPTIONS", "*", "*"},
		{"CONNECT", "", ""},
		{"a trailing slash means something", "/a/", "/a/"},
		{"the query is left alone", "/a?b=/../%zz//", "/a?b=/../%zz//"},
		{"the query is left alone beside what is not", "/a/../b?c=/../%2e", "/b?c=/../%2e"},
		{"a question mark in the query", "/a//b?c?d", "/a/b?c?d"},
		{"dots in names", "/a.b/.c/..d/e../...", "/a.b/.c/..d/e../..."},

		{"dot segment", "/a/./b", "/a/b"},
		{"dot segment at the end", "/a/.", "/a/"},
		{"parent", "/a/../b", "/b"},
		{"parent at the end", "/a/b/..", "/a/"},
		{"parent of the root", "/../../a", "/a"},
		{"only parents", "/..", "/"},
		{"slashes in a row", "//a///b//", "/a/b/"},
		{"only slashes", "///", "/"},
		{"encoded letters", "/%61dmin", "/admin"},
		{"encoded dots", "/a/%2e%2e/admin", "/admin"},
		{"half encoded dots", "/a/.%2E/admin", "/admin"},
		{"encoded twice stays encoded once", "/a/%252e%252e/admin", "/a/%252e%252e/admin"},
		{"upper case", "/%e2%82%ac%3a", "/%E2%82%AC%3A"},
		{"an encoded percent sign", "/100%25", "/100%25"},
		{"an encoded question mark is no query", "/a%3fb", "/a%3Fb"},
		{"encoded slash in a name", "/projects/a%2fb", "/projects/a%2Fb"},
		{"encoded slash alone", "/queues/%2F/x", "/queues/%2F/x"},
		{"parameters", "/a;v=1/b;..", "/a;v=1/b;.."},

		{"encoded slash and dots", "/a%2f..%2fadmin", refused},
		{"encoded slash and dots at the end", "/a%2F%2e%2e", refused},
		{"dots and encoded slash", "/a/..%2fadmin", refused},
		{"encoded backslash and dots", "/a/..%5cadmin", refused},
		{"encoded slash and one dot", "/a%2f./admin", refused},
		{"parent with parameters", "/a/..;/admin", refused},
		{"parent with parameters and encoded slash", "/a%2f..;x=1/admin", refused},
		{"encoded parameters of a parent are a name", "/a/..%3B/admin", "/a/..%3B/admin"},
		{"backslash", `/a\..\admin`, refused},
		{"zero", "/a%00b", refused},
		{"broken encoding", "/a%2", refused},
		{"broken encoding at the end", "/a%", refused},
		{"broken digits", "/a%zz", refused},
		{"encoding over a slash", "/a%2/f", refused},
		{"space", "/a b", refused},
		{"control character", "/a\x01", refused},
		{"line break", "/a\r\nx: y", refused},
		{"line break in the query", "/a?\r\n", refused},
		{"not ASCII", "/\xe9", refused},
		{"fragment", "/a#/../b", refused},
		{"not a path", "a/b", refused},
		{"two asterisks", "**", refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := normalizePath([]byte(tt.in), nil)
			if !ok {
				got = []byte(refused)
			}
			if string(got) != tt.want {
				t.Errorf("%q is %q, want %q", tt.in, got, tt.want)
			}
		})
	}
}

func TestUnslashed(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"/a/b", ""},
		{"/a%2", ""},
		{"/a%2Fb", "/a/b"},
		{"/%2Fadmin%5C", "/admin/"},
		{"/a%2F%2F/b", "/a/b"},
		{"/%2F", "/"},
	} {
		if got := string(unslashed([]byte(tt.in), nil)); got != tt.want {
			t.Errorf("%q unslashed is %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestNormalizePathDoesNotAllocate(t *testing.T) {
	clean, scratch, dirty := []byte("/api/v1/things/42?x=y"), make([]byte, 0, 64), []byte("/api//v1/../%61")
	if n := testing.AllocsPerRun(100, func() { normalizePath(clean, nil); normalizePath(dirty, scratch) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// What is accepted is a fixed point, stays below the root whoever decodes it
// and how often, and where nothing is encoded is what package path makes of it.
func FuzzNormalizePath(f *testing.F) {
	for _, s := range []string{"/a/../b", "/a%2f..%2f", "/%2e%2e/x?y", "//..;/", "/a/./%2E/..%5c", "/%25%32%65/", "/.%252e/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		in := []byte(s)
		clean, ok := normalizePath(in, nil)
		if string(in) != s {
			t.Fatalf("%q was changed in place", s)
		}
		if !ok || len(clean) == 0 || clean[0] == '*' {
			return
		}
		if again, ok := normalizePath(clean, nil); !ok || !bytes.Equal(again, clean) {
			t.Fatalf("%q is %q, and that is %q (%v)", s, clean, again, ok)
		}
		p, _ := cutQuery(clean)
		if strings.Contains(string(p), "//") {
			t.Fatalf("%q is %q", s, clean)
		}
		decoded, err := url.PathUnescape(string(p))
		if err != nil {
			t.Fatalf("%q is %q, which cannot be decoded: %v", s, clean, err)
		}
		for _, segment := range strings.FieldsFunc(decoded, func(r rune) bool { return r == '/' || r == '\\' }) {
			if segment == "." || segment == ".." {
				t.Fatalf("%q is %q, in which a server finds %q", s, clean, segment)
			}
		}
		before, _ := cutQuery(in)
		if !bytes.ContainsRune(before, '%') {
			want := stdpath.Clean(string(before))
			if got := strings.TrimSuffix(string(p), "/"); got != strings.TrimSuffix(want, "/") {
				t.Fatalf("%q is %q, want %q", s, p, want)
			}
		}
	})
}

func BenchmarkNormalizePath(b *testing.B) {
	path := []byte("/api/v1/things/42/parts?color=red")
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := normalizePath(path, nil); !ok {
			b.Fatal("refused")
		}
	}
}
