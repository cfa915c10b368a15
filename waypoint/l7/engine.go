package l7

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/mesh/view"
)

// Config is what an Engine is made of.
type Config struct {
	// Store holds the picture of the mesh. Required.
	Store *view.Store
	// Dialer connects to endpoints. Required.
	Dialer Dialer
	// Waypoint is the one that this engine is a replica of, zero for a gateway.
	Waypoint mesh.Name
	// Self is the workload that the engine runs in: balancing prefers what is
	// near it. It may be zero.
	Self mesh.Workload
	// Logger takes what the person on call should know; nil discards it.
	Logger *slog.Logger
	// AccessLog takes a line for each exchange, in whole lines and from one
	// goroutine at a time; nil writes none.
	AccessLog io.Writer
	// Metrics registers the metrics of requests; nil makes none.
	Metrics prometheus.Registerer
	// Rand is the source of chance; nil is math/rand/v2's. It may be called
	// from many goroutines.
	Rand func() uint64
	// Limits; its zero value has the defaults.
	Limits Limits
}

// Limits bound what clients and endpoints may take. 0 is the default.
type Limits struct {
	HeadBytes   int           // of a head; default 60 KiB, and 431 above it
	HeadFields  int           // default 100, and 431
	TargetBytes int           // of a request target; default 8 KiB, and 414
	HeadWait    time.Duration // from the first byte of a head to its last; default 10 s, and 408
	Idle        time.Duration // between requests of a connection; default 1 h
	StreamIdle  time.Duration // without a byte in either direction; default 5 min
	Sniff       time.Duration // for a client to speak first; default 100 ms
	Gather      int           // a body up to this is kept for retries; default 64 KiB
	Drain       time.Duration // that Drain lasts; default 20 s
	Requests    int           // per connection of a client; default no limit
}

// orDefault returns l with the defaults in place of zeros.
func (l Limits) orDefault() Limits {
	d := Limits{HeadBytes: 60 << 10, HeadFields: 100, TargetBytes: 8 << 10, HeadWait: 10 * time.Second, Idle: time.Hour,
		StreamIdle: 5 * time.Minute, Sniff: 100 * time.Millisecond, Gather: 64 << 10, Drain: 20 * time.Second}
	pick(&l.HeadBytes, d.HeadBytes)
	pick(&l.HeadFields, d.HeadFields)
	pick(&l.TargetBytes, d.TargetBytes)
	pick(&l.HeadWait, d.HeadWait)
	pick(&l.Idle, d.Idle)
	pick(&l.StreamIdle, d.StreamIdle)
	pick(&l.Sniff, d.Sniff)
	pick(&l.Gather, d.Gather)
	pick(&l.Drain, d.Drain)
	return l
}

func pick[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.Store == nil {
		errs = append(errs, errors.New("l7: Config.Store is missing"))
	}
	if c.Dialer == nil {
		errs = append(errs, errors.New("l7: Config.Dialer is missing"))
	}
	return errors.Join(errs...)
}

// An Engine serves connections. Make one with New; Run must run while it
// serves.
type Engine struct {
	cfg     Config
	limits  Limits
	log     *slog.Logger
	rand    func() uint64
	filters []Filter
	clock   *clock
	access  *accessLog
	metrics *metrics // nil: nothing is counted
	mirrors *mirrors

	blockers []Blocker // those of filters, each at its place; nil where one is none

	exchanges sync.Pool
	tables    sync.Map     // *mesh.Route to its *route.Table
	noRoute   *route.Table // of services without a Route
	direct    *route.Rule  // of workloads that are asked for by their addresses

	clusterMu sync.Mutex // who writes clusters
	clusters  atomic.Pointer[map[clusterKey]*cluster]

	noFlow   bool // each exchange over HTTP/2 has a goroutine: for tests
	draining atomic.Bool
	drainBy  atomic.Int64 // by the coarse clock: when quiet connections are closed

	clients clients
}

// New returns an Engine. It starts nothing.
func New(cfg Config) (*Engine, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	e := &Engine{cfg: cfg, limits: cfg.Limits.orDefault(), log: cfg.Logger, rand: cfg.Rand, clock: newClock()}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.rand == nil {
		e.rand = rand.Uint64
	}
	e.exchanges.New = func() any { return new(Exchange) }
	e.clusters.Store(&map[clusterKey]*cluster{})
	e.noRoute = route.Compile(nil)
	e.direct = &route.Rule{Spec: &mesh.Rule{Name: "direct"}}
	e.access = newAccessLog(cfg.AccessLog, cfg.Waypoint)
	e.metrics = newMetrics(cfg.Metrics)
	e.mirrors = newMirrors(e)
	e.filters = e.chain()
	if len(e.filters) > maxFilters {
		return nil, fmt.Errorf("l7: %d filters, and room for %d", len(e.filters), maxFilters)
	}
	e.blockers = make([]Blocker, len(e.filters))
	for i, f := range e.filters {
		e.blockers[i], _ = f.(Blocker)
	}
	return e, nil
}

// Run does the engine's housekeeping (deadlines, idle connections, what a change
// of the View leaves behind, the access log) until ctx ends, and then closes the
// connections to endpoints. End it after every Serve has returned.
func (e *Engine) Run(ctx context.Context) error {
	var writer sync.WaitGroup
	writer.Go(func() { e.access.run(ctx) })
	defer writer.Wait()
	t := time.NewTicker(tick)
	defer t.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			e.mirrors.stop()
			for _, c := range *e.clusters.Load() {
				c.close()
			}
			return nil
		case <-t.C:
		}
		e.clock.advance()
		if serving := e.clients.lookAfter(e.clock.now.Load(), e.cfg.Store.Load()); serving && n%5 == 0 {
			wakeMonitor()
		}
		if by := e.drainBy.Load(); by != 0 && e.clock.now.Load() >= by {
			e.clients.closeQuiet()
		}
		if n%20 == 19 {
			e.sweep()
		}
	}
}

// wakeMonitor makes a system call of the kind that tells Go's scheduler. The
// calls of sockets do not; but when goroutines do not let go of the processor, or
// do not leave time to look at the network, it is the monitor that sees to it,
// and it sleeps until somebody tells it that the process is not idle any more.
func wakeMonitor() { _, _ = unix.Poll(nil, 0) } // nothing is asked

// sweep closes idle connections to endpoints, and forgets what the View has not
// any more.
func (e *Engine) sweep() {
	v := e.cfg.Store.Load()
	now := e.clock.now.Load()
	var gone []clusterKey
	for k, c := range *e.clusters.Load() {
		c.trim(now)
		if c.gone(v) {
			gone = append(gone, k)
		}
	}
	e.forget(gone)
	known := map[*mesh.Route]bool{}
	for r := range v.Routes() {
		known[r] = true
	}
	e.tables.Range(func(k, _ any) bool {
		if !known[k.(*mesh.Route)] {
			e.tables.Delete(k)
		}
		return true
	})
}

// Drain makes clients go elsewhere, without failing a request: answers tell them
// to close their connections, and those on which nothing happens are closed
// when most of Limits.Drain is over. It returns at once. Whoever calls it ends
// the contexts of Serve when that time is over.
func (e *Engine) Drain() {
	if e.draining.CompareAndSwap(false, true) {
		e.drainBy.Store(max(1, e.clock.now.Load()+int64(e.limits.Drain)*9/10))
	}
}

// Serve serves a connection until it ends, and closes it. The end of ctx cuts it
// short; see Drain for the kind way. The error says why the connection did not
// end in order, nil if it did: whoever called has nothing left to do about it
// but log it.
func (e *Engine) Serve(ctx context.Context, netConn net.Conn, facts Facts) error {
	c := newConn(e, netConn, facts)
	defer func() {
		if !c.given.Load() {
			_ = c.Conn.Close() // what had to be said was said
		}
	}()
	e.clients.add(c)
	defer e.clients.remove(c)
	e.clock.watch(&c.idle)
	defer e.clock.forget(&c.idle)
	stop := context.AfterFunc(ctx, func() {
		c.why.Store(stopped)
		c.interruptRunning(engineStopped)
		cut(c.Conn)
	})
	defer stop()
	v := e.cfg.Store.Load()
	if !v.Synced() {
		return errors.New("serve: nothing is known of the mesh yet")
	}
	p, err := e.protocol(v, c)
	if err != nil {
		return err
	}
	switch p {
	case speaksHTTP1:
		return e.serveHTTP1(ctx, c)
	case speaksHTTP2:
		return e.serveHTTP2(ctx, c)
	}
	return e.serveTCP(ctx, c)
}
