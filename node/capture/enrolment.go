package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
)

// An enrolment holds the programs that are needed only while capture is put on
// a running pod or taken off.
type enrolment struct {
	p    *Pod
	coll *ebpf.Collection
}

// loadEnrol loads them. A kernel that has no bpf_sock_destroy loads them too;
// destroy then does nothing.
func (p *Pod) loadEnrol() (*enrolment, error) {
	coll, err := p.collection(p.c.enrol)
	if err != nil {
		return nil, err
	}
	return &enrolment{p: p, coll: coll}, nil
}

func (e *enrolment) close() { e.coll.Close() }

func (e *enrolment) program(name string) *ebpf.Program { return e.coll.Programs[name] }

// holdLo attaches hold_lo until release is called. It is not pinned: if the
// agent dies meanwhile, it goes too.
func (e *enrolment) holdLo() (release func(), err error) {
	const lo = 1 // the loopback's index in every namespace
	l, err := attachTCX(e.p.ns, lo, e.program(bpf.EnrolProgHoldLo), ebpf.AttachTCXIngress)
	if err != nil {
		return nil, fmt.Errorf("attach hold_lo: %w", err)
	}
	return func() { l.Close() }, nil
}

// A report is what an iterator did.
type report struct {
	done    int // sockets that are as they should be
	pending int // handshakes that are not over
	failed  int // sockets that the kernel would not change
}

// walk runs an iterator over the TCP sockets of the pod's namespace.
func (e *enrolment) walk(name string) (report, error) {
	r, err := e.read(name)
	if err != nil {
		return report{}, fmt.Errorf("walk the pod's sockets (%s): %w", name, err)
	}
	if r.failed > 0 {
		e.p.c.log.Warn("some of the pod's connections will break", "pod", e.p.uid, "during", name, "sockets", r.failed)
	}
	return r, nil
}

func (e *enrolment) read(name string) (report, error) {
	l, err := link.AttachIter(link.IterOptions{Program: e.program(name)})
	if err != nil {
		return report{}, err
	}
	defer l.Close()
	var out io.ReadCloser
	// The iterator is bound to the namespace of the thread that opens it.
	err = e.p.ns.Do(func() error {
		out, err = l.Open()
		return err
	})
	if err != nil {
		return report{}, err
	}
	defer out.Close()
	said, err := io.ReadAll(retrying{out})
	if err != nil {
		return report{}, err
	}
	return report{
		done:    bytes.Count(said, []byte("d")),
		pending: bytes.Count(said, []byte("p")),
		failed:  bytes.Count(said, []byte("f")),
	}, nil
}

// retrying reads on after EAGAIN, by which an iterator says that it has done
// many sockets without a word (bpf_iter.c, MAX_ITER_OBJECTS).
type retrying struct{ r io.Reader }

func (r retrying) Read(b []byte) (int, error) {
	for {
		n, err := r.r.Read(b)
		if n > 0 || !errors.Is(err, unix.EAGAIN) {
			return n, err
		}
	}
}

const (
	pendingWait  = 250 * time.Millisecond // a handshake that is not over by then is reset
	pendingPause = 5 * time.Millisecond
)

// keepPending keeps what has been connected since the first pass. It waits, not
// long, for the handshakes that peers have begun with the app: their
// connections can be kept when they exist.
func (e *enrolment) keepPending(ctx context.Context) error {
	late := time.NewTimer(pendingWait)
	defer late.Stop()
	pause := time.NewTicker(pendingPause)
	defer pause.Stop()
	for {
		r, err := e.walk(bpf.EnrolProgKeep)
		if err != nil || r.pending == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late.C:
			return nil
		case <-pause.C:
		}
	}
}
