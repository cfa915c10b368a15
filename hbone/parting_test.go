package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// The last bytes of a tunnel that ends in order arrive, though the peer is slow
// to read and has something to say itself.
func TestLastBytesOfATunnel(t *testing.T) {
	p := payload(150 << 10)
	wrote := make(chan struct{})
	w := newWorld(t, func(_ context.Context, r *Request) {
		s, err := r.Accept(Header{})
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := s.Write(p); err != nil {
			t.Error(err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Error(err)
		}
		close(wrote)
		_, _ = io.Copy(io.Discard, s)
	}, overSockets)
	w.server.patience = time.Minute
	near, far := slowPair(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served := make(chan error, 1)
	go func() { served <- w.server.ServeConn(ctx, far) }()
	cfg := w.clientTLS(web, cart)
	cfg.NextProtos = []string{"h2"}
	c := tls.Client(near, cfg)
	defer near.Close()
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	var out bytes.Buffer
	fr := h2.NewFramer(&out, c)
	fr.SetMaxReadFrameSize(1 << 20)
	out.WriteString(h2.ClientPreface)
	if err := errors.Join(
		fr.WriteSettings(h2.Setting{ID: h2.SettingInitialWindowSize, Val: 1 << 20}),
		fr.WriteWindowUpdate(0, 1<<20),
		fr.WriteHeaders(h2.HeadersFrameParam{
			StreamID: 1, BlockFragment: encodeBlock(t, ":method", "CONNECT", ":authority", target), EndHeaders: true, EndStream: true,
		}),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := out.WriteTo(c); err != nil {
		t.Fatal(err)
	}
	<-wrote
	stop()
	// The peer reads nothing until the server has said its last word.
	raw, err := far.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(60 * time.Second)
	for over := false; !over; {
		select {
		case <-deadline:
			t.Fatal("the server did not end")
		case <-time.After(time.Millisecond):
		}
		if raw.Control(func(fd uintptr) { over = halfClosed(int(fd)) }) != nil {
			over = true // it is closed
		}
	}
	if err := fr.WriteWindowUpdate(0, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := out.WriteTo(c); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for whole := false; !whole; {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("after %d bytes of %d: %v", len(got), len(p), err)
		}
		if d, ok := f.(*h2.DataFrame); ok {
			got = append(got, d.Data()...)
			whole = d.StreamEnded()
		}
	}
	if !bytes.Equal(got, p) {
		t.Errorf("%d bytes came as %d others", len(p), len(got))
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("the tunnel did not end in order: %v", err)
	}
	_ = near.Close()
	if err := <-served; err != nil {
		t.Errorf("ServeConn: %v", err)
	}
}

// halfClosed reports whether our direction of a TCP connection has ended: its
// state is none of those in which it goes on (linux/tcp_states.h).
func halfClosed(fd int) bool {
	const established, closeWait = 1, 8
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err != nil || info.State != established && info.State != closeWait
}

// slowPair returns two ends of a TCP connection: the first takes little that was
// not read, the second keeps much.
func slowPair(t *testing.T) (near, far net.Conn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	small := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		cerr := raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10) })
		return errors.Join(cerr, err)
	}}
	if near, err = small.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	if err := far.(*net.TCPConn).SetWriteBuffer(1 << 20); err != nil {
		t.Fatal(err)
	}
	return near, far
}
