package l7

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
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
	Drain       time.Duration // for exchanges to end after Serve's context has; default 20 s
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
}

// New returns an Engine. It starts nothing.
func New(cfg Config) (*Engine, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	e := &Engine{cfg: cfg, limits: cfg.Limits.orDefault(), log: cfg.Logger, rand: cfg.Rand}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.rand == nil {
		e.rand = rand.Uint64
	}
	e.filters = e.chain()
	return e, nil
}

// Run does the engine's housekeeping (deadlines, idle connections, changes of
// the View, the access log) until ctx ends, and then closes the connections to
// endpoints. End it after every Serve has returned.
func (e *Engine) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Serve serves a connection until it ends, and closes it. When ctx ends it
// drains: exchanges that run may end within Limits.Drain, and clients are told
// to go elsewhere; then it is cut. The error says why the connection did not
// end in order, nil if it did; who called has nothing left to do about it but
// log it.
func (e *Engine) Serve(ctx context.Context, conn net.Conn, facts Facts) error {
	defer conn.Close()
	return errors.New("l7: not served yet")
}
