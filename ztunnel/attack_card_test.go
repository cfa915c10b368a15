package ztunnel

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/score"
)

// A card counts what a test tries, by name. When the test ends, its rows are
// recorded, and what was not blocked or did not work fails the test.
type card struct {
	t    *testing.T
	mu   sync.Mutex
	rows map[string]*score.Row
}

func newCard(t *testing.T) *card {
	c := &card{t: t, rows: map[string]*score.Row{}}
	t.Cleanup(c.record)
	return c
}

// attack counts an attempt at something that must not work.
func (c *card) attack(name string, blocked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.rows[name]
	if r == nil {
		r = &score.Row{Name: name, Attempted: score.N(0), Blocked: score.N(0)}
		c.rows[name] = r
	}
	*r.Attempted++
	if blocked {
		*r.Blocked++
	}
}

// use counts an attempt at something that must work.
func (c *card) use(name string, worked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.rows[name]
	if r == nil {
		r = &score.Row{Name: name, Attempted: score.N(0), Broken: score.N(0)}
		c.rows[name] = r
	}
	*r.Attempted++
	if !worked {
		*r.Broken++
	}
}

func (c *card) record() {
	var rows []score.Row
	for name, r := range c.rows {
		switch {
		case r.Blocked != nil && *r.Blocked != *r.Attempted:
			c.t.Errorf("%s: %d attempts, of which %d were blocked", name, *r.Attempted, *r.Blocked)
		case r.Broken != nil && *r.Broken != 0:
			c.t.Errorf("%s: %d attempts, of which %d did not work", name, *r.Attempted, *r.Broken)
		}
		rows = append(rows, *r)
	}
	slices.SortFunc(rows, func(a, b score.Row) int { return strings.Compare(a.Name, b.Name) })
	if len(rows) == 0 {
		c.t.Error("nothing was tried")
	}
	score.Record(c.t, rows...)
}

// answers reports whether an application answers, on a connection from a
// namespace and, if it is valid, from an address. It returns what the
// application saw. It waits long enough for a busy machine, and is fast where
// a refusal comes as a reset.
func answers(from *netns.NS, src netip.Addr, to netip.AddrPort) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	local := netip.AddrPort{}
	if src.IsValid() {
		local = netip.AddrPortFrom(src, 0)
	}
	c, err := from.Dial(ctx, "tcp", local, to, nil)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return "", err
	}
	var line []byte
	for b := make([]byte, 1); ; line = append(line, b[0]) {
		if _, err := io.ReadFull(c, b); err != nil {
			return "", fmt.Errorf("after %d bytes: %w", len(line), err)
		}
		if b[0] == '\n' {
			return string(line), nil
		}
	}
}
