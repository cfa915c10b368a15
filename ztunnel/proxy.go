// Package ztunnel is the node's L4 proxy: it takes what captured pods send into
// mutual TLS tunnels, and what arrives for them out of tunnels, by the
// identities and policies of the mesh.
//
// It asks the socket, never a map: the local address of an accepted connection
// is where the client wanted to go, and who calls is the pod whose listener
// accepted it. So it runs on plain listeners as well, without root.
//
// Decisions are pure functions of one view.View: planOutbound and admit.
package ztunnel

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/hbone/loop"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// Config is what a Proxy works with.
type Config struct {
	View        *view.Store       // required
	Identity    *identity.Manager // required
	Roots       *identity.Roots   // required
	TrustDomain string            // of all local pods; required
	Network     string            // of this node; "" is the default network
	Cluster     string            // of this node, for baggage

	// SameNode lets a connection between two pods of this node go straight
	// from one namespace into the other, without TLS, after the same
	// authorization. It is much cheaper, but the bytes never cross the pods'
	// interfaces: a NetworkPolicy of the CNI does not see them.
	SameNode bool

	// Standby lets the proxy take pods and warm their certificates, and accept
	// nothing, until Activate.
	Standby bool

	// Heir returns the successor that is ready to take the connections over
	// when this proxy ends, or nil: then they drain. Nil has none.
	Heir func() Heir

	Log     *slog.Logger          // required
	Metrics prometheus.Registerer // nil exports none

	AccessLog io.Writer // one line for each connection; nil writes none
	// AccessJSON makes each line of AccessLog a JSON object.
	AccessJSON bool
	// AccessLevel keeps lines out of AccessLog: connections that failed are
	// errors, others info. Nil writes all.
	AccessLevel slog.Leveler

	// DrainTimeout is how long open connections may last after Run's context
	// ends. 0 is 20 seconds.
	DrainTimeout time.Duration
	// LeaveTimeout is how long open connections of a pod may last after it
	// left. When the pod is gone they end by themselves; when it only left the
	// mesh they are its user's. 0 is an hour.
	LeaveTimeout time.Duration
	// HoldTimeout is how long a connection that must go through a waypoint waits
	// for one that can be reached. 0 is 10 seconds.
	HoldTimeout time.Duration
	// MaxConnections bounds the open connections of one pod, both directions
	// together: 10000 if it is zero. More are refused, with a line in the log.
	MaxConnections int
	// Loops is how many threads carry tunnelled connections: see loop.Config.
	Loops int
}

// Timings that are not worth a setting.
const (
	// patience is how long a new connection waits for the View to know what it
	// needs: a proxy and a pod that have just started are ahead of it.
	patience = 5 * time.Second
	// connectTimeout bounds one TCP connect.
	connectTimeout = 10 * time.Second
	// tunnelTimeout bounds everything until a tunnel's 200: certificate,
	// connect, handshake, and the connect at the other end.
	tunnelTimeout = 20 * time.Second
	// linger is how long a pod that leaves is still accepted for. Its capture
	// has ended by then; this is for handshakes that were under way, which
	// would be reset with their listener.
	linger = 30 * time.Millisecond
	// countPause is how often the bytes of open connections are counted.
	countPause = 5 * time.Second
)

// A Proxy is the node's L4 proxy. It implements handoff.Handler. Make it with
// New, then call Run; pods may be added before.
type Proxy struct {
	cfg        Config
	engine     *loop.Engine
	pool       *loop.Pool
	telemetry  *telemetry
	flows      registry
	handshakes *semaphore.Weighted
	atOnce     context.Context // has ended: for those who do not wait
	// enter makes the way out of a pod's namespace. Tests replace it.
	enter func(handoff.Files) (outlet, error)

	leaving  sync.WaitGroup // pods that drain
	arriving atomic.Int64   // connections that were accepted, and are no tunnel and no flow yet
	pauses   pauses         // of what was taken over

	mu      sync.Mutex
	pods    map[string]*pod // by UID: those that are served
	owners  map[string]*pod // by owner: those and the ones that drain
	born    uint64          // number of pods ever added
	active  bool            // connections are accepted
	stopped bool
}

var _ handoff.Handler = (*Proxy)(nil)

// New returns a proxy that serves no pod yet.
func New(cfg Config) *Proxy {
	cfg.DrainTimeout = cmp.Or(cfg.DrainTimeout, 20*time.Second)
	cfg.LeaveTimeout = cmp.Or(cfg.LeaveTimeout, time.Hour)
	cfg.HoldTimeout = cmp.Or(cfg.HoldTimeout, 10*time.Second)
	cfg.MaxConnections = cmp.Or(cfg.MaxConnections, 10000)
	p := &Proxy{
		cfg:       cfg,
		active:    !cfg.Standby,
		telemetry: newTelemetry(cfg.Metrics, newAccessLog(cfg.AccessLog, cfg.AccessJSON, cfg.AccessLevel)),
		// Each handshake is milliseconds of CPU; a storm of them must not starve
		// what is established.
		handshakes: semaphore.NewWeighted(int64(max(1, runtime.GOMAXPROCS(0)/2))),
		enter:      enterNamespace,
		pods:       make(map[string]*pod),
		owners:     make(map[string]*pod),
	}
	var end context.CancelFunc
	p.atOnce, end = context.WithCancel(context.Background())
	end()
	p.engine = loop.New(loop.Config{Loops: cfg.Loops})
	p.pool = p.engine.NewPool(loop.PoolConfig{
		Dial:          p.dialTunnel,
		TLS:           p.tunnelTLS,
		Log:           cfg.Log,
		DialTimeout:   connectTimeout,
		AnswerTimeout: tunnelTimeout,
		Handshakes:    p.handshakes,
	})
	return p
}

// Run keeps the pods that are added served until ctx ends. Then it stops
// accepting, lets open connections finish for Config.DrainTimeout, aborts those
// that do not, and returns when nothing is left.
func (p *Proxy) Run(ctx context.Context) error {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	return run.All(work,
		p.engine.Run,
		func(ctx context.Context) error {
			<-ctx.Done()
			p.pool.Close()
			return nil
		},
		p.telemetry.log.run,
		p.recheck,
		p.countBytes,
		func(context.Context) error {
			<-ctx.Done()
			p.drain()
			return nil // ends the others
		})
}

// drain lets every pod leave, and returns when all have. What a successor takes
// goes on there.
func (p *Proxy) drain() {
	if p.cfg.Heir != nil {
		if heir := p.cfg.Heir(); heir != nil {
			p.handOver(heir)
		}
	}
	p.mu.Lock()
	p.stopped = true
	pods := p.pods
	p.pods = make(map[string]*pod)
	for _, q := range pods {
		p.leave(q, 0, p.cfg.DrainTimeout) // the agent keeps the listeners
	}
	owners := len(p.owners)
	p.mu.Unlock()
	p.cfg.Log.Info("draining", "pods", owners, "connections", len(p.flows.all()), "timeout", p.cfg.DrainTimeout)

	done := make(chan struct{})
	go func() {
		p.leaving.Wait()
		close(done)
	}()
	timeout := time.NewTimer(p.cfg.DrainTimeout)
	defer timeout.Stop()
	select {
	case <-done:
		return
	case <-timeout.C:
	}
	p.mu.Lock()
	for _, q := range p.owners { // those that left before have more time of their own
		q.force()
	}
	p.mu.Unlock()
	<-done
}

// Add serves a pod from its files, which are the proxy's from then on. The
// same pod with the same sockets again changes nothing but its addresses; with
// other sockets it replaces the old ones, whose connections drain.
func (p *Proxy) Add(ctx context.Context, info handoff.Pod, f handoff.Files) error {
	if err := info.Validate(); err != nil {
		f.Close()
		return err
	}
	info.Addresses = slices.Clone(info.Addresses)
	for i, a := range info.Addresses {
		info.Addresses[i] = a.Unmap()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		f.Close()
		return errors.New("this ztunnel is stopping")
	}
	id := mesh.Identity{TrustDomain: p.cfg.TrustDomain, Namespace: info.Namespace, ServiceAccount: info.ServiceAccount}
	old := p.pods[info.UID]
	if old != nil && old.id == id && old.sameSockets(f) {
		old.info.Store(&info)
		return f.Close()
	}
	p.born++
	q, err := newPod(p, info, id, fmt.Sprintf("%s#%d", info.UID, p.born), f)
	if err != nil {
		f.Close()
		return fmt.Errorf("serve pod %s/%s: %w", info.Namespace, info.Name, err)
	}
	p.pods[info.UID] = q
	p.owners[q.owner] = q
	p.telemetry.pods.Set(float64(len(p.pods)))
	if old != nil {
		p.leave(old, 0, p.cfg.LeaveTimeout)
	}
	p.cfg.Identity.Warm(id)
	if p.active {
		q.start()
	}
	p.cfg.Log.Info("serving pod", "pod", info.Name, "namespace", info.Namespace, "identity", id)
	return nil
}

// Activate accepts connections of every pod, from now on, if Config.Standby
// kept the proxy from it. It may be called again.
func (p *Proxy) Activate() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active || p.stopped {
		return
	}
	p.active = true
	for _, q := range p.pods {
		q.start()
	}
	p.cfg.Log.Info("active: accepting the connections of every pod", "pods", len(p.pods))
}

// Del accepts no more connections of a pod and lets the open ones end.
func (p *Proxy) Del(uid string) {
	p.dismiss(func(u string) bool { return u == uid })
}

// SnapshotEnd lets every pod leave that is not in kept.
func (p *Proxy) SnapshotEnd(kept map[string]bool) {
	p.dismiss(func(uid string) bool { return !kept[uid] })
}

// dismiss lets the pods leave whose UID is meant, and returns when nothing of
// theirs is accepted any more.
func (p *Proxy) dismiss(meant func(uid string) bool) {
	p.mu.Lock()
	var stopped []<-chan struct{}
	for uid, q := range p.pods {
		if meant(uid) {
			delete(p.pods, uid)
			stopped = append(stopped, p.leave(q, linger, p.cfg.LeaveTimeout))
		}
	}
	p.mu.Unlock()
	for _, s := range stopped {
		<-s
	}
}

// Warm waits until every pod that is served has its certificate, or ctx ends.
func (p *Proxy) Warm(ctx context.Context) error {
	p.mu.Lock()
	ids := make(map[mesh.Identity]bool)
	for _, q := range p.pods {
		ids[q.id] = true
	}
	p.mu.Unlock()
	for id := range ids {
		if _, err := p.cfg.Identity.Certificate(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// Held returns the pods that are served, with files that the caller closes.
func (p *Proxy) Held() []handoff.Entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	var held []handoff.Entry
	for _, q := range p.pods {
		f, err := q.dupFiles()
		if err != nil {
			p.cfg.Log.Warn("the node agent cannot be told of a pod", "pod", q.info.Load().Name, "error", err)
			continue
		}
		held = append(held, handoff.Entry{Pod: *q.info.Load(), Files: f})
	}
	return held
}

// leave starts the end of q. The channel is closed when q accepts nothing
// more. p.mu is held, and q is out of p.pods.
func (p *Proxy) leave(q *pod, linger, timeout time.Duration) <-chan struct{} {
	p.telemetry.pods.Set(float64(len(p.pods)))
	info := q.info.Load()
	p.cfg.Log.Info("pod leaves", "pod", info.Name, "namespace", info.Namespace)
	stopped := make(chan struct{})
	p.leaving.Go(func() {
		q.stop(linger)
		close(stopped)
		q.finish(timeout)
		p.pool.CloseOwner(q.owner)
		p.cfg.Identity.Forget(q.id)
		q.close()
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.owners, q.owner)
	})
	return stopped
}

// await returns the current View as soon as ok holds for it, and at the latest
// when patience or ctx ends.
func (p *Proxy) await(ctx context.Context, ok func(*view.View) bool) *view.View {
	if v := p.cfg.View.Load(); ok(v) {
		return v
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		changed := p.cfg.View.Changed()
		v := p.cfg.View.Load()
		if ok(v) {
			return v
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return v
		}
	}
}

// dialTunnel connects for the pool, from the namespace of the target's owner. It
// waits for the certificate first: a handshake that waits would keep others
// from theirs.
func (p *Proxy) dialTunnel(ctx context.Context, t hbone.Target) (*net.TCPConn, error) {
	p.mu.Lock()
	q := p.owners[t.Owner]
	p.mu.Unlock()
	if q == nil {
		return nil, fmt.Errorf("connect to %v: %w", t.Address, errPodLeft)
	}
	if _, err := p.cfg.Identity.Certificate(ctx, q.id); err != nil {
		return nil, err
	}
	return q.dialOut(ctx, t.Address)
}

// tunnelTLS returns the TLS configuration for the pool. The certificate is that
// of the owner of the target, whatever the target says.
func (p *Proxy) tunnelTLS(t hbone.Target) (*tls.Config, error) {
	p.mu.Lock()
	q := p.owners[t.Owner]
	p.mu.Unlock()
	if q == nil || q.id != t.Source {
		return nil, fmt.Errorf("tunnel to %v: %w", t.Address, errPodLeft)
	}
	return identity.ClientTLS(p.cfg.Identity.Only(q.id), p.cfg.Roots, t.Peers), nil
}

// podAt returns the pod that is served here and has address a, or nil.
func (p *Proxy) podAt(a netip.Addr) *pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, q := range p.pods {
		for _, b := range q.info.Load().Addresses {
			if a == b {
				return q
			}
		}
	}
	return nil
}

// countBytes keeps the byte metrics of long connections current, and their
// keepalive, and forgets metrics of what is long gone.
func (p *Proxy) countBytes(ctx context.Context) error {
	tick := time.NewTicker(countPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := time.Now()
		p.flows.each(func(f *flow) {
			p.telemetry.progress(f)
			f.adoptKeepAlive(now)
		})
		p.telemetry.forget()
	}
}
