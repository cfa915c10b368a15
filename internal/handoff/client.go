package handoff

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A Handler does what the agent asks of a ztunnel. Its methods are called one
// at a time.
type Handler interface {
	// Add serves a pod. It owns the files, also when it fails. A pod that is
	// served already (same UID) is not an error.
	Add(ctx context.Context, pod Pod, f Files) error
	// Del stops accepting connections of a pod. One that is not served is not an error.
	Del(uid string)
	// SnapshotEnd is told the UIDs of all pods of the agent's snapshot: those
	// that are not among them are to be deleted.
	SnapshotEnd(kept map[string]bool)
	// Held returns what is served now. The Client closes the files.
	Held() []Entry
}

// ClientConfig is what a Client needs.
type ClientConfig struct {
	Path     string // of the agent's socket
	Instance string // names this ztunnel in the agent's logs
	Handler  Handler
	// DNS says that the handler serves the sockets of DNS4 and DNS6. Without
	// it, it is never given any.
	DNS bool

	// Pair names this ztunnel and the others of which only one is to be active,
	// that is to accept connections. Empty: this one is active, whatever
	// others are there.
	Pair string
	// Standby lets the others of the pair be active first.
	Standby bool
	// Activate is called once, when the agent wants this ztunnel to be active,
	// before it is acknowledged. It must not block for long. Without a Pair it
	// is never called. Nil does nothing.
	Activate func()

	Log *slog.Logger
	// Retry is the pause between two attempts to connect. 0 is 200 ms.
	Retry time.Duration
}

// A Client is ztunnel's side. Make it with NewClient, then call Run.
type Client struct {
	cfg       ClientConfig
	connected atomic.Bool
	active    atomic.Bool
	activated chan struct{} // closed when active is set
	claims    sync.Mutex
	claimed   net.Listener  // the claim of the active one; guarded by claims
	alone     chan struct{} // closed when this one is active and has the claim
	greeted   bool          // the agent was told of this ztunnel once
	synced    chan struct{}
	once      sync.Once
}

// NewClient returns a client that does nothing until Run.
func NewClient(cfg ClientConfig) *Client {
	cfg.Retry = cmp.Or(cfg.Retry, 200*time.Millisecond)
	return &Client{cfg: cfg, synced: make(chan struct{}), activated: make(chan struct{}), alone: make(chan struct{})}
}

// Synced is closed when the first snapshot is complete.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Active reports whether this ztunnel is to accept connections.
func (c *Client) Active() bool { return c.cfg.Pair == "" || c.active.Load() }

// Alone is closed when this ztunnel is active and no other of its pair is that
// was active before it: two are for a while when the agent has lost sight of
// one. Without a pair it never is.
func (c *Client) Alone() <-chan struct{} { return c.alone }

// Connected reports whether the agent is there.
func (c *Client) Connected() bool { return c.connected.Load() }

// Run connects to the agent, again and again, until ctx ends; then it returns
// nil. While the agent is away, the pods that are held stay served.
func (c *Client) Run(ctx context.Context) error {
	var last string
	var free time.Time // since when nobody has the claim
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.keepClaim(ctx) })
	for {
		err := c.session(ctx)
		if c.connected.Swap(false) {
			free = time.Time{}
		}
		if ctx.Err() != nil {
			return nil
		}
		free = c.succeed(free, time.Now())
		// The agent may be away for minutes: say each reason once.
		if reason := fmt.Sprint(err); reason != last {
			c.cfg.Log.Warn("the node agent is not connected: known pods stay served, new ones cannot start", "path", c.cfg.Path, "error", err)
			last = reason
		}
		pause := time.NewTimer(c.cfg.Retry)
		select {
		case <-ctx.Done():
			pause.Stop()
			return nil
		case <-pause.C:
		}
	}
}

// session is one connection to the agent.
func (c *Client) session(ctx context.Context) error {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", c.cfg.Path)
	if err != nil {
		return fmt.Errorf("connect to the node agent: %w", err)
	}
	conn := nc.(*net.UnixConn)
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := checkPeer(conn); err != nil {
		return fmt.Errorf("connect to the node agent: %w", err)
	}
	p := newPipe(conn)
	if err := c.greet(p); err != nil {
		return err
	}
	c.connected.Store(true)
	c.cfg.Log.Info("connected to the node agent", "path", c.cfg.Path)
	kept := make(map[string]bool)
	for {
		m, f, err := p.receive()
		if errors.Is(err, io.EOF) {
			return errors.New("the node agent closed the connection")
		}
		if err != nil {
			return err
		}
		answer, err := c.handle(ctx, m, f, kept)
		if err != nil {
			return err
		}
		conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if err := p.send(answer, Files{}); err != nil {
			return err
		}
		if m.Kind == snapshotEnd {
			kept = nil
			c.once.Do(func() { close(c.synced) })
		}
	}
}

// writeTimeout bounds a write to an agent that does not read.
const writeTimeout = 5 * time.Second

// greet says who this is and what it holds.
func (c *Client) greet(p *pipe) error {
	p.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err := p.send(message{
		Kind: hello, Version: Version, Instance: c.cfg.Instance, DNS: c.cfg.DNS,
		Pair: c.cfg.Pair, Active: c.Active(), Eager: !c.cfg.Standby && !c.greeted, Twin: c.twinLives(),
	}, Files{}); err != nil {
		return err
	}
	c.greeted = true
	var err error
	for _, e := range c.cfg.Handler.Held() {
		if err == nil {
			p.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
			err = p.send(message{Kind: hold, Pod: &e.Pod}, e.Files)
		}
		e.Files.Close()
	}
	if err != nil {
		return err
	}
	p.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	return p.send(message{Kind: holdEnd}, Files{})
}

// activate makes this ztunnel active.
func (c *Client) activate() {
	if c.cfg.Pair == "" || c.active.Swap(true) {
		return
	}
	close(c.activated)
	if c.cfg.Activate != nil {
		c.cfg.Activate()
	}
}

// handle does what m asks and returns the answer. kept collects the pods of
// the snapshot and is nil after it. An error is a breach of the protocol.
func (c *Client) handle(ctx context.Context, m message, f Files, kept map[string]bool) (message, error) {
	answer := message{Kind: ack, Seq: m.Seq}
	switch m.Kind {
	case add:
		if kept != nil {
			kept[m.Pod.UID] = true
		}
		if err := c.cfg.Handler.Add(ctx, *m.Pod, f); err != nil {
			answer.Error = err.Error()
		}
		return answer, nil
	case del:
		c.cfg.Handler.Del(m.UID)
		return answer, nil
	case snapshotEnd:
		if kept == nil {
			return answer, errors.New("the node agent sent a second snapshot")
		}
		c.cfg.Handler.SnapshotEnd(kept)
		if !m.Pairs && !c.cfg.Standby {
			c.activate() // by an agent of a release that knows of no pairs
		}
		return answer, nil
	case activate:
		c.activate()
		return answer, nil
	case refuse:
		return answer, fmt.Errorf("the node agent refuses this ztunnel: %s", m.Error)
	}
	f.Close()
	return answer, fmt.Errorf("the node agent sends %q", m.Kind)
}
