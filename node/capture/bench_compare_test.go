package capture

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/internal/testnet"
)

// TestBenchmarkCapture compares capture with iptables REDIRECT, with the same
// trivial proxy behind both: a process that copies. What is measured is the
// CPU time of client, proxy and server together. It runs when WEFT_BENCH names
// the file for its figures. WEFT_BENCH_CASES chooses some, with commas between:
// out_rr and the like, enrol, memory.
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
	// One processor, as onOneCPU says, but two for Go's scheduler: with one it
	// takes it from a thread at each system call that lasts.
	t.Setenv("GOMAXPROCS", "2")
	s := newStage(t, testnet.Routed)
	figures := map[string]float64{}
	rows := [][]string{{"capture: CPU of client, proxy and server", "direct", "iptables", "weft", "weft / iptables"}}
	for _, way := range []string{"out", "in"} {
		sides := []*side{newSide(s, "direct", way), newSide(s, "iptables", way), newSide(s, "weft", way)}
		for _, load := range captureLoads {
			if !chosen(way + "_" + load.name) {
				continue
			}
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
	if chosen("enrol") {
		enrol, enrolCPU := enrolTime(s)
		figures["capture.enrol_running_ms"], figures["capture.enrol_running_cpu_ms"] = enrol, enrolCPU
		rows = append(rows,
			[]string{"capture of a running pod with 100 connections", "", "", bench.Number(enrol) + " ms", ""},
			[]string{"    its CPU time", "", "", bench.Number(enrolCPU) + " ms", ""})
	}
	if chosen("memory") {
		perPod := podMemory(s)
		figures["capture.agent_bytes_per_pod"] = perPod
		rows = append(rows, []string{"the agent's memory for each captured pod", "", "", bench.Number(perPod/1024) + " KiB", ""})
	}
	if err := errors.Join(bench.Table(os.Stdout, rows), bench.Merge(out, figures)); err != nil {
		t.Fatal(err)
	}
}

// chosen reports whether WEFT_BENCH_CASES, if it is set, has the case.
func chosen(name string) bool {
	list := os.Getenv("WEFT_BENCH_CASES")
	return list == "" || slices.Contains(strings.Split(list, ","), name)
}

const (
	// Short turns: what else the machine does then hits all sides alike.
	captureRounds = 100
	captureSlice  = 30 * time.Millisecond
	enrolRounds   = 21
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
		inside := func(f func() error) error { return h.Do(func() error { return onOneCPU(f) }) }
		p, err := bench.Start(benchTest, role, arg, inside, files...)
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

// onOneCPU runs f on one processor, of which a process that it starts is too.
// To wake a process on another costs more than all that is compared here, and
// how often it happens is chance.
func onOneCPU(f func() error) error {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for i := range len(all) * 64 {
		if all.IsSet(i) {
			one.Set(i)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &all))
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
	toApp, onWire, target := MarkProxy, markAs, beforeRedirect
	listeners := []int{3, 4} // that Start has passed on
	if kind == "weft" {
		toApp, target = MarkLocal, localAddr
		onWire = func(fd int) error { return errors.Join(markAs(fd), bless(5, fd)) }
	} else {
		for i, port := range []int{15001, 15006} {
			var err error
			if listeners[i], err = listenAs(port); err != nil {
				return err
			}
		}
	}
	asClient := func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, toApp), unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1))
	}
	bench.Ready()
	return bench.Relay(listeners, func(i, fd int) (int, error) {
		to, err := target(fd)
		if err != nil {
			return -1, err
		}
		if i == 0 {
			return bench.Dial(netip.AddrPort{}, to, onWire)
		}
		client, err := unix.Getpeername(fd)
		if err != nil {
			return -1, err
		}
		return bench.Dial(netip.AddrPortFrom(addrPort4(client).Addr(), 0), to, asClient)
	})
}

// markAs makes a socket the proxy's.
func markAs(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, MarkProxy) }

// listenAs listens with the mark of the proxy, which accepted sockets have too.
func listenAs(port int) (int, error) {
	// No MPTCP, as the listeners of capture.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), markAs(fd),
		unix.Bind(fd, &unix.SockaddrInet4{Port: port}), unix.Listen(fd, 4096))
}

func addrPort4(sa unix.Sockaddr) netip.AddrPort {
	a, ok := sa.(*unix.SockaddrInet4)
	if !ok {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
}

// localAddr is where a connection was going that capture has given to the proxy.
func localAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	return addrPort4(sa), err
}

// beforeRedirect asks netfilter where a redirected connection was going.
func beforeRedirect(fd int) (netip.AddrPort, error) {
	const soOriginalDst = 80                                           // linux/netfilter_ipv4.h
	sa, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, soOriginalDst) // of the size of the sockaddr_in that comes
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := sa.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
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
	for range enrolRounds {
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
