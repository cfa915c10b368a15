package deploy

import (
	"bytes"
	"compress/gzip"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "pack the definitions of the Gateway API anew")

// TestGatewayAPI proves that what is installed are the definitions of the
// module's version, unchanged.
func TestGatewayAPI(t *testing.T) {
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		t.Fatalf("find the module of the Gateway API: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "config", "crd", "standard", "gateway.networking.k8s.io_*s.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	n := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(b, []byte("kind: CustomResourceDefinition\n")) {
			continue // a policy about upgrades
		}
		want.WriteString("---\n")
		want.Write(b)
		n++
	}
	if n == 0 {
		t.Fatalf("the module has no definitions in %s", dir)
	}
	if *update {
		var packed bytes.Buffer
		w, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if err == nil {
			_, err = w.Write(want.Bytes())
		}
		if err == nil {
			err = w.Close()
		}
		if err == nil {
			err = os.WriteFile("gatewayapi/standard.yaml.gz", packed.Bytes(), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Skip("packed; run again without -update")
	}
	got, err := GatewayAPI()
	if err != nil {
		t.Fatal(err)
	}
	if got != want.String() {
		t.Error("the packed definitions are not those of the module: run go test ./deploy -update")
	}
}
