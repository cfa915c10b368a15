package bench

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
	pid := os.Getpid()
	own := netip.AddrFrom4([4]byte{127, 0x40 | byte(pid>>16), byte(pid >> 8), byte(pid)}) // no other test takes ports there
	var at [2]netip.AddrPort
	for i := range at {
		l, err := net.Listen("tcp", netip.AddrPortFrom(own, 0).String())
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
	l, err = client.Bulk(0) // it may have stood still all the time
	must(err)
	if l.N != 3<<20 {
		t.Errorf("bulk, too late: %+v", l)
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

// What passes a relay arrives, also when the receiver is slower, and so does
// the end.
func TestRelay(t *testing.T) {
	Play()
	if role, arg := Role(); role == "relay" {
		EndWithParent()
		t.Fatal(relayTo(arg))
	}
	sink, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer l.Close()
	p, err := Start("TestRelay", "relay", sink.Addr().(*net.TCPAddr).AddrPort(), nil, f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	var wg sync.WaitGroup
	wg.Go(func() { // nobody reads yet: it does not all fit
		_, err := c.Write(want)
		if err := errors.Join(err, c.(*net.TCPConn).CloseWrite()); err != nil {
			t.Error(err)
		}
	})
	defer wg.Wait()
	up, err := sink.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	got, err := io.ReadAll(up)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes: %v", len(got), len(want), err)
	}
	if _, err := io.WriteString(up, "thanks"); err != nil {
		t.Error(err)
	}
	_ = up.Close() // the end is read at the other side
	if b, err := io.ReadAll(c); err != nil || string(b) != "thanks" {
		t.Errorf("the answer is %q, %v", b, err)
	}
}

func relayTo(arg string) error {
	var to netip.AddrPort
	if err := json.Unmarshal([]byte(arg), &to); err != nil {
		return err
	}
	Ready()
	return Relay([]int{3}, func(int, int) (int, error) {
		return Dial(netip.AddrPort{}, to, func(int) error { return nil })
	})
}
