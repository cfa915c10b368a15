package blackbox

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/bench"
)

const (
	soakIdle   = 15000
	soakActive = 200
	soakSlice  = 10 * time.Second
)

// A footprint is what both ztunnels have.
type footprint struct {
	at       time.Duration
	resident float64 // bytes, of both
	live     float64 // bytes of it in use, of both
	files    [2]int
}

func (s *stage) footprint(t *testing.T, start time.Time) footprint {
	t.Helper()
	f := footprint{resident: s.resident(t, s.one.Process, s.two.Process), live: s.live(t), at: time.Since(start)}
	for i, p := range []*product{s.one, s.two} {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
		if err != nil {
			t.Fatal(err)
		}
		f.files[i] = len(fds)
	}
	return f
}

func (f footprint) String() string {
	return fmt.Sprintf("after %v: %.1f MB resident, %.1f MB of it in use, %d and %d descriptors", f.at.Round(time.Second), f.resident/1e6, f.live/1e6, f.files[0], f.files[1])
}

// TestSoak holds 15,000 idle connections while 200 others send requests all the
// time: no connection breaks, the memory of both ztunnels stays the same, and
// they keep no descriptor. It runs when WEFT_SOAK says how long.
func TestSoak(t *testing.T) {
	env := os.Getenv("WEFT_SOAK")
	if env == "" {
		t.Skip("it takes minutes: make soak runs it")
	}
	length, err := time.ParseDuration(env)
	if err != nil {
		t.Fatalf("WEFT_SOAK: %v", err)
	}
	s := &stage{street: newWideStreet(t, 1)} // one pod may have 10,000
	pairs := append([]pair{{s.client, s.server, s.apps}}, s.pairs...)
	start := time.Now()
	var idle []*contender
	for _, p := range pairs {
		c := &contender{name: p.client.Name, echo: p.apps[0], sink: p.apps[1], client: s.process(t, "client", nil, p.client)}
		c.warm(t)
		idle = append(idle, c)
	}
	active := s.process(t, "client", nil, pairs[0].client)
	if err := active.Open(pairs[0].apps[0], soakActive, 128); err != nil {
		t.Fatal(err)
	}
	empty := s.footprint(t, start)
	fmt.Println("without the idle ones,", empty)
	for _, c := range idle {
		if err := c.client.Open(c.echo, soakIdle/len(idle), 1); err != nil {
			t.Fatalf("open idle connections: %v", err)
		}
	}
	load := func(d time.Duration) bench.Load {
		l, err := active.Requests(d)
		if err != nil {
			t.Fatalf("the active connections: %v", err)
		}
		return l
	}
	load(soakSlice) // what the first requests need
	start = time.Now()
	all := []footprint{s.footprint(t, start)}
	fmt.Println(all[0])
	requests, printed := int64(0), start
	for time.Since(start) < length {
		requests += load(soakSlice).N
		all = append(all, s.footprint(t, start))
		if time.Since(printed) > time.Minute {
			printed = time.Now()
			fmt.Println(all[len(all)-1])
		}
	}
	first, last := all[0], all[len(all)-1]
	fmt.Printf("%d idle and %d active connections for %v: %d requests; at the end, %v\n", soakIdle, soakActive, last.at.Round(time.Second), requests, last)
	if last.files != first.files {
		t.Errorf("descriptors: %v, at the beginning %v", last.files, first.files)
	}
	if grown := least(all[len(all)*3/4:]) - least(all[:max(1, len(all)/4)]); grown > 2e6 {
		t.Errorf("of memory %.1f MB more are in use in the last quarter than in the first", grown/1e6)
	}
	// Every idle connection is still one.
	for _, c := range idle {
		l, err := c.client.Requests(time.Nanosecond)
		if err == nil && l.N < int64(soakIdle/len(idle)) {
			err = fmt.Errorf("%d of them answered", l.N)
		}
		if err := errors.Join(err, c.client.CloseAll()); err != nil {
			t.Errorf("idle connections: %v", err)
		}
	}
	const tunnels = soakIdle/100 + 8 // they stay a while for whoever comes next
	var after footprint
	for deadline := time.Now().Add(30 * time.Second); ; {
		after = s.footprint(t, start)
		if after.files[0] <= empty.files[0]+tunnels && after.files[1] <= empty.files[1]+tunnels {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("descriptors when the idle connections have ended: %v, before they began %v", after.files, empty.files)
		}
	}
	fmt.Println("when the idle ones have ended,", after)
}

// least is the least memory that was in use.
func least(fs []footprint) float64 {
	live := make([]float64, len(fs))
	for i, f := range fs {
		live[i] = f.live
	}
	return slices.Min(live)
}
