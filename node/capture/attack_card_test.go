package capture

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/score"
	"github.com/weft-mesh/weft/internal/testnet"
)

// A card counts what a test tries, by name. When the test ends, its rows are
// recorded, and what was not blocked or did not work fails the test.
type card struct {
	t    testing.TB
	mu   sync.Mutex
	rows map[string]*entry
}

type entry struct {
	attempted, stopped int
	works              bool // what is tried should work: what stops it has broken it
}

func newCard(t testing.TB) *card {
	c := &card{t: t, rows: map[string]*entry{}}
	t.Cleanup(c.record)
	return c
}

// attack counts an attempt at something that must not work.
func (c *card) attack(name string, blocked bool) { c.count(name, blocked, false) }

// use counts an attempt at something that must work.
func (c *card) use(name string, worked bool) { c.count(name, !worked, true) }

func (c *card) count(name string, stopped, works bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.rows[name]
	if e == nil {
		e = &entry{works: works}
		c.rows[name] = e
	}
	e.attempted++
	if stopped {
		e.stopped++
	}
}

func (c *card) record() {
	var rows []score.Row
	for name, e := range c.rows {
		row := score.Row{Name: name, Attempted: score.N(e.attempted), Blocked: score.N(e.stopped)}
		goal := e.attempted
		if e.works {
			row.Blocked, row.Broken, goal = nil, score.N(e.stopped), 0
		}
		if e.stopped != goal {
			c.t.Errorf("%s: %d attempts, of which %d were stopped", name, e.attempted, e.stopped)
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b score.Row) int { return strings.Compare(a.Name, b.Name) })
	if len(rows) == 0 {
		c.t.Error("nothing was tried")
	}
	score.Record(c.t, rows...)
}

// whole brings back the layers that only has taken off.
func whole(t *testing.T, p *Pod) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for layer := range layers() {
		h := p.hook(layer)
		if err := p.put(h, p.programs[h.program]); err != nil {
			t.Fatal(err)
		}
	}
}

// A watch sees what reaches a host's interface.
type watch struct {
	t    *testing.T
	tap  *testnet.Tap
	host *testnet.Host
	last int
}

func newWatch(t *testing.T, h *testnet.Host, link string) *watch {
	return &watch{t: t, tap: h.Tap(link), host: h}
}

// frames returns what has arrived since the last call. It sends a datagram from
// a host whose packets go the same way, and so arrive in order.
func (w *watch) frames(from *testnet.Host) [][]byte {
	w.t.Helper()
	w.last++
	end := fmt.Sprintf("the end of part %d of what was seen", w.last)
	return w.tap.UntilSent([]byte(end), func() { datagram(w.t, from.NS, netip.AddrPortFrom(w.host.V6, 9), end) })
}

func datagram(t *testing.T, ns *netns.NS, to netip.AddrPort, text string) {
	t.Helper()
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, []byte(text), 0, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())})
	})
	if err != nil {
		t.Fatalf("send a datagram: %v", err)
	}
}
