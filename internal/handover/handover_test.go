package handover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/pack"
)

var quiet = slog.New(slog.DiscardHandler)

// served runs a Server until the test ends and returns its socket.
func served(t testing.TB, parts ...uint32) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dir", "handover.sock")
	s := NewServer(ServerConfig{Path: path, Parts: parts, Log: quiet})
	ctx, stop := context.WithCancel(context.Background())
	end := make(chan error, 1)
	go func() { end <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-end; err != nil {
			t.Error(err)
		}
	})
	eventually(t, func() bool { _, err := os.Stat(path); return err == nil })
	return s, path
}

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("it did not come")
		}
		time.Sleep(time.Millisecond)
	}
}

// heir waits for a successor.
func heir(t testing.TB, s *Server) *Heir {
	t.Helper()
	for {
		h, changed := s.Heir()
		if h != nil {
			return h
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatal("no successor")
		}
	}
}

// A taker notes what it is given.
type taker struct {
	mu      sync.Mutex
	refuse  bool
	version uint32
	texts   [][]byte
	ahead   []string
	said    []string // what the files say
	went    int
	kept    int
	takenUp chan struct{} // if not nil, Take waits for it
}

func (k *taker) Take(version uint32, text []byte, ahead [][]byte, files []int) (func(), func(), error) {
	if k.takenUp != nil {
		<-k.takenUp
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuse {
		return nil, nil, errors.New("not this one")
	}
	k.version = version
	k.texts = append(k.texts, bytes.Clone(text))
	k.ahead = append(k.ahead, string(bytes.Join(ahead, []byte("|"))))
	for _, fd := range files {
		b := make([]byte, 16)
		n, _ := unix.Pread(fd, b, 0)
		k.said = append(k.said, string(b[:n]))
		_ = unix.Close(fd)
	}
	note := func(n *int) func() {
		return func() { k.mu.Lock(); defer k.mu.Unlock(); *n++ }
	}
	return note(&k.went), note(&k.kept), nil
}

func (k *taker) counts() (went, kept int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.went, k.kept
}

var always = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// taking runs Take and returns its end.
func taking(t testing.TB, path string, k *taker, parts ...uint32) <-chan error {
	end := make(chan error, 1)
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(stop)
	go func() {
		_, err := Take(ctx, ClientConfig{Path: path, Greeting: Greeting{"new", 0, parts}, Taker: k, Ready: always, Log: quiet})
		end <- err
	}()
	return end
}

// files makes n files, each of which says its number.
func files(t testing.TB, n int) (fds []int) {
	for i := range n {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(f, i)
		t.Cleanup(func() { f.Close() })
		fds = append(fds, int(f.Fd()))
	}
	return fds
}

// TestPartsArrive gives small parts and one of many packets and files.
func TestPartsArrive(t *testing.T) {
	s, path := served(t, 7, 3)
	k := &taker{}
	end := taking(t, path, k, 3, 9)
	h := heir(t, s)
	large := bytes.Repeat([]byte("0123456789"), 200_000)
	many := files(t, 600)
	for _, p := range []struct {
		text  []byte
		files []int
	}{{nil, nil}, {[]byte("one"), many[:1]}, {large, many}, {nil, many[:254]}} {
		if err := h.Give(p.text, p.files); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Done(); err != nil {
		t.Fatal(err)
	}
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	if went, kept := k.counts(); went != 4 || kept != 0 || k.version != 3 {
		t.Errorf("%d went, %d were kept, version %d", went, kept, k.version)
	}
	if !bytes.Equal(k.texts[2], large) || len(k.said) != 1+600+254 || k.said[600] != "599" || k.said[0] != "0" {
		t.Errorf("%d texts, %d files", len(k.texts), len(k.said))
	}
	if err := h.Give([]byte("late"), nil); err == nil {
		t.Error("a successor took a part after the last")
	}
}

// TestAhead sends things ahead of their parts. Each part gets its own, also after
// one that was declined.
func TestAhead(t *testing.T) {
	s, path := served(t, 1)
	k := &taker{}
	end := taking(t, path, k, 1)
	h := heir(t, s)
	full := bytes.Repeat([]byte("x"), MaxAhead)
	ahead := func(texts ...[]byte) {
		t.Helper()
		for _, text := range texts {
			if err := h.Ahead(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	refuse := func(yes bool) { k.mu.Lock(); defer k.mu.Unlock(); k.refuse = yes }
	if err := h.Settle(); err != nil {
		t.Fatal(err)
	}
	ahead([]byte("a"), full, nil)
	if err := h.Settle(); err != nil {
		t.Fatal(err)
	}
	ahead([]byte("b"))
	if err := h.Give(nil, nil); err != nil {
		t.Fatal(err)
	}
	refuse(true)
	ahead([]byte("c"))
	if err := h.Give(nil, nil); !errors.Is(err, ErrDeclined) {
		t.Fatal(err)
	}
	refuse(false)
	ahead([]byte("d"), []byte("e"))
	for range 2 {
		if err := h.Give(nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Ahead(append(full, 'y')); err == nil {
		t.Error("more was sent than a message may hold")
	}
	if err := errors.Join(h.Done(), <-end); err != nil {
		t.Fatal(err)
	}
	if want := []string{"a|" + string(full) + "|b", "d|e", ""}; !slices.Equal(k.ahead, want) {
		t.Errorf("%d parts with %.20q ahead", len(k.ahead), k.ahead)
	}
	if err := h.Ahead(nil); err == nil {
		t.Error("something was sent after the last part")
	}
}

// TestTooMuchAhead shows that a predecessor cannot fill the memory of its
// successor.
func TestTooMuchAhead(t *testing.T) {
	var g luggage
	for n := 0; ; n++ {
		err := g.add(make([]byte, 1<<20))
		if err != nil && n >= MaxText>>20-2 {
			break
		}
		if err != nil || n > MaxText>>20 {
			t.Fatalf("after %d MiB: %v", n, err)
		}
	}
	g.clear()
	for n := 0; g.add(nil) == nil; n++ {
		if n > MaxText/64 {
			t.Fatal("nothing is sent again and again")
		}
	}
}

// TestVersionsMustAgree shows that two who cannot agree part, and both know why.
func TestVersionsMustAgree(t *testing.T) {
	s, path := served(t, 1)
	if err := <-taking(t, path, &taker{}, 2); err == nil || !strings.Contains(err.Error(), "keeps its connections") {
		t.Errorf("error %v", err)
	}
	c := dial(t, path)
	p := newPipe(c)
	if err := p.send(message{kind: hello, text: pack.Write((&hi{Version + 1, Greeting{"new", 0, []uint32{1}}}).pack)}); err != nil {
		t.Fatal(err)
	}
	if m, err := p.receive(time.Now().Add(5 * time.Second)); err != nil || m.kind != refuse {
		t.Errorf("kind %d, %v", m.kind, err)
	}
	if h, _ := s.Heir(); h != nil {
		t.Error("a successor of another version is ready")
	}
}

func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestTheHighestRankInherits shows who is chosen of several.
func TestTheHighestRankInherits(t *testing.T) {
	s, path := served(t, 1)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	for i, rank := range []uint32{0, 2, 2, 1} {
		name := fmt.Sprint(i)
		go func() {
			_, _ = Take(ctx, ClientConfig{Path: path, Greeting: Greeting{name, rank, []uint32{1}}, Taker: &taker{}, Ready: always, Log: quiet})
		}()
		eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.heirs) == i+1 })
	}
	if h := heir(t, s); h.Instance != "2" {
		t.Errorf("successor %s was chosen", h.Instance)
	}
}

// TestDeclinedPartsStay shows that a part which the successor does not want is
// the predecessor's, and the next is taken.
func TestDeclinedPartsStay(t *testing.T) {
	s, path := served(t, 1)
	k := &taker{refuse: true}
	taking(t, path, k, 1)
	h := heir(t, s)
	if err := h.Give([]byte("a"), files(t, 3)); !errors.Is(err, ErrDeclined) || !strings.Contains(err.Error(), "not this one") {
		t.Errorf("error %v", err)
	}
	k.mu.Lock()
	k.refuse = false
	k.mu.Unlock()
	if err := h.Give([]byte("b"), nil); err != nil {
		t.Error(err)
	}
}

// TestNobody shows what a first ztunnel finds.
func TestNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	if err := <-taking(t, path, &taker{}, 1); !errors.Is(err, ErrNobody) {
		t.Errorf("no socket: %v", err)
	}
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := <-taking(t, path, &taker{}, 1); !errors.Is(err, ErrNobody) {
		t.Errorf("a dead socket: %v", err)
	}
}

// TestClaims shows whose a part is that a predecessor has sent: the successor's
// unless it was taken back, also if the predecessor dies at once.
func TestClaims(t *testing.T) {
	for name, c := range map[string]struct {
		claims     int
		back       bool // it was taken back
		went, kept int
	}{
		"taken":      {claims: 1, went: 1},
		"taken back": {claims: 1, back: true, kept: 1},
		"no claim":   {},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "handover.sock")
			l, err := listen(path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			k := &taker{}
			end := taking(t, path, k, 1)
			conn, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			p := newPipe(conn)
			soon := func() time.Time { return time.Now().Add(30 * time.Second) }
			if m, err := p.receive(soon()); err != nil || m.kind != hello {
				t.Fatal(m, err)
			}
			_ = p.send(message{kind: welcome, text: pack.Write((&welcomeText{1}).pack)})
			if m, err := p.receive(soon()); err != nil || m.kind != ready {
				t.Fatal(m, err)
			}
			m := message{kind: part, text: []byte("x")}
			for range c.claims {
				one, err := newClaim()
				if err != nil {
					t.Fatal(err)
				}
				defer one.close()
				if c.back && !one.take() {
					t.Fatal("a new claim is taken")
				}
				m.files = append(files(t, 2), one.fd)
			}
			if err := p.send(m); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if err := <-end; err == nil {
				t.Error("the end of the predecessor is no error")
			}
			if went, kept := k.counts(); went != c.went || kept != c.kept {
				t.Errorf("%d went, %d were kept", went, kept)
			}
		})
	}
}

// TestClaimIsTakenOnce takes a claim from many sides.
func TestClaimIsTakenOnce(t *testing.T) {
	for range 100 {
		c, err := newClaim()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var took atomic.Int32
		for range 4 {
			wg.Go(func() {
				if c.take() {
					took.Add(1)
				}
			})
		}
		wg.Wait()
		c.close()
		if n := took.Load(); n != 1 {
			t.Fatalf("%d have taken it", n)
		}
	}
}

// TestBadSuccessorsBreakNothing plays successors that are wrong in every way.
// Each loses its connection, the part stays, and a good one is served after it.
func TestBadSuccessorsBreakNothing(t *testing.T) {
	s, path := served(t, 1)
	greeted := func(c *net.UnixConn) *pipe {
		p := newPipe(c)
		_ = p.send(message{kind: hello, text: pack.Write((&hi{Version, Greeting{"bad", 0, []uint32{1}}}).pack)})
		if m, err := p.receive(time.Now().Add(5 * time.Second)); err != nil || m.kind != welcome {
			t.Fatal(m, err)
		}
		return p
	}
	packet := func(b ...byte) func(*net.UnixConn) { return func(c *net.UnixConn) { _, _ = c.Write(b) } }
	for name, play := range map[string]func(*net.UnixConn){
		"silent":         func(c *net.UnixConn) {},
		"short":          packet(1),
		"unknown kind":   packet(99, 0, 0, 0),
		"zero kind":      packet(0, 0, 0, 0),
		"no text":        packet(1, 0, 0, 0),
		"part":           packet(byte(part), 1, 0, 0, 'x'),
		"false files":    packet(byte(part), 0, 0, 9, 'x'),
		"too long":       func(c *net.UnixConn) { _, _ = c.Write(make([]byte, maxPiece+100)) },
		"files":          func(c *net.UnixConn) { _, _, _ = c.WriteMsgUnix([]byte{1, 0, 0, 1}, unix.UnixRights(0), nil) },
		"ready too soon": packet(byte(ready), 0, 0, 0),
		"dies greeted":   func(c *net.UnixConn) { greeted(c); c.Close() },
		"taken unasked": func(c *net.UnixConn) {
			p := greeted(c)
			_ = p.send(message{kind: ready})
			_ = p.send(message{kind: taken})
			_ = p.send(message{kind: taken})
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, path)
			play(c)
			if name != "silent" && name != "dies greeted" {
				_ = c.SetReadDeadline(time.Now().Add(3 * stepTimeout))
				for err := error(nil); err == nil; {
					if _, err = c.Read(make([]byte, 4096)); errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("it is still connected")
					}
				}
			}
		})
	}
	// Those that are ready and then fail when it counts.
	for name, play := range map[string]func(*pipe){
		"dies":          func(p *pipe) { p.c.Close() },
		"wrong answer":  func(p *pipe) { _ = p.send(message{kind: ready}) },
		"answers twice": func(p *pipe) { _ = p.send(message{kind: declined}); _ = p.send(message{kind: taken}) },
		"lies":          func(p *pipe) { _ = p.send(message{kind: taken}) },
	} {
		t.Run("ready and "+name, func(t *testing.T) {
			p := greeted(dial(t, path))
			_ = p.send(message{kind: ready})
			h := heir(t, s)
			go func() {
				if m, err := p.receive(time.Now().Add(5 * time.Second)); err == nil {
					m.close()
					play(p)
				}
			}()
			if err := h.Give([]byte("mine"), files(t, 1)); err == nil {
				t.Error("the part is gone")
			}
			p.c.Close()
			eventually(t, func() bool { h, _ := s.Heir(); return h == nil })
		})
	}
	// Those that have gone on with a part have it, whatever becomes of them. They
	// get no other.
	for name, play := range map[string]func(*pipe){
		"dies":         func(p *pipe) { p.c.Close() },
		"wrong answer": func(p *pipe) { _ = p.send(message{kind: ready}) },
		"lies":         func(p *pipe) { _ = p.send(message{kind: declined}) },
	} {
		t.Run("goes on and "+name, func(t *testing.T) {
			p := greeted(dial(t, path))
			_ = p.send(message{kind: ready})
			h := heir(t, s)
			go func() {
				m, err := p.receive(time.Now().Add(30 * time.Second))
				if err != nil {
					t.Error(err)
					return
				}
				defer m.close()
				if !(claim{m.files[len(m.files)-1]}).take() {
					t.Error("the claim was taken before")
				}
				play(p)
			}()
			if err := h.Give([]byte("theirs"), files(t, 1)); err != nil {
				t.Errorf("the part is whose? %v", err)
			}
			if err := h.Give([]byte("next"), nil); err == nil {
				t.Error("another part is gone")
			}
			p.c.Close()
			eventually(t, func() bool { h, _ := s.Heir(); return h == nil })
		})
	}
	t.Run("ready and settles wrong", func(t *testing.T) {
		p := greeted(dial(t, path))
		_ = p.send(message{kind: ready})
		h := heir(t, s)
		go func() {
			if _, err := p.receive(time.Now().Add(5 * time.Second)); err == nil {
				_ = p.send(message{kind: taken})
			}
		}()
		if err := h.Settle(); err == nil {
			t.Error("it has settled")
		}
		eventually(t, func() bool { h, _ := s.Heir(); return h == nil })
	})
	k := &taker{}
	taking(t, path, k, 1)
	if err := heir(t, s).Give([]byte("good"), nil); err != nil {
		t.Error(err)
	}
}

// TestStrangersGetNothing connects as another user: first with the directory
// closed to it, and then, as if somebody had opened it, by the credentials.
func TestStrangersGetNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	s, path := served(t, 1)
	dir := filepath.Dir(path)
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	open := func() {
		for d := dir; d != "/"; d = filepath.Dir(d) {
			st, err := os.Stat(d)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(d, st.Mode().Perm()|0o055); err != nil {
				t.Fatal(err)
			}
			if d == os.TempDir() {
				break
			}
		}
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if err := asNobody(func() error {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err == nil {
			c.Close()
		}
		return err
	}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("a stranger at the closed door: %v", err)
	}
	open()
	if err := asNobody(func() error {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			return fmt.Errorf("the door is not open, so this shows nothing: %w", err)
		}
		defer c.Close()
		p := newPipe(c)
		_ = p.send(message{kind: hello, text: pack.Write((&hi{Version, Greeting{"new", 0, []uint32{1}}}).pack)})
		if m, err := p.receive(time.Now().Add(5 * time.Second)); err == nil {
			return fmt.Errorf("a stranger was answered with kind %d", m.kind)
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("a stranger is still connected")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if h, _ := s.Heir(); h != nil {
		t.Error("a stranger is a successor")
	}
}

// asNobody runs f on a thread of its own as another user. The thread ends with
// it.
func asNobody(f func() error) error {
	end := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		// The raw call changes this thread only.
		if _, _, e := syscall.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
			end <- e
			return
		}
		end <- f()
	}()
	return <-end
}

// FuzzMessages gives a pipe packets of anything. It returns messages that are
// whole, or an error, and keeps no file.
func FuzzMessages(f *testing.F) {
	f.Add([]byte{byte(part), 1, 0, 0, 'a'}, []byte{byte(part), 0, 0, 0, 'b'}, uint8(0))
	f.Add([]byte{byte(part), 1, 0, 2}, []byte{byte(part), 0, 0, 0, 'b'}, uint8(2))
	f.Add([]byte{1, 0, 0, 0}, []byte{}, uint8(0))
	f.Add([]byte{byte(ahead), 0, 0, 0, 'a'}, []byte{byte(ahead), 1, 0, 0, 'b'}, uint8(0))
	f.Fuzz(func(t *testing.T, a, b []byte, fds uint8) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		c := asConn(t, pair[0])
		defer c.Close()
		var oob []byte
		if n := int(fds % 4); n > 0 {
			oob = unix.UnixRights(make([]int, n)...)
		}
		_ = unix.Sendmsg(pair[1], a, oob, nil, 0)
		_ = unix.Sendmsg(pair[1], b, nil, nil, 0)
		_ = unix.Close(pair[1])
		p := newPipe(c)
		for {
			m, err := p.receive(time.Now().Add(5 * time.Second))
			if err != nil {
				return
			}
			if m.kind < hello || m.kind > ahead || m.kind != part && len(m.files) > 0 {
				t.Fatalf("kind %d with %d files", m.kind, len(m.files))
			}
			m.close()
		}
	})
}

func asConn(t testing.TB, fd int) *net.UnixConn {
	file := os.NewFile(uintptr(fd), "")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn)
}
