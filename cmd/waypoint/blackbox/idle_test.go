package blackbox

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/bench"
)

// idleConns is how many connections of clients are held at once, and idleGoal
// what one of them may cost: 10,000 in 200 MB.
const (
	idleConns = 4000
	idleGoal  = 200_000_000 / 10_000
)

// idle measures what a connection of a client costs that has made a request and
// makes no other.
func (s *stage) idle(t *testing.T, figures map[string]float64) [][]string {
	t.Helper()
	row, ratios := []string{"a connection without requests, bytes"}, []string{"  of what is allowed"}
	for _, k := range s.all {
		key, measured := map[string]string{"weft": "l7.idle_conn_bytes", "waypoint": "l7.waypoint_idle_conn_bytes"}[k.name]
		if !measured {
			row, ratios = append(row, ""), append(ratios, "")
			continue
		}
		n, err := k.idle()
		if err != nil {
			t.Fatalf("%d connections to %s: %v", idleConns, k.name, err)
		}
		figures[key] = n
		row, ratios = append(row, bench.Number(n)), append(ratios, bench.Number(n/idleGoal)+" × (1)")
	}
	return [][]string{row, ratios}
}

// idle returns by how many bytes the proxy grows for a connection.
func (k *contender) idle() (float64, error) {
	before, err := k.proxy.RSS()
	if err != nil {
		return 0, err
	}
	conns := make([]net.Conn, 0, idleConns)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	const request, answer = "GET / HTTP/1.1\r\nHost: app\r\n\r\n", 1024
	b := make([]byte, 4<<10)
	for range idleConns {
		c, err := k.open(context.Background(), false)
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			return 0, err
		}
		if _, err := io.WriteString(c, request); err != nil {
			return 0, err
		}
		if n, err := io.ReadAtLeast(c, b, answer); err != nil || n < answer {
			return 0, errors.Join(err, io.ErrUnexpectedEOF)
		}
	}
	after, err := k.proxy.RSS()
	return float64(after-before) / idleConns, err
}
