package handoff

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/score"
)

func itoa(t *testing.T, f *os.File) string {
	t.Helper()
	fd, err := rawFd(f)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(fd)
}

// openFiles counts this process's descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// rawPair returns a pipe and the bare connection at its other end.
func rawPair(t *testing.T) (*pipe, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return newPipe(conns[0]), conns[1]
}

func TestBadPacketsLeakNoFiles(t *testing.T) {
	good := `{"kind":"add","pod":{"uid":"u","name":"n","namespace":"ns","serviceAccount":"sa"},"files":["netns","blessed","out4"]}`
	tests := []struct {
		name  string
		text  string
		files int
		want  string // in the error; empty: no error
	}{
		{"a good one", good, 3, ""},
		{"not JSON", "{", 3, "read handoff message"},
		{"fewer files than named", good, 2, "names 3 files and carries 2"},
		{"more files than named", good, 4, "names 3 files and carries 4"},
		{"more files than any message has", good, 40, "was cut"},
		{"files beside a message without files", `{"kind":"del","uid":"u","files":["netns"]}`, 1, "want none"},
		{"unknown kind", `{"kind":"grow"}`, 0, "not known"},
		{"zero message", `{}`, 0, "not known"},
		{"add without a pod", `{"kind":"add","files":["netns","blessed","out4"]}`, 3, "no pod"},
		{"add without a service account", `{"kind":"add","pod":{"uid":"u","name":"n","namespace":"ns"},"files":["netns","blessed","out4"]}`, 3, "service account"},
		{"the same file twice", strings.Replace(good, "blessed", "netns", 1), 3, "named twice"},
		{"unknown file", strings.Replace(good, "out4", "out5", 1), 3, "not known"},
		{"no listener", strings.Replace(good, `,"out4"`, "", 1), 2, "listeners"},
		{"UID that climbs directories", strings.Replace(good, `"u"`, `"../x"`, 1), 3, "UID"},
		{"UID of dots", `{"kind":"del","uid":".."}`, 0, "UID"},
		{"text longer than a packet", `{"kind":"ack","error":"` + strings.Repeat("x", 2*maxPacket) + `"}`, 0, "was cut"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, other := rawPair(t)
			var oob []byte
			if tt.files > 0 {
				fds := make([]int, tt.files)
				for i := range fds {
					fds[i] = 0
				}
				oob = unix.UnixRights(fds...)
			}
			before := openFiles(t)
			if _, _, err := other.WriteMsgUnix([]byte(tt.text), oob, nil); err != nil {
				t.Fatal(err)
			}
			_, f, err := p.receive()
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				flags, err := unix.FcntlInt(f.Netns.Fd(), unix.F_GETFD, 0)
				if err != nil || flags&unix.FD_CLOEXEC == 0 {
					t.Errorf("a received file would be inherited by child processes (flags %x, %v)", flags, err)
				}
				f.Close()
			} else if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("receive: %v, want %q", err, tt.want)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d files open, before it were %d", after, before)
			}
		})
	}
}

func TestSessionsLeakNoFiles(t *testing.T) {
	path := sockPath(t)
	f, _ := testFiles(t)
	s := startServer(t, ServerConfig{Path: path, Snapshot: func() []Entry { return []Entry{{pod("a"), dup(t, f)}} }})
	h := newFakeProxy(t)
	h.held = func() []Entry { return []Entry{{pod("a"), dup(t, f)}} }
	round := func() {
		c, stop := startClient(t, path, "z", h)
		synced(t, c)
		if err := s.Add(t.Context(), pod("b"), f); err != nil {
			t.Error(err)
		}
		if err := s.Del(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		stop()
		h.Del("a")
		for n, changed := s.Connected(); n > 0; n, changed = s.Connected() {
			<-changed
		}
	}
	round()
	before := openFiles(t)
	for range 10 {
		round()
	}
	eventually(t, "as few open files as before", func() bool { return openFiles(t) <= before })
}

// Other versions must be told why, not just cut off.
func TestOtherVersionIsRefused(t *testing.T) {
	path := sockPath(t)
	startServer(t, ServerConfig{Path: path})
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := newPipe(c)
	if err := p.send(message{Kind: hello, Version: Version + 1}, Files{}); err != nil {
		t.Fatal(err)
	}
	m, _, err := p.receive()
	if err != nil || m.Kind != refuse || !strings.Contains(m.Error, "version") {
		t.Errorf("got %+v, %v, want refuse with the versions", m, err)
	}
}

func TestProxyThatBreaksTheProtocolIsDropped(t *testing.T) {
	for _, tt := range []struct {
		name string
		send []message
	}{
		{"no hello", []message{{Kind: holdEnd}}},
		{"an add", []message{{Kind: hello, Version: Version}, {Kind: del, UID: "u"}}},
		{"a second hello", []message{{Kind: hello, Version: Version}, {Kind: holdEnd}, {Kind: hello, Version: Version}}},
		{"an answer that nobody asked", []message{{Kind: hello, Version: Version}, {Kind: holdEnd}, {Kind: ack, Seq: 1}, {Kind: ack, Seq: 2}, {Kind: ack, Seq: 3}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := sockPath(t)
			startServer(t, ServerConfig{Path: path, AckTimeout: 100 * time.Millisecond})
			c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			p := newPipe(c)
			for _, m := range tt.send {
				if err := p.send(m, Files{}); err != nil && !errors.Is(err, unix.EPIPE) {
					t.Fatal(err)
				}
			}
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			for err = nil; err == nil; {
				_, _, err = p.receive()
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection is still open")
			}
		})
	}
}

func TestSocketIsForItsOwnerOnly(t *testing.T) {
	path := sockPath(t)
	startServer(t, ServerConfig{Path: path})
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := fi.Mode().Perm(); got != 0o600 {
		t.Errorf("socket mode %o, want 600", got)
	}
}

// A process of another user that can reach the socket all the same, because
// somebody widened its mode, is refused by its credentials.
func TestOtherUserIsRefused(t *testing.T) {
	if p := os.Getenv("HANDOFF_TEST_DIAL"); p != "" {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		pp := newPipe(c)
		if err := pp.send(message{Kind: hello, Version: Version}, Files{}); err == nil {
			pp.send(message{Kind: holdEnd}, Files{})
		}
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		m, _, err := pp.receive()
		fmt.Printf("GOT %q %v\n", m.Kind, err)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("not root: cannot become another user")
	}
	dir, err := os.MkdirTemp("", "handoff") // t.TempDir is closed to others
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := dir + "/s"
	startServer(t, ServerConfig{Path: path})
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	dial := func(uid uint32) string {
		exe, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		bin := dir + "/test"
		if err := os.WriteFile(bin, exe, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(bin, "-test.run=^TestOtherUserIsRefused$", "-test.v")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "HANDOFF_TEST_DIAL="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := dial(0); !strings.Contains(out, `GOT "snapshotEnd"`) {
		t.Errorf("root got no snapshot: %s", out)
	}
	row := score.Row{Name: "attack.handoff_foreign_process", Attempted: score.N(0), Blocked: score.N(0)}
	for _, uid := range []uint32{65534, 1000, 1} {
		*row.Attempted++
		if out := dial(uid); strings.Contains(out, `GOT "snapshotEnd"`) || !strings.Contains(out, "GOT") {
			t.Errorf("user %d: %s, want a closed connection", uid, out)
			continue
		}
		*row.Blocked++
	}
	score.Record(t, row)
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"kind":"hello","version":1,"instance":"z"}`), 0)
	f.Add([]byte(`{"kind":"add","seq":3,"pod":{"uid":"u","name":"n","namespace":"ns","serviceAccount":"sa","addresses":["10.0.0.1"]},"files":["netns","blessed","out4"]}`), 3)
	f.Add([]byte(`{"kind":"del","uid":"u"}`), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := decode(b, files)
		if err != nil {
			return
		}
		if len(m.Files) != files {
			t.Fatalf("%d files named, %d there", len(m.Files), files)
		}
		if m.Kind == add || m.Kind == hold {
			if m.Pod == nil || m.Pod.Validate() != nil {
				t.Fatalf("accepted pod %+v", m.Pod)
			}
			in := make([]*os.File, files)
			for i := range in {
				in[i] = new(os.File)
			}
			got := m.detach(in)
			if got.Netns == nil || got.Blessed == nil {
				t.Fatalf("files of %+v have no place", m)
			}
		}
	})
}
