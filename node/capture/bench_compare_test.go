package capture

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/internal/testnet"
)

// TestBenchmarkCapture compares capture with iptables REDIRECT, with the same
// trivial proxy behind both: a process that copies. What is measured is the
// CPU time of client, proxy and server together. It runs when WEFT_BENCH names
// the file for its figures.
func TestBenchmarkCapture(t *testing.T) {
	bench.Play()
	if role, arg := bench.Role(); role == "copy" {
		bench.EndWithParent()
		if err := playCopy(arg); err != nil {
			fmt.Fprintln(os.Stderr, "copy:", err)
			os.Exit(1)
		}
	}
	out := os.Getenv("WEFT_BENCH")
	if out == "" {
		t.Skip("a benchmark: make bench runs it")
	}
	s := newStage(t, testnet.Routed)
	figures := map[string]float64{}
	rows := [][]string{{"capture: CPU of client, proxy and server", "direct", "iptables", "weft", "weft / iptables"}}
	for _, way := range []string{"out", "in"} {
		sides := []*side{newSide(s, "direct", way), newSide(s, "iptables", way), newSide(s, "weft", way)}
		for _, load := range captureLoads {
			cost := map[string][]float64{}
			for round := range captureRounds {
				for i := range sides {
					x := sides[i]
					if round%2 == 1 {
						x = sides[len(sides)-1-i]
					}
					v, err := x.measure(load)
					if err != nil {
						t.Fatalf("%s %s with %s: %v", way, load.name, x.name, err)
					}
					cost[x.name] = append(cost[x.name], v)
				}
			}
			ratio := bench.Ratio(cost["weft"], cost["iptables"])
			figures["capture."+way+"_"+load.name+".vs_iptables"] = ratio
			row := []string{way + " " + load.what}
			for _, x := range sides {
				m := bench.Median(cost[x.name])
				figures["capture."+way+"_"+load.name+"."+x.name+"_"+load.unit] = m
				row = append(row, bench.Number(m)+" "+load.show)
			}
			rows = append(rows, append(row, fmt.Sprintf("%.2f", ratio)))
		}
		for _, x := range sides {
			x.stop()
		}
	}
	enrol, enrolCPU := enrolTime(s)
	figures["capture.enrol_running_ms"], figures["capture.enrol_running_cpu_ms"] = enrol, enrolCPU
	rows = append(rows,
		[]string{"capture of a running pod with 100 connections", "", "", bench.Number(enrol) + " ms", ""},
		[]string{"    its CPU time", "", "", bench.Number(enrolCPU) + " ms", ""})
	perPod := podMemory(s)
	figures["capture.agent_bytes_per_pod"] = perPod
	rows = append(rows, []string{"the agent's memory for each captured pod", "", "", bench.Number(perPod/1024) + " KiB", ""})
	if err := errors.Join(bench.Table(os.Stdout, rows), bench.Merge(out, figures)); err != nil {
		t.Fatal(err)
	}
}

const (
	captureRounds = 21
	captureSlice  = 200 * time.Millisecond
)

// A captureLoad is a kind of traffic, and what its cost is given in.
type captureLoad struct {
	name, what string
	unit, show string
	scale      float64 // of nanoseconds per thing
	conns      int
	run        func(c *bench.Process, x *side) (bench.Load, error)
}

var captureLoads = []captureLoad{
	{"rr", "64 bytes there and back", "us", "us", 1e-3, 1, func(c *bench.Process, x *side) (bench.Load, error) {
		return c.Requests(captureSlice)
	}},
	{"crr", "connect, 64 bytes, close", "us", "us", 1e-3, 0, func(c *bench.Process, x *side) (bench.Load, error) {
		return c.Connects(x.echo, 1, 64, captureSlice)
	}},
	{"bulk", "bulk, per GB", "s_per_gb", "s/GB", 1, -1, func(c *bench.Process, x *side) (bench.Load, error) {
		return c.Bulk(captureSlice)
	}},
}

// A side is one way to get a pod's traffic to a proxy: a pod of its own, with
// the processes around it.
type side struct {
	name       string
	echo, sink netip.AddrPort
	client     *bench.Process
	all        []*bench.Process
}

func (x *side) stop() {
	for _, p := range x.all {
		p.Stop()
	}
}

// measure puts a load on and returns its cost.
func (x *side) measure(load captureLoad) (float64, error) {
	var err error
	switch load.conns {
	case 1:
		err = x.client.Open(x.echo, 1, 64)
	case -1:
		err = x.client.Open(x.sink, 1, 1)
	}
	if err != nil {
		return 0, err
	}
	before, err := bench.CPU(x.all...)
	if err != nil {
		return 0, err
	}
	l, err := load.run(x.client, x)
	if err != nil {
		return 0, err
	}
	after, err := bench.CPU(x.all...)
	if err != nil {
		return 0, err
	}
	return float64((after - before).Nanoseconds()) / float64(l.N) * load.scale, x.client.CloseAll()
}

const benchTest = "TestBenchmarkCapture"

// newSide makes a pod, and a client and server on the two ends of the way.
func newSide(s *stage, name, way string) *side {
	t := s.t
	t.Helper()
	pod := s.node.Pod(name+way, testnet.Routed)
	client, server := pod.Host, s.outside
	port := map[string]uint16{"direct": 7100, "iptables": 7200, "weft": 7300}[name]
	if way == "in" {
		client, server = server, pod.Host
	}
	for _, h := range []*testnet.Host{client, server} {
		h.Sysctl("net/ipv4/tcp_tw_reuse", "1")
	}
	x := &side{name: name, echo: netip.AddrPortFrom(server.V4, port), sink: netip.AddrPortFrom(server.V4, port+1)}
	start := func(role string, arg any, h *testnet.Host, files ...*os.File) *bench.Process {
		p, err := bench.Start(benchTest, role, arg, h.Do, files...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
		x.all = append(x.all, p)
		return p
	}
	switch name {
	case "weft":
		captured, err := s.capture.Prepare(t.Context(), targetOf(pod), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { captured.Close() })
		f, err := captured.Files()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		start("copy", "weft", pod.Host, f.Listeners[0], f.Listeners[2], f.Blessed)
		if err := captured.Attach(t.Context(), Mode{New: true}); err != nil {
			t.Fatal(err)
		}
	case "iptables":
		redirect(pod)
		start("copy", "iptables", pod.Host)
	}
	start("server", [2]netip.AddrPort{x.echo, x.sink}, server)
	x.client = start("client", nil, client)
	return x
}

// redirect installs what meshes with iptables do in a pod: what the pod sends
// and is sent goes to the proxy, unless the proxy sends it; and what the
// application answers to the proxy, which uses the client's address, finds its
// way back by the mark of the connection.
func redirect(pod *testnet.Pod) {
	const proxy, local = "0x539/0xfff", "0x111/0xfff"
	for _, rule := range []string{
		"-t nat -A OUTPUT ! -o lo -p tcp -m mark ! --mark " + proxy + " -j REDIRECT --to-ports 15001",
		"-t nat -A PREROUTING -p tcp ! --dport 15008 -m mark ! --mark " + proxy + " -j REDIRECT --to-ports 15006",
		"-t mangle -A PREROUTING -m mark --mark " + proxy + " -j CONNMARK --set-xmark " + local,
		"-t mangle -A OUTPUT -m connmark --mark " + local + " -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
	} {
		pod.Run("iptables", append([]string{"-w"}, strings.Fields(rule)...)...)
	}
	pod.Run("ip", "rule", "add", "fwmark", local, "lookup", "100")
	pod.Run("ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100")
	pod.Sysctl("net/ipv4/conf/all/rp_filter", "0")
	pod.Sysctl("net/ipv4/conf/lo/rp_filter", "0")
}

// playCopy is the proxy of both, in the pod's namespace.
func playCopy(arg string) error {
	var kind string
	if err := json.Unmarshal([]byte(arg), &kind); err != nil {
		return err
	}
	var err error
	control := markAs
	toApp := func(mark int) func(fd int) error {
		return func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark), unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1))
		}
	}
	app := toApp(MarkProxy)
	target := beforeRedirect
	var out, in *net.TCPListener
	if kind == "weft" {
		app = toApp(MarkLocal)
		target = func(c *net.TCPConn) (netip.AddrPort, error) { return addrPort(c.LocalAddr()), nil }
		blessed := os.NewFile(5, "blessed")
		control = func(fd int) error { return errors.Join(markAs(fd), bless(int(blessed.Fd()), fd)) }
		if out, err = inherited(3); err == nil {
			in, err = inherited(4)
		}
	} else {
		if out, err = listenAs(15001); err == nil {
			in, err = listenAs(15006)
		}
	}
	if err != nil {
		return err
	}
	done := make(chan error, 2)
	go func() {
		done <- bench.Copy(out, func(c *net.TCPConn) (*net.TCPConn, error) {
			to, err := target(c)
			if err != nil {
				return nil, err
			}
			return dialHere(netip.AddrPort{}, to, control)
		})
	}()
	go func() {
		done <- bench.Copy(in, func(c *net.TCPConn) (*net.TCPConn, error) {
			to, err := target(c)
			if err != nil {
				return nil, err
			}
			return dialHere(netip.AddrPortFrom(addrPort(c.RemoteAddr()).Addr(), 0), to, app)
		})
	}()
	bench.Ready()
	return <-done
}

// dialHere connects from the namespace of this process.
func dialHere(local, remote netip.AddrPort, control func(fd int) error) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: soon, Control: onSocket(control)}
	if local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	}
	c, err := d.Dial("tcp", remote.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// onSocket makes control one of package net's.
func onSocket(control func(fd int) error) func(string, string, syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) { err = control(int(fd)) }); e != nil {
			return e
		}
		return err
	}
}

// inherited returns the listener that Start has passed on as descriptor fd.
func inherited(fd uintptr) (*net.TCPListener, error) {
	f := os.NewFile(fd, "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// markAs makes a socket the proxy's.
func markAs(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy) }

// listenAs listens with the mark of the proxy, which accepted sockets have too.
func listenAs(port int) (*net.TCPListener, error) {
	c := net.ListenConfig{Control: onSocket(markAs)}
	c.SetMultipathTCP(false) // as the listeners of capture
	l, err := c.Listen(context.Background(), "tcp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// beforeRedirect asks netfilter where a redirected connection was going.
func beforeRedirect(c *net.TCPConn) (to netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return to, err
	}
	const soOriginalDst = 80 // linux/netfilter_ipv4.h
	e := raw.Control(func(fd uintptr) {
		var sa *unix.IPv6Mreq // of the size of the sockaddr_in that comes
		if sa, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); err == nil {
			b := sa.Multiaddr
			to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4]))
		}
	})
	return to, errors.Join(err, e)
}

// podMemory returns how many bytes of the heap a captured pod costs.
func podMemory(s *stage) float64 {
	t := s.t
	t.Helper()
	const n = 20
	var pods []*testnet.Pod
	for i := range n {
		pods = append(pods, s.node.Pod(fmt.Sprintf("crowd%d", i), testnet.Routed))
	}
	heap := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc + m.StackInuse)
	}
	before := heap()
	for _, pod := range pods {
		p, err := s.capture.Prepare(t.Context(), targetOf(pod), nil)
		if err == nil {
			err = p.Attach(t.Context(), Mode{New: true})
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
	}
	return (heap() - before) / n
}

// enrolTime returns how many milliseconds it takes to capture a pod that runs
// and has a hundred connections open, which are kept; on the clock, which
// depends on what else the machine does, and of CPU.
func enrolTime(s *stage) (wall, cpu float64) {
	t := s.t
	t.Helper()
	pod := s.node.Pod("running", testnet.Routed)
	at := [2]netip.AddrPort{netip.AddrPortFrom(s.outside.V4, 7400), netip.AddrPortFrom(s.outside.V4, 7401)}
	server, err := bench.Start(benchTest, "server", at, s.outside.Do)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Stop)
	client, err := bench.Start(benchTest, "client", nil, pod.Do)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Stop)
	if err := client.Open(at[0], 100, 64); err != nil {
		t.Fatal(err)
	}
	var ms, cpuMS []float64
	for range captureRounds {
		start := time.Now()
		before, err := bench.OwnCPU()
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.capture.Prepare(t.Context(), targetOf(pod), nil)
		if err == nil {
			err = p.Attach(t.Context(), Mode{Existing: Keep})
		}
		if err != nil {
			t.Fatal(err)
		}
		ms = append(ms, float64(time.Since(start).Microseconds())/1e3)
		after, err := bench.OwnCPU()
		if err != nil {
			t.Fatal(err)
		}
		cpuMS = append(cpuMS, float64((after-before).Microseconds())/1e3)
		if _, err := client.Requests(time.Millisecond); err != nil {
			t.Fatalf("the connections were not kept: %v", err)
		}
		if err := p.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.Close()
	}
	return bench.Median(ms), bench.Median(cpuMS)
}
