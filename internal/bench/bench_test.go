package bench

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMedianAndRatio(t *testing.T) {
	if got := Median([]float64{9, 1, 5}); got != 5 {
		t.Errorf("median %v", got)
	}
	if got := Median([]float64{4, 2}); got != 3 {
		t.Errorf("median of two %v", got)
	}
	if got := Median(nil); got != 0 {
		t.Errorf("median of none %v", got)
	}
	if got := Ratio([]float64{2, 30, 4}, []float64{1, 10, 2}); got != 2 {
		t.Errorf("ratio %v", got)
	}
}

func TestMergeKeepsWhatOthersWrote(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out", "bench.json")
	for _, f := range []map[string]float64{{"a": 1, "b": 2}, {"b": 3.14159265, "c": 123456}} {
		if err := Merge(path, f); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]float64
	if err := json.Unmarshal(b, &got); err != nil || fmt.Sprint(got) != "map[a:1 b:3.142 c:123500]" {
		t.Errorf("%v, %v", got, err)
	}
	var zero float64
	if err := Merge(path, map[string]float64{"d": 1 / zero}); err == nil {
		t.Error("an infinite figure was written")
	}
}

func TestTableAligns(t *testing.T) {
	var b strings.Builder
	if err := Table(&b, [][]string{{"", "weft"}, {"a longer name", "1.00"}, {"b", "12"}}); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(b.String(), "\n"); len(lines) != 4 || len(lines[0]) != len(lines[1]) || len(lines[1]) != len(lines[2]) {
		t.Errorf("not aligned:\n%s", b.String())
	}
}

func TestPlotIsSVG(t *testing.T) {
	var b strings.Builder
	err := Plot(&b, []Chart{{Title: "a < b", Unit: "us", Bars: []Bar{{"weft", 3, true}, {"plain", 6, false}}}, {Title: "nothing"}})
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(b.String()))
	for {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
	}
	if !strings.Contains(b.String(), "a &lt; b") {
		t.Error("the title is missing")
	}
}

// The load generators are processes; this is their test and their stage.
func TestLoad(t *testing.T) {
	Play()
	var at [2]netip.AddrPort
	for i := range at {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		at[i] = l.Addr().(*net.TCPAddr).AddrPort()
		_ = l.Close() // the server takes the port
	}
	start := func(role string, arg any) *Process {
		p, err := Start("TestLoad", role, arg, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		return p
	}
	server, client := start("server", at), start("client", nil)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(client.Open(at[0], 10, 128))
	before, err := CPU(server, client)
	must(err)
	l, err := client.Requests(50 * time.Millisecond)
	must(err)
	if l.N < 10 || l.P50 <= 0 || l.P99 < l.P50 || l.Seconds < 0.05 {
		t.Errorf("requests: %+v", l)
	}
	after, err := CPU(server, client)
	must(err)
	if after <= before {
		t.Errorf("CPU time goes from %v to %v", before, after)
	}
	must(client.CloseAll())
	l, err = client.Connects(at[0], 4, 1, 50*time.Millisecond)
	must(err)
	if l.N < 4 || l.P50 <= 0 {
		t.Errorf("connects: %+v", l)
	}
	must(client.Open(at[1], 3, 1))
	l, err = client.Bulk(50 * time.Millisecond)
	must(err)
	if l.N < 3<<20 || l.N%blockLen != 0 {
		t.Errorf("bulk: %+v", l)
	}
	must(client.CloseAll())
	if n, err := server.RSS(); err != nil || n < 1<<20 {
		t.Errorf("RSS %d, %v", n, err)
	}
	if err := client.Open(netip.MustParseAddrPort("127.0.0.1:1"), 1, 1); err == nil {
		t.Error("a connection to nobody")
	}
	if _, err := Start("TestLoad", "server", at, nil); err == nil {
		t.Error("two servers at one address")
	}
}
