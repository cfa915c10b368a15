package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// marked is what the steady clients send, for a watch of the wire to look for.
const marked = "a-steady-request-in-clear"

// A steady pod of the mesh on node1 requests without pause, each request on a
// connection of its own, from a server on each node.
type steady struct {
	pod     string
	clients []string       // its containers
	from    map[string]int // how many requests of each are not accounted for
}

// An ask is one request.
type ask struct {
	line  string // as the client wrote it
	start time.Time
	took  time.Duration
	ok    bool
}

func (a ask) end() time.Time { return a.start.Add(a.took) }

// startSteady starts a pod of that name and returns when every client is
// served. The pod ends with the test. Long adds, for each server, a client
// that asks by one connection that it keeps.
func startSteady(t *testing.T, pod string, long bool) *steady {
	t.Helper()
	s := &steady{pod: pod}
	var containers []string
	add := func(name string, args ...string) {
		quoted, _ := json.Marshal(append([]string{"client", "-listen", "", "-rate", "20", "-timeout", "15s"}, args...)) // JSON is YAML
		containers = append(containers, "args: "+string(quoted))
		s.clients = append(s.clients, name)
	}
	for _, server := range []string{"near", "far"} {
		pod4, pod6 := addresses(t, meshed, server)
		service, _ := clusterIPs(t, meshed, server)
		for i, a := range []netip.AddrPort{netip.AddrPortFrom(pod6, 8080), netip.AddrPortFrom(service, 80)} {
			add(fmt.Sprintf("%s-%d", server, i), "-url", fmt.Sprintf("http://%v/", a), "-marker", marked)
		}
		if long {
			add(server+"-long", "-long", "-url", netip.AddrPortFrom(pod4, 9000).String())
		}
	}
	y := podYAML(meshed, pod, "node1", containers[0])
	y = strings.Replace(y, "name: app\n", "name: "+s.clients[0]+"\n", 1)
	for i, c := range containers[1:] {
		y += fmt.Sprintf("  - name: %s\n    image: weft.test/testapp:1\n    imagePullPolicy: Never\n    %s\n", s.clients[i+1], c)
	}
	apply(t, y)
	kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+pod, "--timeout=60s")
	wantCaptured(t, meshed, pod, true)
	s.served(t, 20)
	if o := s.outcome(t, "before"); o.Failed+o.Broken > 0 {
		t.Fatalf("before anything was done: %+v", o)
	}
	return s
}

// asked returns all requests of every client, in their order.
func (s *steady) asked(t *testing.T) map[string][]ask {
	t.Helper()
	all := map[string][]ask{}
	for line := range strings.Lines(kubectl(t, "logs", "-n", meshed, s.pod, "--all-containers", "--prefix")) {
		// [pod/NAME/CONTAINER] 15:04:05.000 ok 1.2ms far
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		start, err := time.Parse("15:04:05.000", f[1])
		took, err2 := time.ParseDuration(f[3])
		if err != nil || err2 != nil {
			t.Fatalf("a client wrote %q", line)
		}
		client := strings.TrimSuffix(f[0][strings.LastIndexByte(f[0], '/')+1:], "]")
		all[client] = append(all[client], ask{line, start, took, f[2] == "ok"})
	}
	return all
}

// served waits until every client has had n answers more than now.
func (s *steady) served(t *testing.T, n int) {
	t.Helper()
	var from map[string]int
	eventually(t, 30*time.Second, func() error {
		now := map[string]int{}
		for client, asked := range s.asked(t) {
			for _, a := range asked {
				if a.ok {
					now[client]++
				}
			}
		}
		if from == nil {
			from = maps.Clone(now)
		}
		for _, client := range s.clients {
			if now[client] < from[client]+n {
				return fmt.Errorf("client %s has %d answers, want %d", client, now[client], from[client]+n)
			}
		}
		return nil
	})
}

// An outcome sums up what a fault did to the clients.
type outcome struct {
	OK      int
	Failed  int           // requests on new connections
	Refused int           // those of them whose connection was refused
	Worst   int           // the most failures of any client of new connections
	Broken  int           // long connections that ended
	Gap     time.Duration // the longest time that a client of new connections had no answer
}

// outcome returns and logs what happened since it was called last.
func (s *steady) outcome(t *testing.T, name string) outcome {
	t.Helper()
	var o outcome
	failures := ""
	all := s.asked(t)
	for client, asked := range all {
		failed, last := 0, time.Time{}
		for i, a := range asked {
			fresh := i >= s.from[client]
			if fresh && !a.ok {
				failed++
				if failed <= 3 {
					failures += a.line
				}
				if strings.Contains(a.line, "refused") {
					o.Refused++
				}
			}
			if !a.ok || strings.HasSuffix(client, "-long") {
				continue
			}
			if fresh {
				o.OK++
				if !last.IsZero() {
					o.Gap = max(o.Gap, a.end().Sub(last))
				}
			}
			last = a.end()
		}
		if strings.HasSuffix(client, "-long") {
			o.Broken += failed
			continue
		}
		o.Failed += failed
		o.Worst = max(o.Worst, failed)
	}
	s.from = map[string]int{}
	for client, asked := range all {
		s.from[client] = len(asked)
	}
	t.Logf("%s: on new connections %d requests answered, %d failed, %d refused, longest time without an answer %v; %d long connections broken\n%s",
		name, o.OK, o.Failed, o.Refused, o.Gap.Round(time.Millisecond), o.Broken, failures)
	return o
}
