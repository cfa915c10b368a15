package ztunnel

import (
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/handover"
	"github.com/weft-mesh/weft/internal/pack"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/mesh"
)

// plainPatience is how long connections without a tunnel may take to stand
// still: what was read of one end must be written to the other first. Those
// whose application does not read are tried again when the others have gone,
// with more patience, up to the last. If it still does not they stay, and drain.
const (
	plainPatience = 20 * time.Millisecond
	lastPatience  = 25 * plainPatience
)

// A movedPlain is what is known of a connection without a tunnel beside its
// flows and its two descriptors.
type movedPlain struct {
	inbound        bool
	over           [2]bool // what the client, and what the server sends has ended
	sent, received int64

	// Of a connection between two pods of the node, the server's. Its flow is the
	// second then; of any other there is one.
	peer   string
	peerID mesh.Identity
}

func (m *movedPlain) pack(c *pack.Coder) {
	for _, b := range []*bool{&m.inbound, &m.over[0], &m.over[1]} {
		pack.Bool(c, b)
	}
	for _, n := range []*int64{&m.sent, &m.received} {
		pack.Uint(c, n, math.MaxInt64)
	}
	pack.String(c, &m.peer, 128)
	packIdentity(c, &m.peerID)
}

// handOverPlain gives the pods' connections without a tunnel to heir, until a
// time. What is not set up by then stays.
func (p *Proxy) handOverPlain(heir Heir, pods []*pod, until time.Time, all *gifts) error {
	for patience := plainPatience; patience <= lastPatience; patience *= 5 {
		for _, f := range p.flows.all() {
			if f.plain == nil || !slices.Contains(pods, f.pod()) || !f.joined() || time.Now().After(until) {
				continue
			}
			g, err := f.give(heir, patience)
			switch {
			case err == nil:
				all.plain++
				all.add(g)
			case !errors.Is(err, handover.ErrDeclined) && !errors.Is(err, errUnhalted):
				return err
			}
		}
	}
	return nil
}

// joined reports whether both ends of a flow without a tunnel are known: of one
// between two pods of the node, those of the server's flow.
func (f *flow) joined() bool {
	f.plain.mu.Lock()
	defer f.plain.mu.Unlock()
	return len(f.plain.ends) == 2
}

// errUnhalted is why a connection is not given.
var errUnhalted = errors.New("the connection does not stand still")

// give gives a connection without a tunnel to heir.
func (f *flow) give(heir Heir, patience time.Duration) (gift, error) {
	since := time.Now()
	ends, over, ok := f.plain.halter.Halt(patience)
	if !ok {
		return gift{}, errUnhalted
	}
	g := gift{conns: 1, freeze: time.Since(since)}
	part := movedPart{
		pod: f.pod().info.Load().UID, id: f.pod().id, frozen: since.UnixNano(), flows: []movedFlow{f.handed()},
		plain: &movedPlain{
			inbound: f.direction == inbound, over: over,
			sent: f.plain.stats.Sent.Load(), received: f.plain.stats.Received.Load(),
		},
	}
	if out := f.plain.outer; out != nil {
		part.plain.peer, part.plain.peerID = part.pod, part.id
		part.pod, part.id = out.pod().info.Load().UID, out.pod().id
		part.flows = []movedFlow{out.handed(), f.handed()}
	}
	text := pack.Write(part.pack)
	g.pack = time.Since(since) - g.freeze
	if err := withDescriptors(ends, func(fds []int) error { return heir.Give(text, fds) }); err != nil {
		f.plain.halter.Resume()
		return gift{}, err
	}
	g.give = time.Since(since) - g.freeze - g.pack
	f.plain.halter.Leave()
	return g, nil
}

// withDescriptors calls use with the descriptors of two connections, which stay
// open until it returns.
func withDescriptors(ends [2]*net.TCPConn, use func(fds []int) error) error {
	first, err := ends[0].SyscallConn()
	if err != nil {
		return errors.Join(errUnhalted, err)
	}
	second, err := ends[1].SyscallConn()
	if err != nil {
		return errors.Join(errUnhalted, err)
	}
	used := errUnhalted
	err = first.Control(func(a uintptr) {
		err := second.Control(func(b uintptr) { used = use([]int{int(a), int(b)}) })
		if err != nil {
			used = errors.Join(errUnhalted, err)
		}
	})
	return errors.Join(used, err) // it is closed: somebody has aborted it
}

// takePlain prepares a connection without a tunnel that was another process's.
// proxy.mu is held.
func (q *pod) takePlain(part *movedPart, files []int, got pause) (goOn, keep func(), err error) {
	start := time.Now()
	near := part.plain.peer != ""
	if len(files) != 2 || near != (len(part.flows) == 2) || !near && len(part.flows) != 1 {
		return nil, nil, fmt.Errorf("%d flows and %d files for a connection without a tunnel", len(part.flows), len(files))
	}
	var peer *pod
	if near {
		switch peer = q.proxy.pods[part.plain.peer]; {
		case peer == nil:
			return nil, nil, fmt.Errorf("pod %s is not served here", part.plain.peer)
		case peer.id != part.plain.peerID:
			return nil, nil, fmt.Errorf("pod %s is %v here, and was %v", part.plain.peer, peer.id, part.plain.peerID)
		}
	}
	var ends [2]*net.TCPConn
	for i, fd := range files {
		if ends[i], err = copyOf(fd); err != nil {
			if i > 0 {
				ends[0].Close()
			}
			return nil, nil, fmt.Errorf("a connection without a tunnel: %w", err)
		}
	}
	for _, fd := range files {
		_ = unix.Close(fd) // ends are copies
	}
	flows, carry, forget := q.rejoin(part, peer, ends)
	for _, f := range flows {
		f.reported.sent, f.reported.received = f.moved()
		q.proxy.telemetry.resume(f)
		q.proxy.flows.add(f)
		f.pod().open.Add(1)
		f.pod().conns.Add(1) // so that the pod is not closed before the connection has ended
	}
	end := func() {
		forget()
		for _, f := range flows {
			f.pod().conns.Done()
		}
	}
	got.plain, got.resume = true, time.Since(start)
	goOn = func() {
		go func() {
			defer end()
			carry()
		}()
		got.whole = time.Since(time.Unix(0, part.frozen))
		q.proxy.pauses.begin()(got)
		q.proxy.recheckFlows(flows)
	}
	keep = func() {
		defer end()
		for _, c := range ends {
			c.Close() // the predecessor has its own
		}
		for _, f := range flows {
			f.pod().movedOn(f)
		}
	}
	return goOn, keep, nil
}

// rejoin returns the flows of a connection without a tunnel, to peer if that is
// not nil, what carries it until its end, and what is to be done then.
func (q *pod) rejoin(part *movedPart, peer *pod, ends [2]*net.TCPConn) (flows []*flow, carry, forget func()) {
	stats := new(relay.Stats)
	stats.Sent.Store(part.plain.sent)
	stats.Received.Store(part.plain.received)
	f := q.takeFlow(&part.flows[0], part.plain.inbound && peer == nil)
	f.counted, f.plain = false, &plainFlow{stats: stats}
	if peer == nil {
		f.plain.halter.Ended(part.plain.over[0], part.plain.over[1])
		carry = func() { _ = q.over(f, f.copy(q.alive, ends[0], ends[1])) } // it goes to the log
		if f.direction != inbound {
			return []*flow{f}, carry, func() {}
		}
		src := part.flows[0].src
		q.clients.add(src)
		return []*flow{f}, carry, func() { q.clients.remove(src) }
	}
	in := peer.takeFlow(&part.flows[1], true)
	in.counted, in.plain = false, &plainFlow{stats: stats, outer: f}
	in.plain.halter.Ended(part.plain.over[0], part.plain.over[1])
	f.prove(q.id, &peer.id)
	in.prove(q.id, &peer.id)
	carry = func() {
		f.carry(ends[0]) // if it fails, copy fails for that
		_ = q.over(f, peer.over(in, in.copy(q.alive, ends[0], ends[1])))
	}
	return []*flow{f, in}, carry, func() {}
}

// copyOf makes a connection of a copy of a descriptor.
func copyOf(fd int) (*net.TCPConn, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	file := os.NewFile(uintptr(own), "tcp")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("the socket is a %T", c)
	}
	return tcp, nil
}
