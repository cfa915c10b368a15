package blackbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/internal/testnet"
)

// On a long wire that loses frames, streams whose application does not read
// stop nobody else on the same tunnel.
func TestStalledStreamsOnALongWire(t *testing.T) {
	s := newStreet(t)
	s.warm(t, s.process(t, "client", nil, s.client))
	s.world.Delay(s.nodeOne.Host, s.nodeTwo.Host, testnet.Delay{Each: 10 * time.Millisecond, LoseEvery: 200})
	var stalled sync.WaitGroup
	t.Cleanup(stalled.Wait)
	for range 8 {
		c, err := s.client.Dial(s.apps[0])
		if err != nil {
			t.Fatal(err)
		}
		stalled.Go(func() { // ends with the connection
			_, _ = c.Write(make([]byte, 64<<20)) // and nobody reads what comes back
		})
	}
	c, err := s.client.Dial(s.apps[0])
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("to and fro "), 50_000)
	if err := echoed(c, want); err != nil {
		t.Errorf("beside stalled streams: %v", err)
	}
}

// echoed sends b and wants it back.
func echoed(c *net.TCPConn, b []byte) error {
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(b)
		sent <- err
	}()
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return errors.New("other bytes came back")
	}
	return nil
}

// TestBenchmarkLongWire compares the throughput of one connection through the
// tunnel with that of one of TCP alone, at a round trip of 50 ms and with the
// same socket buffers.
func TestBenchmarkLongWire(t *testing.T) {
	out := os.Getenv("WEFT_BENCH")
	if out == "" {
		t.Skip("a benchmark: make bench runs it")
	}
	s := newStreet(t)
	for _, p := range []*testnet.Pod{s.client, s.server, s.bareClient, s.bareServer} {
		p.Sysctl("net/ipv4/tcp_rmem", "4096 131072 2097152")
		p.Sysctl("net/ipv4/tcp_wmem", "4096 131072 2097152")
	}
	direct, weft := s.process(t, "client", nil, s.bareClient), s.process(t, "client", nil, s.client)
	// Before the tunnel is made: congestion control takes a wire that grows
	// for one that is full.
	s.world.Delay(s.nodeOne.Host, s.nodeTwo.Host, testnet.Delay{Each: 25 * time.Millisecond})
	s.warm(t, weft)
	var rates [2][]float64
	for range 3 {
		for i, c := range []*bench.Process{direct, weft} {
			to := s.nearApps[1]
			if i == 1 {
				to = s.apps[1]
			}
			if err := c.Open(to, 1, 1); err != nil {
				t.Fatal(err)
			}
			l, err := c.Bulk(4 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.CloseAll(); err != nil {
				t.Fatal(err)
			}
			rates[i] = append(rates[i], float64(l.N)/l.Seconds/1e6)
		}
	}
	ratio := bench.Ratio(rates[1], rates[0])
	fmt.Printf("one connection at a round trip of 50 ms: TCP %s MB/s, weft %s MB/s, weft / TCP %.2f (>=0.80)\n",
		bench.Number(bench.Median(rates[0])), bench.Number(bench.Median(rates[1])), ratio)
	if err := bench.Merge(out, map[string]float64{
		"tunnel.rtt50.tcp_mb_per_second": bench.Median(rates[0]), "tunnel.rtt50.weft_mb_per_second": bench.Median(rates[1]), "tunnel.rtt50.vs_tcp": ratio,
	}); err != nil {
		t.Fatal(err)
	}
}

// warm waits until the way through the tunnel is open.
func (s *street) warm(t *testing.T, client *bench.Process) {
	t.Helper()
	(&contender{name: "weft", echo: s.apps[0], sink: s.apps[1], client: client}).warm(t)
}
