package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
)

const (
	defaultConcurrency = 8
	attemptTimeout     = 20 * time.Second
)

// Config says what a Manager works with.
type Config struct {
	Issuer      Issuer                // required
	Roots       *Roots                // required; kept current from the CA's answers
	TrustDomain string                // the only one whose identities can be obtained
	Concurrency int                   // attempts at the CA at a time; 0 means 8
	Log         *slog.Logger          // nil discards
	Registerer  prometheus.Registerer // nil exports no metrics
}

// A Manager holds the keys and certificates of local workloads. It makes
// each key itself, obtains the certificate from its Issuer, renews it at half
// its life, and retries for ever with growing pauses. A failed renewal keeps
// the certificate that is there until it expires; an expired one is never
// handed out. When there is more to do than Config.Concurrency allows, a
// waiting handshake goes before a warm-up, and that before a renewal.
//
// All methods but Run may be called at any time, from any goroutine, also
// before Run.
type Manager struct {
	cfg     Config
	metrics *metrics
	wake    chan struct{} // has room for one; a send says that something changed
	stopped chan struct{} // closed when Run has returned

	mu      sync.Mutex // guards what follows
	entries map[mesh.Identity]*entry
	busy    int // attempts under way
}

// NewManager returns a Manager that does nothing until Run is called.
func NewManager(cfg Config) *Manager {
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = defaultConcurrency
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Manager{
		cfg:     cfg,
		wake:    make(chan struct{}, 1),
		stopped: make(chan struct{}),
		entries: make(map[mesh.Identity]*entry),
	}
	m.metrics = newMetrics(m, cfg.Registerer)
	return m
}

// Run obtains and renews certificates until ctx ends, then waits for the
// attempts under way and returns nil. It may be called once.
func (m *Manager) Run(ctx context.Context) error {
	defer close(m.stopped)
	var attempts sync.WaitGroup
	defer attempts.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		case <-timer.C:
		}
		timer.Reset(m.startDue(ctx, &attempts))
	}
}

// Certificate returns a certificate that proves id and is valid now. When
// there is none yet it waits for one, through failed attempts, until ctx
// ends; so give ctx a deadline. The error then says why the last attempt
// failed. The certificate is shared and must not be changed.
func (m *Manager) Certificate(ctx context.Context, id mesh.Identity) (*tls.Certificate, error) {
	if err := m.mayHold(id); err != nil {
		return nil, err
	}
	for {
		cert, e := m.lookup(id)
		if cert != nil {
			return cert, nil
		}
		m.kick()
		select {
		case <-e.arrived:
			m.leave(e)
		case <-ctx.Done():
			return nil, whyNone(ctx, id, m.leave(e))
		case <-m.stopped:
			m.leave(e)
			return nil, fmt.Errorf("certificate for %s: this process is stopping", id)
		}
	}
}

// Only returns a CertFunc that can obtain the certificates of id and of
// nobody else.
func (m *Manager) Only(id mesh.Identity) CertFunc {
	return func(ctx context.Context) (*tls.Certificate, error) { return m.Certificate(ctx, id) }
}

// Warm says that one more local pod has the identity id, so that a certificate
// is there before its first connection, and stays there. It does not wait.
func (m *Manager) Warm(id mesh.Identity) {
	if err := m.mayHold(id); err != nil {
		m.cfg.Log.Error("cannot prepare an identity", "err", err)
		return
	}
	m.mu.Lock()
	m.entry(id).pods++
	m.mu.Unlock()
	m.kick()
}

// Forget undoes one Warm. When the last pod with the identity has gone its
// key is dropped.
func (m *Manager) Forget(id mesh.Identity) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[id]
	if !ok || e.pods == 0 {
		return
	}
	e.pods--
	if e.pods == 0 && e.waiting == 0 {
		delete(m.entries, id)
	}
}

// mayHold reports, as an error, why id can never be obtained here.
func (m *Manager) mayHold(id mesh.Identity) error {
	if id.IsZero() {
		return errors.New("certificate for the zero identity: it is nobody")
	}
	if id.TrustDomain != m.cfg.TrustDomain {
		return fmt.Errorf("certificate for %s: our trust domain is %q, no CA here signs for another", id, m.cfg.TrustDomain)
	}
	return nil
}

// lookup returns the certificate of id, or registers the caller as one who
// waits for it and must leave the entry again.
func (m *Manager) lookup(id mesh.Identity) (*tls.Certificate, *waitingEntry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entry(id)
	if e.valid(time.Now()) {
		e.used = true
		return e.cert, nil
	}
	e.waiting++
	return nil, &waitingEntry{entry: e, arrived: e.arrived}
}

// A waitingEntry is one caller's place at an entry. It remembers the channel
// of its time: the entry gets a new one with every certificate.
type waitingEntry struct {
	entry   *entry
	arrived <-chan struct{}
}

// leave ends a wait and returns the error of the last attempt. Nothing is
// kept of an identity that nobody else wants.
func (m *Manager) leave(w *waitingEntry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := w.entry
	e.waiting--
	if e.pods == 0 && e.waiting == 0 && !e.valid(time.Now()) && m.entries[e.id] == e {
		delete(m.entries, e.id)
	}
	return e.err
}

// entry returns the entry of id, made if need be. m.mu is held.
func (m *Manager) entry(id mesh.Identity) *entry {
	e, ok := m.entries[id]
	if !ok {
		e = &entry{id: id, arrived: make(chan struct{})}
		m.entries[id] = e
	}
	return e
}

// kick makes Run look again at what there is to do.
func (m *Manager) kick() {
	select {
	case m.wake <- struct{}{}:
	default: // it will look already
	}
}

// startDue starts every attempt that is due and has room, and returns when to
// look again.
func (m *Manager) startDue(ctx context.Context, attempts *sync.WaitGroup) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for id, e := range m.entries {
		if e.idle(now) {
			delete(m.entries, id)
		}
	}
	for {
		e, later := next(m.entries, now, m.busy, m.cfg.Concurrency)
		if e == nil {
			return later
		}
		e.running = true
		m.busy++
		attempts.Go(func() { m.attempt(ctx, e) })
	}
}

// attempt asks the CA once and records the outcome.
func (m *Manager) attempt(ctx context.Context, e *entry) {
	start := time.Now()
	bounded, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	g, err := request(bounded, m.cfg.Issuer, m.cfg.Roots, e.id)
	if err == nil {
		// Before the certificate is used: its peers may have the new roots.
		err = m.trust(g)
	}
	if ctx.Err() != nil {
		err = ctx.Err() // we are stopping; that is not news
	} else {
		m.metrics.observe(time.Since(start), err)
	}

	m.mu.Lock()
	m.busy--
	e.running = false
	e.record(g.cert, err, time.Now()) // lost if the last pod has gone meanwhile
	failures := e.failures
	m.mu.Unlock()
	m.kick()
	if ctx.Err() == nil {
		m.report(e.id, g.cert, err, failures)
	}
}

// record takes note of the outcome of an attempt that ended at now. A failure
// leaves the certificate that is there.
func (e *entry) record(cert *tls.Certificate, err error, now time.Time) {
	e.err = err
	if err != nil {
		e.failures++
		e.failedAt = wall(now)
		e.due = retryAt(now, e.failures)
		return
	}
	e.cert, e.used, e.failures = cert, false, 0
	e.due = renewAt(now, cert.Leaf.NotAfter)
	close(e.arrived)
	e.arrived = make(chan struct{})
}

// trust makes the roots that came with a certificate the current ones.
func (m *Manager) trust(g grant) error {
	if len(g.roots) == 0 {
		return nil
	}
	changed, err := m.cfg.Roots.replace(m.cfg.TrustDomain, g.roots)
	if changed {
		m.cfg.Log.Info("trusted roots changed", "trustDomain", m.cfg.TrustDomain, "roots", len(g.roots))
	}
	return err
}

// report logs an outcome. Of failures in a row it tells the 1st, 2nd, 4th,
// 8th and so on, so that a CA that is down does not fill the log.
func (m *Manager) report(id mesh.Identity, cert *tls.Certificate, err error, failures int) {
	if err == nil {
		m.cfg.Log.Info("certificate issued", "identity", id.String(), "expires", cert.Leaf.NotAfter)
		return
	}
	if failures&(failures-1) == 0 {
		m.cfg.Log.Warn("cannot get a certificate, will try again", "identity", id.String(), "failures", failures, "err", err)
	}
}

// whyNone is the error of a caller whose wait ended with ctx.
func whyNone(ctx context.Context, id mesh.Identity, last error) error {
	if last == nil {
		return fmt.Errorf("certificate for %s: none yet, the CA has not answered: %w", id, context.Cause(ctx))
	}
	return fmt.Errorf("certificate for %s: none yet: %w (last attempt: %v)", id, context.Cause(ctx), last)
}
