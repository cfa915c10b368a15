package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

func TestNetworkTemplate(t *testing.T) {
	for _, kind := range []string{"bridge", "ptp"} {
		path := filepath.Join(t.TempDir(), "net.conflist")
		n := nodespec.Node{CNI: kind, PodCIDRs: []string{"10.244.1.0/24", "fd00::/64"}}
		if err := writeTemplate(path, networkText, n); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var list struct {
			Plugins []struct {
				Type      string
				IsGateway bool
				IPAM      struct{ Ranges [][]struct{ Subnet string } }
			}
		}
		if err := json.Unmarshal(b, &list); err != nil {
			t.Fatalf("%s: %v\n%s", kind, err, b)
		}
		p := list.Plugins[0]
		if p.Type != kind || p.IsGateway != (kind == "bridge") || len(p.IPAM.Ranges) != 2 {
			t.Errorf("%s: got %+v", kind, p)
		}
	}
}

// A file that is a link to elsewhere on the machine must be replaced, not
// written through: /etc/resolv.conf often is one.
func TestWriteTemplateReplacesLinks(t *testing.T) {
	dir := t.TempDir()
	machine, link := filepath.Join(dir, "machine"), filepath.Join(dir, "link")
	if err := os.WriteFile(machine, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(machine, link); err != nil {
		t.Fatal(err)
	}
	if err := writeTemplate(link, "{{join .ClusterDNS \" \"}}", nodespec.Node{ClusterDNS: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	kept, _ := os.ReadFile(machine)
	got, _ := os.ReadFile(link)
	if string(kept) != "keep" || strings.TrimSpace(string(got)) != "a b" {
		t.Errorf("got %q behind the link and %q in its place, want %q and %q", kept, got, "keep", "a b")
	}
}
