package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weft-mesh/weft/e2e/score"
)

const redirection = `jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}`

// wantCaptured waits until a pod says that it is captured, or that it is not.
func wantCaptured(t *testing.T, ns, pod string, want bool) {
	t.Helper()
	eventually(t, patience, func() error {
		if got := kubectl(t, "get", "pod", "-n", ns, pod, "-o", redirection); (got == "enabled") != want {
			return fmt.Errorf("pod %s/%s has redirection %q, want captured=%v", ns, pod, got, want)
		}
		return nil
	})
}

// wantMeshed checks that requests pass, through the mesh or in clear: under
// STRICT a server in the mesh tells the two apart.
func wantMeshed(t *testing.T, ns, client string, want bool) {
	t.Helper()
	eventually(t, patience, func() error {
		for _, server := range []string{"near", "far"} {
			got := try(t, ns, client, "get", "http://"+server+"."+meshed+"/")
			if got.OK != want {
				return fmt.Errorf("%s/%s to %s under STRICT: got %+v, want served=%v", ns, client, server, got, want)
			}
		}
		return nil
	})
}

// The label on a namespace takes its running pods into the mesh, out of it and
// in again. Whatever their connections do meanwhile, those they have accepted
// and those they have opened, from and to pods inside and outside of the mesh:
// none breaks, and no new one fails.
func TestLabelOnAndOff(t *testing.T) {
	const ns = "joins"
	apply(t, namespaceYAML(ns, "")+podYAML(ns, "client", "node1", "args: [sleep]")+podYAML(ns, "pivot", "node2", "args: [server]"))
	ready(t, ns)
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	wantMeshed(t, ns, "client", false)
	pivot4, pivot6 := addresses(t, ns, "pivot")
	near4, _ := addresses(t, outside, "near")
	loads := []*load{
		startLoad(t, outside, "client", "-to", pivot4.String()),
		startLoad(t, meshed, "client", "-to", pivot6.String()),
		startLoad(t, ns, "pivot", "-to", near4.String()),
	}
	for _, l := range loads {
		l.waitReady(t)
	}
	for _, label := range []string{"istio.io/dataplane-mode=ambient", "istio.io/dataplane-mode-", "istio.io/dataplane-mode=ambient"} {
		in := !strings.HasSuffix(label, "-")
		kubectl(t, "label", "namespace", ns, label)
		wantCaptured(t, ns, "client", in)
		wantCaptured(t, ns, "pivot", in)
		wantMeshed(t, ns, "client", in)
		for _, l := range loads {
			l.served(t, time.Now(), 1)
		}
	}
	var events []event
	for _, l := range loads {
		events = append(events, l.end(t)...)
	}
	score.Record(t, account(t, "enrol.label", events)...)
}

// Requests that are just being made while pods join and leave are answered, each
// on a new connection for which the server's name is resolved anew: nothing is
// lost that nobody sends again, like the query for a name.
func TestLabelAmongNewConnections(t *testing.T) {
	const ns = "arrives"
	y := namespaceYAML(ns, "") + podYAML(ns, "client", "node1", "args: [sleep]")
	for server, node := range map[string]string{"near": "node1", "far": "node2"} {
		y += podYAML(ns, server, node, "args: [server]") + serviceYAML(ns, server, server, "")
	}
	apply(t, y)
	ready(t, ns)
	// A query that is lost is sent again after five seconds.
	names := func(servers string) []string {
		return []string{"-to", servers, "-port", "80", "-rate", "20", "-idle", "0", "-long", "0", "-bytes", "0", "-timeout", "4s"}
	}
	loads := []*load{
		startLoad(t, ns, "client", names("near."+ns+",far."+ns)...),
		startLoad(t, ns, "far", names("near."+outside+",far."+meshed)...),
		startLoad(t, outside, "client", names("near."+ns+",far."+ns)...),
	}
	for _, l := range loads {
		l.waitReady(t)
	}
	for range 5 {
		for _, label := range []string{"istio.io/dataplane-mode=ambient", "istio.io/dataplane-mode-"} {
			kubectl(t, "label", "namespace", ns, label)
			for _, pod := range []string{"client", "near", "far"} {
				wantCaptured(t, ns, pod, !strings.HasSuffix(label, "-"))
			}
			for _, l := range loads {
				l.served(t, time.Now(), 2)
			}
		}
	}
	var events []event
	for _, l := range loads {
		events = append(events, l.end(t)...)
	}
	rows := account(t, "enrol.names", events)
	score.Record(t, rows[slices.IndexFunc(rows, func(r score.Row) bool { return r.Name == "enrol.names.requests" })])
}

// account makes a row of each load out of all events, and fails the test if
// anything was refused or broke.
func account(t *testing.T, name string, events []event) []score.Row {
	t.Helper()
	var rows []score.Row
	for _, kind := range []string{"idle", "requests", "bulk", "long"} {
		n, refused, broken := 0, 0, 0
		for _, e := range events {
			switch {
			case e.Load != kind:
				continue
			case e.Refused:
				refused++
			case e.Error != "":
				broken++
			}
			n++
			if e.Error != "" && refused+broken < 5 {
				t.Errorf("%s to %s, begun at %v, ended at %v: %s", kind, e.To, time.Unix(0, e.Start), time.Unix(0, e.End), e.Error)
			}
		}
		t.Logf("%s: %d attempted, %d refused, %d broken", kind, n, refused, broken)
		rows = append(rows, score.Row{Name: name + "." + kind, Attempted: score.N(n), Refused: score.N(refused), Broken: score.N(broken)})
	}
	return rows
}

// Who asks for it has the connections of a running pod reset when it joins, so
// that all of them come back through the mesh.
func TestLabelResetsIfAsked(t *testing.T) {
	const ns = "resets"
	apply(t, strings.Replace(namespaceYAML(ns, ""), "{name: resets", `{name: resets, annotations: {ambient.weft.dev/existing-connections: reset}`, 1)+
		podYAML(ns, "pivot", "node2", "args: [server]"))
	ready(t, ns)
	pivot4, _ := addresses(t, ns, "pivot")
	near4, _ := addresses(t, outside, "near")
	loads := []*load{startLoad(t, outside, "client", "-to", pivot4.String()), startLoad(t, ns, "pivot", "-to", near4.String())}
	for _, l := range loads {
		l.waitReady(t)
	}
	kubectl(t, "label", "namespace", ns, "istio.io/dataplane-mode=ambient")
	wantCaptured(t, ns, "pivot", true)
	for _, l := range loads {
		l.served(t, time.Now(), 1)
		idle, broken := 0, 0
		for _, e := range l.end(t) {
			if e.Load == "idle" {
				idle++
				if e.Error != "" {
					broken++
				}
			}
		}
		if idle == 0 || broken != idle {
			t.Errorf("%s: %d of %d connections from before were reset, want all", l.name, broken, idle)
		}
	}
}

// A pod's own label wins over its namespace's; hostNetwork pods and unknown
// values are left alone; a pod made in a labelled namespace is captured from
// its first packet.
func TestWhoIsCaptured(t *testing.T) {
	const in, out = "labelled", "unlabelled"
	y := namespaceYAML(in, "ambient") + namespaceYAML(out, "") + namespaceYAML("misspelt", "ambiant")
	for _, ns := range []string{in, out, "misspelt"} {
		y += podYAML(ns, "plain", "node1", "args: [sleep]")
	}
	y += strings.ReplaceAll(podYAML(in, "none", "node1", "args: [sleep]"), "labels: {app: none}", "labels: {app: none, istio.io/dataplane-mode: none}")
	y += strings.ReplaceAll(podYAML(out, "ambient", "node2", "args: [sleep]"), "labels: {app: ambient}", "labels: {app: ambient, istio.io/dataplane-mode: ambient}")
	y += strings.ReplaceAll(podYAML(in, "host", "node2", "args: [sleep]"), "nodeName: node2", "nodeName: node2\n  hostNetwork: true")
	apply(t, y)
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	for _, r := range []struct {
		ns, pod string
		want    bool
	}{
		{in, "plain", true}, {in, "none", false}, {in, "host", false},
		{out, "plain", false}, {out, "ambient", true}, {"misspelt", "plain", false},
	} {
		t.Run(r.ns+"/"+r.pod, func(t *testing.T) {
			kubectl(t, "wait", "-n", r.ns, "--for=condition=Ready", "pod/"+r.pod, "--timeout=120s")
			wantCaptured(t, r.ns, r.pod, r.want)
			wantMeshed(t, r.ns, r.pod, r.want)
		})
	}
	t.Run("the log names the unknown value", func(t *testing.T) {
		eventually(t, patience, func() error {
			if log := kubectl(t, "logs", "-n", "weft-system", "-l", "app=ztunnel", "-c", "weft-node", "--tail=1000"); !strings.Contains(log, "ambiant") {
				return fmt.Errorf("no line about the label value %q", "ambiant")
			}
			return nil
		})
	})
}

// Probes of every kind pass under STRICT: the pod becomes ready and is not
// restarted.
func TestProbesUnderStrict(t *testing.T) {
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	probes := map[string]string{
		"http": "httpGet: {port: 8080, path: /}",
		"tcp":  "tcpSocket: {port: 9000}",
		"grpc": "grpc: {port: 9090}",
		"exec": "exec: {command: [/bin/testapp, exec-probe]}",
	}
	var y string
	for kind, p := range probes {
		for _, node := range []string{"node1", "node2"} {
			y += podYAML(meshed, "probe-"+kind+"-"+node, node, fmt.Sprintf(`args: [server]
    readinessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 3}
    livenessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 3}`, p))
		}
	}
	apply(t, y)
	for kind := range probes {
		for _, node := range []string{"node1", "node2"} {
			t.Run(kind+" on "+node, func(t *testing.T) {
				pod := "probe-" + kind + "-" + node
				kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+pod, "--timeout=120s")
				wantCaptured(t, meshed, pod, true)
				ready := kubectl(t, "get", "pod", "-n", meshed, pod, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].lastTransitionTime}`)
				since, err := time.Parse(time.RFC3339, strings.TrimSpace(ready))
				if err != nil {
					t.Fatal(err)
				}
				// Several liveness probes must have passed since it was ready.
				eventually(t, patience, func() error {
					got := kubectl(t, "get", "pod", "-n", meshed, pod, "-o", `jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}`)
					if got != "0 true" {
						t.Fatalf("restarts and readiness are %q, want 0 true", got)
					}
					if age := time.Since(since); age < 6*time.Second {
						return fmt.Errorf("ready for %v only", age)
					}
					return nil
				})
			})
		}
	}
}

// A NetworkPolicy that denies all traffic by default stands between a node and
// its pods: rules in the node that let through only what comes from the node's
// own addresses, which every policy must allow. Probes of every kind pass, and
// the application sees who probes it; pods of the mesh are kept out, until the
// policy allows the port of tunnels.
func TestProbesUnderNetworkPolicy(t *testing.T) {
	probes := []string{"httpGet: {port: 8080, path: /healthz}", "tcpSocket: {port: 9000}", "grpc: {port: 9090}"}
	nodes := []string{"node1", "node2"}
	y := peerAuthentication("v1", "default", "STRICT")
	for _, node := range nodes {
		for i, p := range probes {
			y += podYAML(meshed, fmt.Sprintf("denied-%s-%d", node, i), node, fmt.Sprintf(`args: [server]
    readinessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 2}
    livenessProbe: {%[1]s, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 2}`, p))
		}
	}
	apply(t, y)
	ready(t, meshed)
	for _, node := range nodes {
		t.Run(node, func(t *testing.T) {
			own4, own6 := ownAddresses(t, node)
			rules := []string{
				"add table inet weft_policy",
				"add chain inet weft_policy forward { type filter hook forward priority -400; }",
				"add chain inet weft_policy output { type filter hook output priority 400; }",
			}
			t.Cleanup(func() { nft(t, node, "delete table inet weft_policy") })
			var pods []string
			var first netip.Addr
			for i := range probes {
				pods = append(pods, fmt.Sprintf("denied-%s-%d", node, i))
				v4, v6 := addresses(t, meshed, pods[i])
				if i == 0 {
					first = v4
				}
				rules = append(rules,
					fmt.Sprintf("add rule inet weft_policy forward ip daddr %v drop", v4), fmt.Sprintf("add rule inet weft_policy forward ip6 daddr %v drop", v6),
					fmt.Sprintf("add rule inet weft_policy output ip daddr %v ip saddr != { %s } drop", v4, strings.Join(own4, ", ")), fmt.Sprintf("add rule inet weft_policy output ip6 daddr %v ip6 saddr != { %s } drop", v6, strings.Join(own6, ", ")))
			}
			url := "http://" + netip.AddrPortFrom(first, 8080).String() + "/"
			eventually(t, patience, func() error { // the client's node learns of the pod
				if got := try(t, meshed, "client", "get", url); !got.OK {
					return fmt.Errorf("before the policy: got %+v, want an answer", got)
				}
				return nil
			})
			nft(t, node, rules...)
			start := time.Now()
			eventually(t, patience, func() error { // what is pooled ends too
				if got := try(t, meshed, "far", "get", "-timeout", "1s", url); got.OK {
					return fmt.Errorf("under the policy: got %+v, want no answer", got)
				}
				return nil
			})
			eventually(t, patience, func() error {
				for _, pod := range pods {
					if got := kubectl(t, "get", "pod", "-n", meshed, pod, "-o", `jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}`); got != "0 true" {
						t.Fatalf("%s: restarts and readiness are %q under the policy, want 0 true", pod, got)
					}
				}
				if time.Since(start) < 5*time.Second {
					return fmt.Errorf("too early to tell")
				}
				return nil
			})
			prober := try(t, meshed, pods[0], "get", "http://127.0.0.1:8080/prober")
			from, err := netip.ParseAddrPort(prober.Remote)
			if err != nil || !slices.Contains(own4, from.Addr().String()) {
				t.Errorf("the application was probed by %q, want an address of the node: %v", prober.Remote, own4)
			}
			nft(t, node, "insert rule inet weft_policy forward tcp dport 15008 accept")
			eventually(t, patience, func() error {
				if got := try(t, meshed, "far", "get", "-timeout", "2s", url); !got.OK {
					return fmt.Errorf("under a policy that allows tunnels: got %+v, want an answer", got)
				}
				return nil
			})
		})
	}
}

// ownAddresses returns the addresses of a node itself.
func ownAddresses(t *testing.T, node string) (v4, v6 []string) {
	t.Helper()
	out, err := world.c.NodeCommand(t.Context(), node, "ip", "-o", "address").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line) // 2: eth0    inet 172.30.0.11/24 ...
		p, err := netip.ParsePrefix(f[3])
		if err != nil {
			t.Fatalf("read the addresses of %s: %q: %v", node, line, err)
		}
		switch a := p.Addr(); {
		case slices.Contains(append(v4, v6...), a.String()):
		case a.Is4():
			v4 = append(v4, a.String())
		default:
			v6 = append(v6, a.String())
		}
	}
	return v4, v6
}

// A pod that is deleted goes on working, and is served, until its last process
// ends: new connections to it, and its own.
func TestTerminatingPodIsServed(t *testing.T) {
	const pod, sleeps = "leaves", 16 * time.Second
	y := strings.Replace(podYAML(meshed, pod, "node2", fmt.Sprintf(`args: [server]
    lifecycle: {preStop: {exec: {command: [/bin/testapp, sleep, %v]}}}`, sleeps)), "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 40", 1)
	apply(t, y)
	kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+pod, "--timeout=120s")
	wantCaptured(t, meshed, pod, true)
	apply(t, peerAuthentication("v1", "default", "STRICT"))
	wantServed(t, outside, "client", "far", false)
	v4, _ := addresses(t, meshed, pod)
	eventually(t, patience, func() error { // the client's node learns of the pod
		if got := try(t, meshed, "client", "get", "http://"+netip.AddrPortFrom(v4, 8080).String()+"/"); !got.OK {
			return fmt.Errorf("before it leaves: got %+v, want an answer", got)
		}
		return nil
	})
	near6, _ := addresses(t, meshed, "near")
	to := startLoad(t, meshed, "client", "-to", v4.String())
	from := startLoad(t, meshed, pod, "-to", near6.String())
	to.waitReady(t)
	from.waitReady(t)
	start := time.Now()
	kubectl(t, "delete", "pod", "-n", meshed, pod, "--wait=false")
	const goesOn = 5 * time.Second
	stays := time.NewTimer(goesOn)
	<-stays.C
	phase := kubectl(t, "get", "pod", "-n", meshed, pod, "-o", "jsonpath={.metadata.deletionTimestamp}")
	if phase == "" {
		t.Error("the pod is not being deleted")
	}
	to.served(t, start.Add(goesOn), 1)
	from.served(t, start.Add(goesOn), 1)
	events := append(from.end(t), to.end(t)...)
	if took := time.Since(start); took > sleeps {
		t.Errorf("the loads ended after %v, when the pod was gone perhaps", took)
	}
	score.Record(t, account(t, "lifecycle.terminating", events)...)
	kubectl(t, "wait", "-n", meshed, "--for=delete", "pod/"+pod, "--timeout=120s")
	wantNoLeaks(t)
}
