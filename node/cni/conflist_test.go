package cni

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var testEntry = Entry{AgentSocket: "/var/run/weft/cni.sock", ExcludeNamespaces: []string{"weft-system", "kube-system"}}

const ours = `{"type":"weft-cni","agentSocket":"/var/run/weft/cni.sock","excludeNamespaces":["weft-system","kube-system"]}`

const bridge = `{
  "cniVersion": "1.0.0",
  "name": "net",
  "big": 12345678901234567890,
  "plugins": [
    {"type": "bridge", "ipam": {"type": "host-local"}},
    {
      "type": "portmap"
    }
  ],
  "disableCheck": true
}
`

const bridgeChained = `{
  "cniVersion": "1.0.0",
  "name": "net",
  "big": 12345678901234567890,
  "plugins": [
    {"type": "bridge", "ipam": {"type": "host-local"}},
    {
      "type": "portmap"
    },
    ` + ours + `
  ],
  "disableCheck": true
}
`

func TestChain(t *testing.T) {
	tests := []struct {
		name, in, want, err string
	}{
		{"appended last, the rest byte by byte", bridge, bridgeChained, ""},
		{"chained already: not touched", bridgeChained, bridgeChained, ""},
		{"one line", `{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"}]}`, `{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"},` + ours + `]}`, ""},
		{
			"ours with other keys order and white space: same meaning, not touched",
			`{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"},{ "agentSocket":"/var/run/weft/cni.sock","type":"weft-cni","excludeNamespaces":["weft-system", "kube-system"] }]}`,
			`{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"},{ "agentSocket":"/var/run/weft/cni.sock","type":"weft-cni","excludeNamespaces":["weft-system", "kube-system"] }]}`, "",
		},
		{
			"ours with another socket: replaced in its place",
			`{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"},{"type":"weft-cni","agentSocket":"/old"},{"type":"last"}]}`,
			`{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"},` + ours + `,{"type":"last"}]}`, "",
		},
		{
			"ours twice: once",
			`{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"weft-cni"}, {"type":"ptp"},{"type":"weft-cni","agentSocket":"/old"}]}`,
			`{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp"},` + ours + `]}`, "",
		},
		{
			"plugins given twice: the last list counts",
			`{"plugins":[{"type":"a"}],"cniVersion":"1.1.0","name":"n","plugins":[ {"type":"b"}]}`,
			`{"plugins":[{"type":"a"}],"cniVersion":"1.1.0","name":"n","plugins":[ {"type":"b"}, ` + ours + `]}`, "",
		},
		{"empty file", ``, "", "not JSON"},
		{"half a file", bridge[:60], "", "not JSON"},
		{"a list", `[]`, "", "not a JSON object"},
		{"no name", `{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}`, "", "no name"},
		{"no plugins", `{"cniVersion":"1.0.0","name":"n"}`, "", "no plugins"},
		{"empty plugins", `{"cniVersion":"1.0.0","name":"n","plugins":[]}`, "", "no plugins"},
		{"plugins not a list", `{"cniVersion":"1.0.0","name":"n","plugins":{"type":"a"}}`, "", "not a list"},
		{"plugin is a number", `{"cniVersion":"1.0.0","name":"n","plugins":[1]}`, "", "plugin 0"},
		{"plugin without type", `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"},{}]}`, "", "plugin 1 has no type"},
		{"version that cannot chain", `{"cniVersion":"0.2.0","name":"n","plugins":[{"type":"a"}]}`, "", "0.3.0"},
		{"no version", `{"name":"n","plugins":[{"type":"a"}]}`, "", "0.3.0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := chain([]byte(tt.in), testEntry)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("chain: %v, want an error with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Error(diff)
			}
			again, err := chain(got, testEntry)
			if err != nil || !bytes.Equal(again, got) {
				t.Errorf("chaining twice changes the file again: %v\n%s", err, again)
			}
		})
	}
}

func TestUnchainGivesTheFileBack(t *testing.T) {
	got, err := unchain([]byte(bridgeChained))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(bridge, string(got)); diff != "" {
		t.Error(diff)
	}
	if _, err := unchain([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[` + ours + `]}`)); err == nil {
		t.Error("unchain left a conflist without plugins, which no runtime takes")
	}
}

func TestPlanInstall(t *testing.T) {
	chained := `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"},` + ours + `]}`
	plain := `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"}]}`
	lone := `{"cniVersion":"1.0.0","name":"n","type":"a"}`
	fromLone := "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"n\",\n  \"plugins\": [\n    {\n      \"cniVersion\": \"1.0.0\",\n      \"name\": \"n\",\n      \"type\": \"a\"\n    },\n    " + ours + "\n  ]\n}"
	type files map[string]string
	tests := []struct {
		name   string
		in     files
		active string
		want   files // "" means removed
		err    string
	}{
		{"the first by name is taken", files{"20-b.conflist": plain, "10-a.conflist": plain, "30-c.conf": lone}, "10-a.conflist", files{"10-a.conflist": chained}, ""},
		{"done already", files{"10-a.conflist": chained}, "10-a.conflist", files{}, ""},
		{"another network plugin sorted itself before", files{"05-new.conflist": plain, "10-a.conflist": chained}, "05-new.conflist", files{"05-new.conflist": chained}, ""},
		{"a broken file is passed over", files{"00-x.conflist": "{", "10-a.conflist": plain}, "10-a.conflist", files{"10-a.conflist": chained}, ""},
		{"a lone conf gets a conflist before it", files{"10-a.conf": lone}, "10-a-weft.conflist", files{"10-a-weft.conflist": fromLone}, ""},
		{"that conflist is kept", files{"10-a.conf": lone, "10-a-weft.conflist": fromLone}, "10-a-weft.conflist", files{}, ""},
		{"and follows its source", files{"10-a.conf": lone, "10-a-weft.conflist": chained}, "10-a-weft.conflist", files{"10-a-weft.conflist": fromLone}, ""},
		{"and goes when its source goes", files{"20-b.conflist": plain, "10-a-weft.conflist": fromLone}, "20-b.conflist", files{"20-b.conflist": chained, "10-a-weft.conflist": ""}, ""},
		{"nothing there", files{}, "", files{}, "install a CNI network plugin"},
		{"nothing usable says why", files{"10-a.conflist": "nonsense", "20-b.conf": "{}"}, "", files{}, "10-a.conflist: it is not JSON"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var in []confFile
			for name, data := range tt.in {
				in = append(in, confFile{name, []byte(data)})
			}
			got, err := planInstall(in, testEntry)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("planInstall: %v, want an error with %q", err, tt.err)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if got.active != tt.active {
				t.Errorf("active: got %q, want %q", got.active, tt.active)
			}
			edits := files{}
			for _, e := range got.edits {
				edits[e.name] = string(e.data)
			}
			if diff := cmp.Diff(tt.want, edits); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPlanRemoveTouchesOnlyOurs(t *testing.T) {
	got := planRemove([]confFile{
		{"10-a.conflist", []byte(bridgeChained)},
		{"20-b.conflist", []byte(bridge)},
		{"20-b-weft.conflist", []byte(bridgeChained)},
		{"30-c.conf", []byte(`{"type":"weft-cni"}`)},
		{"40-d.conflist", []byte("{")},
	})
	want := []edit{{"10-a.conflist", []byte(bridge)}, {name: "20-b-weft.conflist"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(edit{})); diff != "" {
		t.Error(diff)
	}
}

// Whatever a directory holds, the editor never makes a usable file unusable,
// never changes what is not ours, and can take back what it did.
func FuzzChain(f *testing.F) {
	for _, s := range []string{bridge, bridgeChained, `{"plugins":[{"type":"weft-cni"},{"type":"a"}],"name":"n","cniVersion":"1.0.0"}`, `{"cniVersion":"0.4.0","name":"n","type":"a"}`, `{}`, `[`, `{"plugins":[{"type":"a"}],"cniVersion":"1.1.0","name":"n","plugins":[ {"type":"b"} ,{"type":"weft-cni"}]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if out, err := derive(in, testEntry); err == nil {
			if _, err := parseConflist(out); err != nil {
				t.Fatalf("derived a conflist that cannot be read: %v", err)
			}
		}
		out, err := chain(in, testEntry)
		if err != nil {
			return
		}
		l, err := parseConflist(out)
		if err != nil || len(l.ours) != 1 {
			t.Fatalf("chained %q into %q: %d entries, %v", in, out, len(l.ours), err)
		}
		was, err := parseConflist(in)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(others(t, in, was), others(t, out, l)); diff != "" {
			t.Fatalf("changed what is not ours: %s", diff)
		}
		back, err := unchain(out)
		if err != nil {
			if len(was.ours) == len(was.plugins) {
				return // there was nothing but ours
			}
			t.Fatal(err)
		}
		if len(was.ours) == 0 && !bytes.Equal(back, in) {
			t.Fatalf("chain and unchain changed %q into %q", in, back)
		}
	})
}

// others returns the plugins that are not ours.
func others(t *testing.T, data []byte, l layout) []string {
	t.Helper()
	var out []string
	for _, p := range l.plugins {
		var plugin struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(data[p.start:p.end], &plugin); err != nil {
			t.Fatal(err)
		}
		if plugin.Type != PluginType {
			out = append(out, string(data[p.start:p.end]))
		}
	}
	return out
}
