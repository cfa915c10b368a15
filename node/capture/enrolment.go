package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/bpf"
)

// A tally is what an iterator did.
type tally struct {
	done    int // sockets of the pod that are as they should be
	pending int // handshakes that are not over
	failed  int // sockets that the kernel would not change
}

// count reads an iterator's reports. Sockets with an address that is not the
// pod's are the proxy's ends of captured connections; they need nothing.
func (w place) count(said []byte) (tally, error) {
	var t tally
	var r bpf.SocketsReport
	for at := 0; at < len(said); {
		n, err := binary.Decode(said[at:], binary.NativeEndian, &r)
		if err != nil {
			return tally{}, fmt.Errorf("read a report of the iterator: %w", err)
		}
		at += n
		switch r.Outcome {
		case bpf.SocketsOutcomeOUTCOME_DONE:
			if slices.Contains(w.addrs, netip.AddrFrom16(r.Local).Unmap()) {
				t.done++
			}
		case bpf.SocketsOutcomeOUTCOME_PENDING:
			t.pending++
		case bpf.SocketsOutcomeOUTCOME_FAILED:
			t.failed++
		}
	}
	return t, nil
}

// walk runs an iterator over the TCP sockets of the pod's namespace.
func (p *Pod) walk(name string) (tally, error) {
	r, err := p.read(name)
	if err != nil {
		return tally{}, fmt.Errorf("walk the pod's sockets (%s): %w", name, err)
	}
	if r.failed > 0 {
		p.c.log.Warn("some of the pod's connections will break", "pod", p.uid, "during", name, "sockets", r.failed)
	}
	return r, nil
}

func (p *Pod) read(name string) (tally, error) {
	if p.c.walkers == nil {
		return tally{}, fmt.Errorf("the kernel does not take the socket iterators, without which only pods that are not yet running can be captured; restart the pod: %w", p.c.noWalkers)
	}
	l, err := link.AttachIter(link.IterOptions{Program: p.c.walkers.Programs[name]})
	if err != nil {
		return tally{}, err
	}
	defer l.Close()
	var out io.ReadCloser
	// The iterator is bound to the namespace of the thread that opens it.
	err = p.ns.Do(func() error {
		out, err = l.Open()
		return err
	})
	if err != nil {
		return tally{}, err
	}
	defer out.Close()
	said, err := io.ReadAll(retrying{out})
	if err != nil {
		return tally{}, err
	}
	return p.place.count(said)
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
func (p *Pod) keepPending(ctx context.Context) error {
	late := time.NewTimer(pendingWait)
	defer late.Stop()
	pause := time.NewTicker(pendingPause)
	defer pause.Stop()
	for {
		r, err := p.walk(bpf.SocketsProgKeep)
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
