package blackbox

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/bench"
)

const benchTest = "TestBenchmarkL7"

// TestBenchmarkL7 compares the CPU time of proxies of requests for the same
// load between the same ends. Each round measures all of them next to each
// other; ratios are the medians of the rounds' ratios. It runs when WEFT_BENCH
// names the file for its figures; WEFT_BENCH_ROUNDS is how many rounds,
// WEFT_BENCH_CASES and WEFT_BENCH_PEERS choose some, with commas between their
// names, and WEFT_BENCH_BEFORE is another build of this test to compare with.
func TestBenchmarkL7(t *testing.T) {
	playRole()
	out := os.Getenv("WEFT_BENCH")
	if out == "" {
		t.Skip("a benchmark: make bench runs it")
	}
	rounds := 20
	if v := os.Getenv("WEFT_BENCH_ROUNDS"); v != "" {
		var err error
		if rounds, err = strconv.Atoi(v); err != nil || rounds < 1 {
			t.Fatalf("WEFT_BENCH_ROUNDS is %q", v)
		}
	}
	s := newStage(t)
	figures := map[string]float64{}
	rows := [][]string{append([]string{"requests: the proxy's CPU"}, s.names()...)}
	var idle [][]string
	if chosen("WEFT_BENCH_CASES", "idle") {
		idle = s.idle(t, figures) // before loads leave buffers behind
	}
	for _, c := range cases {
		if chosen("WEFT_BENCH_CASES", c.key) {
			rows = append(rows, s.compare(t, figures, c, rounds)...)
		}
	}
	rows = append(rows, idle...)
	if err := errors.Join(bench.Table(os.Stdout, rows), bench.Merge(out, figures)); err != nil {
		t.Fatal(err)
	}
}

// A contender is a proxy and the way through it.
type contender struct {
	name  string
	open  opener
	proxy *bench.Process // nil is none
}

// A benchCase is a kind of load.
type benchCase struct {
	key, what string // key as in l7.KEY.cpu_us
	conns     int
	open      func(opener, int) (*user, error)
}

// A load is what was done: how often, and how long one took at most half of the
// times.
type load struct {
	n   int
	p50 time.Duration
}

var cases = []benchCase{
	{"get1k_c1", "GET 1 KiB, 1 connection", 1, http1("GET", "/", 0, 1024)},
	{"get1k_c64", "GET 1 KiB, 64 connections", 64, http1("GET", "/", 0, 1024)},
	{"post16k_c64", "POST 16 KiB, 64 connections", 64, http1("POST", "/post", 16<<10, 2)},
	{"stream100m", "100 MiB, 1 connection", 1, http1("GET", "/stream", 0, streamLen)},
	{"grpc_64", "gRPC unary, 64 streams", 1, unary},
}

// slice is how long a load lasts: short, so that what else the machine does
// meets all contenders of a round alike.
const slice = 250 * time.Millisecond

// target is the highest ratio to others that was set as the goal.
func target(key string) float64 {
	if key == "grpc_64" {
		return 1.2
	}
	return 1.1
}

// compare measures one case for everybody.
func (s *stage) compare(t *testing.T, figures map[string]float64, c benchCase, rounds int) [][]string {
	t.Helper()
	cpu, p50 := map[string][]float64{}, map[string][]float64{}
	users := map[string]*user{}
	for _, k := range s.all {
		u, err := c.open(k.open, c.conns)
		if err != nil {
			t.Fatalf("%s through %s: %v", c.key, k.name, err)
		}
		defer u.close()
		users[k.name] = u
	}
	for round := range rounds + 1 {
		for _, k := range s.all {
			var before time.Duration
			if k.proxy != nil {
				var err error
				if before, err = k.proxy.CPU(); err != nil {
					t.Fatal(err)
				}
			}
			l, err := users[k.name].run(slice)
			if err != nil || l.n == 0 {
				t.Fatalf("%s through %s: %d done, %v", c.key, k.name, l.n, err)
			}
			if round == 0 {
				continue // warm now
			}
			if k.proxy != nil {
				after, err := k.proxy.CPU()
				if err != nil {
					t.Fatal(err)
				}
				cpu[k.name] = append(cpu[k.name], float64((after-before).Nanoseconds())/1e3/float64(l.n))
			}
			p50[k.name] = append(p50[k.name], float64(l.p50.Nanoseconds())/1e3)
		}
	}
	figure := func(key string, v float64) { figures["l7."+c.key+"."+key] = v }
	row, ratios := []string{c.what + ", µs"}, []string{"  weft against"}
	for _, k := range s.all {
		row = append(row, bench.Number(bench.Median(cpu[k.name])))
		switch k.name {
		case "direct":
			ratios = append(ratios, "")
		case "weft":
			figure("cpu_us", bench.Median(cpu["weft"]))
			added := bench.Median(p50["weft"]) - bench.Median(p50["direct"])
			figure("added_p50_us", added)
			ratios = append(ratios, "p50 +"+bench.Number(added))
		case "waypoint":
			figures["l7.waypoint_"+c.key+".cpu_us"] = bench.Median(cpu["waypoint"])
			ratios = append(ratios, "")
		case "before":
			ratios = append(ratios, bench.Number(bench.Ratio(cpu["weft"], cpu[k.name]))+" ×")
		case "waypoint_before":
			ratios = append(ratios, "waypoint "+bench.Number(bench.Ratio(cpu["waypoint"], cpu[k.name]))+" ×")
		default:
			r := bench.Ratio(cpu["weft"], cpu[k.name])
			figure("vs_"+k.name, r)
			ratios = append(ratios, fmt.Sprintf("%s × (%v)", bench.Number(r), target(c.key)))
		}
	}
	return [][]string{row, ratios}
}

func (s *stage) names() []string {
	var n []string
	for _, c := range s.all {
		n = append(n, c.name)
	}
	return n
}

// median returns the middle one of durations.
func median(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.SortFunc(d, cmp.Compare)
	return d[len(d)/2]
}

// The addresses of the stage.
var (
	backendAddr  = netip.MustParseAddrPort("127.79.0.2:8080")
	weftAddr     = netip.MustParseAddrPort("127.79.0.3:8080")
	nginxAddr    = netip.MustParseAddrPort("127.79.0.4:8080")
	haproxyAddr  = netip.MustParseAddrPort("127.79.0.5:8080")
	waypointAddr = netip.MustParseAddrPort("127.79.0.6:15008")

	beforeAddr         = netip.MustParseAddrPort("127.79.0.7:8080")
	waypointBeforeAddr = netip.MustParseAddrPort("127.79.0.8:15008")
)
