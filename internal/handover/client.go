package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/internal/pack"
)

// A Taker takes parts in a successor.
type Taker interface {
	// Take prepares a part of a version. ahead is what was sent ahead of it, in
	// order: it and the files are its own, unless it fails. It neither reads nor
	// writes the files before go is called. Exactly one of the two functions is
	// called: go lets the part go on here; keep lets go of it, without a word to
	// anybody.
	Take(version uint32, text []byte, ahead [][]byte, files []int) (goOn, keep func(), err error)
}

// ClientConfig is what a Client needs.
type ClientConfig struct {
	Path     string // of the predecessor's socket
	Greeting Greeting
	Taker    Taker
	// Ready is closed when this process serves what its predecessor does.
	Ready <-chan struct{}
	// Joined is called when the predecessor was told of that: from then on it
	// gives its connections to this process, should it end. Nil does nothing.
	Joined func()
	Log    *slog.Logger
}

// ErrNobody says that there is no predecessor.
var ErrNobody = errors.New("there is no ztunnel to take connections from")

// Take waits for a predecessor's connections and takes them, until it has given
// all, or is gone, or ctx ends. It returns how many parts it has taken. The
// error is ErrNobody if nobody is there.
func Take(ctx context.Context, cfg ClientConfig) (parts int, err error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unixpacket", cfg.Path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return 0, ErrNobody
	}
	if err != nil {
		return 0, fmt.Errorf("connect to the predecessor: %w", err)
	}
	c := nc.(*net.UnixConn)
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // it reads the end
	defer stop()
	if err := checkPeer(c); err != nil {
		return 0, fmt.Errorf("connect to the predecessor: %w", err)
	}
	p := newPipe(c)
	version, err := greet(p, cfg.Greeting)
	if err != nil {
		return 0, err
	}
	select {
	case <-cfg.Ready:
	case <-ctx.Done():
		return 0, nil
	}
	if err := p.send(message{kind: ready}); err != nil {
		return 0, err
	}
	if cfg.Joined != nil {
		cfg.Joined()
	}
	var early luggage
	defer early.clear()
	for {
		m, err := p.receive(time.Time{})
		if err != nil {
			if ctx.Err() != nil {
				err = nil
			}
			return parts, err
		}
		switch m.kind {
		case done:
			return parts, nil
		case ahead:
			if len(m.text) == 0 {
				err = p.send(message{kind: ready})
			} else {
				err = early.add(m.text)
			}
			if err != nil {
				return parts, err
			}
		case part:
			went, err := takePart(p, cfg, version, m, &early)
			if went {
				parts++
			}
			if err != nil {
				return parts, err
			}
		default:
			return parts, fmt.Errorf("the predecessor sends a message of kind %d", m.kind)
		}
	}
}

// greet agrees on versions.
func greet(p *pipe, g Greeting) (version uint32, err error) {
	if err := p.send(message{kind: hello, text: pack.Write((&hi{Version, g}).pack)}); err != nil {
		return 0, err
	}
	m, err := p.receive(time.Now().Add(stepTimeout))
	if err != nil {
		return 0, err
	}
	switch m.kind {
	case welcome:
		var w welcomeText
		if err := pack.Read(m.text, w.pack); err != nil {
			return 0, err
		}
		return w.part, nil
	case refuse:
		return 0, fmt.Errorf("the predecessor keeps its connections, and lets them end: %.200q", m.text)
	}
	m.close()
	return 0, fmt.Errorf("the predecessor answers with a message of kind %d", m.kind)
}

// luggage is what was sent ahead of a part.
type luggage struct {
	pieces [][]byte
	size   int
}

func (g *luggage) add(text []byte) error {
	g.pieces = append(g.pieces, text)
	if g.size += len(text) + 64; g.size > MaxText { // a small one costs something, too
		return errors.New("the predecessor sends too much ahead of a connection")
	}
	return nil
}

func (g *luggage) clear() {
	for _, p := range g.pieces {
		clear(p)
	}
	*g = luggage{}
}

// takePart takes one part, if it can. An error ends the connection, also after
// the part went.
func takePart(p *pipe, cfg ClientConfig, version uint32, m message, early *luggage) (went bool, err error) {
	last := len(m.files) - 1
	if last < 0 {
		m.clear()
		return false, errors.New("the predecessor sends a part without a claim")
	}
	c := claim{m.files[last]}
	defer c.close()
	m.files = m.files[:last]
	goNow, letGo, err := cfg.Taker.Take(version, m.text, early.pieces, m.files)
	m.clear()
	if err == nil {
		*early = luggage{} // the taker has it
	}
	early.clear()
	if err != nil {
		m.close()
		cfg.Log.Warn("a connection cannot be taken over: it stays with the ztunnel that has it", "error", err)
		return false, p.send(message{kind: declined, text: []byte(shorten(err.Error()))})
	}
	if !c.take() {
		letGo()
		return false, errors.New("the predecessor has taken a part back: it did not want to wait for it longer")
	}
	goNow()
	return true, p.send(message{kind: taken})
}

// shorten keeps a reason within a packet.
func shorten(s string) string { return s[:min(len(s), 1000)] }
