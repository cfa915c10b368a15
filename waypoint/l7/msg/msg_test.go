package msg

import (
	"strings"
	"testing"
)

// parse makes a Head of lines "name: value".
func parse(lines ...string) *Head {
	h := &Head{}
	h.Reset()
	h.Lines = []byte(strings.Join(lines, "\r\n") + "\r\n")
	at := uint32(0)
	for _, l := range lines {
		name, value, _ := strings.Cut(l, ": ")
		end := at + uint32(len(l))
		h.Fields = append(h.Fields, Field{Line: at, NameLen: uint16(len(name)), Value: end - uint32(len(value)), ValueEnd: end, End: end + 2, ID: Identify(name)})
		at = end + 2
	}
	return h
}

func TestEdit(t *testing.T) {
	wire := []string{"Accept: a", "X-One: 1", "x-two: 2", "X-One: 3", "User-Agent: u"}
	tests := []struct {
		name string
		edit func(h *Head)
		want []string
	}{
		{"nothing is changed", func(*Head) {}, wire},
		{"remove takes all, whatever their case", func(h *Head) { h.Remove("x-one") }, []string{"Accept: a", "x-two: 2", "User-Agent: u"}},
		{"remove a known field", func(h *Head) { h.RemoveID(UserAgent) }, wire[:4]},
		{"remove by prefix", func(h *Head) { h.RemovePrefix("x-") }, []string{"Accept: a", "User-Agent: u"}},
		{"set replaces all", func(h *Head) { Set(h, "x-one", "9") }, []string{"Accept: a", "x-two: 2", "User-Agent: u", "x-one: 9"}},
		{"append keeps", func(h *Head) { Append(h, "x-one", []byte("9")) }, append(append([]string{}, wire...), "x-one: 9")},
		{"an added field can be removed", func(h *Head) { Append(h, "x", "1"); Append(h, "y", "2"); Append(h, "z", "3"); h.Remove("y") },
			append(append([]string{}, wire...), "x: 1", "z: 3")},
		{"the first of the added at the offset that a kept run ends", func(h *Head) {
			h.Fields = h.Fields[:0]
			Append(h, "x", "1")
		}, []string{"x: 1"}},
		{"no splitting of messages", func(h *Head) {
			if Append(h, "x", "1\r\ny: 2") || Set(h, "accept", "\n") || Append(h, "a b", "c") || Append(h, "", "c") {
				t.Error("took what cannot be in a message")
			}
		}, wire},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := parse(wire...)
			tt.edit(h)
			want := strings.Join(tt.want, "\r\n") + "\r\n"
			if got := string(h.AppendLines(nil)); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestLookup(t *testing.T) {
	h := parse("X-One: 1", "x-one: 2", "CONTENT-type: text/plain", "Empty: ")
	if got := string(h.Lookup("x-one")); got != "1" {
		t.Errorf("first of x-one is %q", got)
	}
	if got, ok := h.Joined("x-one", nil); !ok || string(got) != "1,2" {
		t.Errorf("all of x-one are %q", got)
	}
	if got := string(h.Lookup("content-type")); got != "text/plain" {
		t.Errorf("content-type is %q", got)
	}
	if h.Lookup("empty") == nil || h.Lookup("absent") != nil {
		t.Error("an empty field is there, an absent one is not")
	}
	if _, ok := h.Joined("absent", nil); ok {
		t.Error("an absent field was joined")
	}
	n := 0
	for range h.All {
		n++
	}
	if n != 4 {
		t.Errorf("ranged over %d fields", n)
	}
}

// Every known name must be found in any case, and nothing that is near one.
func TestIdentify(t *testing.T) {
	n := 0
	for _, list := range known {
		for _, id := range list {
			n++
			name := names[id]
			if Identify(name) != id || Identify(strings.ToUpper(name)) != id {
				t.Errorf("%s is not identified", name)
			}
			if Identify(name+"x") == id || Identify(strings.Replace(name, "-", "_", 1)+"_") == id || Identify(name[:len(name)-1]+"?") == id {
				t.Errorf("something like %s is taken for it", name)
			}
		}
	}
	if n != int(XRequestID) {
		t.Errorf("%d names for %d fields", n, XRequestID)
	}
	if Identify("") != Other {
		t.Error("the empty name is known")
	}
}
