package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/weft-mesh/weft/e2e/score"
)

const (
	churnPods     = 1000
	churnLeast    = 250             // also where they take longer than churnFor
	churnFor      = 3 * time.Minute // two processors make and delete about 1.5 pods a second
	churnParallel = 12              // on each node
	churnAccounts = 8
)

// churnEnv, if it is set, makes all of churnPods whatever time they take.
const churnEnv = "WEFT_CHURN_ALL"

// held is what the node's programs and kernel hold for pods.
type held struct {
	pins    int            // files below Weft's directory in the bpf file system
	netns   int            // named network namespaces
	files   map[string]int // open descriptors, by program
	entered map[string]int // those of them that are network namespaces
}

// holds counts what is held on a node.
func holds(t *testing.T, node string) held {
	t.Helper()
	const script = `echo pins $(find /sys/fs/bpf/weft | wc -l)
echo netns $(ls /run/netns | wc -l)
for d in /proc/[0-9]*; do
	read -r comm <"$d/comm" || continue
	case "$comm" in ztunnel|weft-node)
		echo files $comm $(ls "$d/fd" | wc -l)
		echo entered $comm $(ls -l "$d/fd" | grep -c 'net:\[\|/run/netns/');;
	esac
done 2>/dev/null
true`
	out, err := world.c.NodeCommand(t.Context(), node, "sh", "-c", script).Output()
	if err != nil {
		t.Fatalf("count what %s holds: %v", node, err)
	}
	h := held{files: map[string]int{}, entered: map[string]int{}}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		n, err := strconv.Atoi(f[len(f)-1])
		if err != nil {
			t.Fatalf("count what %s holds: %q", node, line)
		}
		switch f[0] {
		case "pins":
			h.pins = n
		case "netns":
			h.netns = n
		case "files":
			h.files[f[1]] += n
		case "entered":
			h.entered[f[1]] += n
		}
	}
	return h
}

// certificates returns the identities that the ztunnel of a node has
// certificates for.
func certificates(t *testing.T, node string) []string {
	t.Helper()
	const script = `for d in /proc/[0-9]*; do
	read -r comm <"$d/comm" && [ "$comm" = ztunnel ] || continue
	nsenter -t "${d#/proc/}" -n bash -c 'exec 3<>/dev/tcp/127.0.0.1/15000; printf "GET /config_dump HTTP/1.0\r\n\r\n" >&3; cat <&3' 2>/dev/null && exit
done 2>/dev/null
exit 1`
	out, err := world.c.NodeCommand(t.Context(), node, "bash", "-c", script).Output()
	_, body, ok := strings.Cut(string(out), "\r\n\r\n")
	var dump struct {
		Certificates []struct{ Identity string }
	}
	if err != nil || !ok || json.Unmarshal([]byte(body), &dump) != nil {
		t.Fatalf("config_dump of %s: %v: %.200q", node, err, out)
	}
	var ids []string
	for _, c := range dump.Certificates {
		ids = append(ids, c.Identity)
	}
	slices.Sort(ids)
	return ids
}

// identities returns the identities of the captured pods of each node.
func identities(t *testing.T) map[string][]string {
	t.Helper()
	pods, err := world.kube.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{"node1": nil, "node2": nil}
	for _, p := range pods.Items {
		if p.Annotations["ambient.istio.io/redirection"] == "enabled" {
			id := fmt.Sprintf("spiffe://cluster.local/ns/%s/sa/%s", p.Namespace, p.Spec.ServiceAccountName)
			all[p.Spec.NodeName] = append(all[p.Spec.NodeName], id)
		}
	}
	for node, ids := range all {
		slices.Sort(ids)
		all[node] = slices.Compact(ids)
	}
	return all
}

// A churn makes and deletes pods and looks at what each of them experienced.
type churn struct {
	urls [2]string // of the servers for accounts with even and with odd numbers

	mu        sync.Mutex
	pods      map[string]chan corev1.Pod // by name; closed when the pod is gone
	addresses map[string]int             // how many pods had an address
	wrong     []string
	done      int
}

// follow hands on what happens to the pods.
func (c *churn) follow(events <-chan watch.Event) {
	for e := range events {
		p, ok := e.Object.(*corev1.Pod)
		if !ok {
			continue
		}
		c.mu.Lock()
		ch := c.pods[p.Name]
		if ch != nil && e.Type == watch.Deleted {
			delete(c.pods, p.Name)
			close(ch)
		}
		c.mu.Unlock()
		if ch == nil || e.Type == watch.Deleted {
			continue
		}
		select {
		case ch <- *p: // the newest counts
		default:
			select {
			case <-ch:
			default:
			}
			ch <- *p
		}
	}
}

// one makes a pod, waits for what it has to say, deletes it, and waits until
// it is gone. Where the container runtime itself fails, which it does now and
// then when a machine is busy, there is another one.
func (c *churn) one(t *testing.T, ns, node string, n int) error {
	for try := range 5 {
		ran, err := c.try(t, ns, node, fmt.Sprintf("pod-%d-%d", n, try), n)
		if ran || err != nil {
			return err
		}
	}
	return fmt.Errorf("pod %d: the runtime on %s could not start it five times", n, node)
}

// try is one attempt of one. It reports whether the pod has run.
func (c *churn) try(t *testing.T, ns, node, name string, n int) (ran bool, err error) {
	events := make(chan corev1.Pod, 1)
	c.mu.Lock()
	c.pods[name] = events
	c.mu.Unlock()
	account, no, grace := fmt.Sprintf("account-%d", n%churnAccounts), false, int64(1)
	pods := world.kube.CoreV1().Pods(ns)
	_, err = pods.Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: account, AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "app", Image: "weft.test/testapp:1", ImagePullPolicy: corev1.PullNever,
				Args: []string{"get", "-timeout", "10s", c.urls[0], c.urls[1]},
				// One of the two refuses, so the verb fails, and what it said is
				// in the pod's status.
				TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	limit := time.NewTimer(3 * time.Minute)
	defer limit.Stop()
	var last corev1.Pod
	deleted := false
	for {
		select {
		case p, there := <-events:
			if !there && deleted {
				return ran, nil
			}
			if !there {
				return ran, fmt.Errorf("%s went away by itself", name)
			}
			last = p
			if deleted || len(p.Status.ContainerStatuses) == 0 || p.Status.ContainerStatuses[0].State.Terminated == nil {
				continue
			}
			// Served by both it would be "Completed", and have said nothing.
			if end := p.Status.ContainerStatuses[0].State.Terminated; end.Reason == "Error" || end.Reason == "Completed" {
				ran = true
				c.look(p, n%2, end.Message)
			} else {
				t.Logf("%s on %s: %s: %s", name, node, end.Reason, end.Message)
			}
			deleted = true
			if err := pods.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
				return ran, err
			}
		case <-limit.C:
			return ran, fmt.Errorf("%s on %s is stuck: %+v", name, node, last.Status)
		}
	}
}

// look checks that a pod was served as who it is: by the server for its kind of
// account, and not by the other.
func (c *churn) look(p corev1.Pod, kind int, said string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done++
	c.addresses[p.Status.PodIP]++
	var got []reply
	for line := range strings.Lines(said) {
		var r reply
		if json.Unmarshal([]byte(line), &r) == nil {
			got = append(got, r)
		}
	}
	if len(got) != 2 {
		c.wrong = append(c.wrong, fmt.Sprintf("%s (%s) said %q", p.Name, p.Status.PodIP, said))
		return
	}
	from, _ := netip.ParseAddrPort(got[kind].Remote)
	if !got[kind].OK || got[1-kind].OK || from.Addr().String() != p.Status.PodIP {
		c.wrong = append(c.wrong, fmt.Sprintf("%s (%s, %s): served by its server %+v, by the other %+v", p.Name, p.Spec.ServiceAccountName, p.Status.PodIP, got[kind], got[1-kind]))
	}
}

// Pods are made and deleted, on both nodes and in parallel: a thousand, or as
// many as there is time for. Each is served as the identity that it has and as no other, though addresses and
// namespaces are used again and again; and nothing of them stays: pins, maps,
// descriptors, network namespaces, certificates.
func TestPodChurn(t *testing.T) {
	const ns = "churn"
	kinds := []string{"even", "odd"}
	y := namespaceYAML(ns, "ambient")
	for i := range churnAccounts {
		y += fmt.Sprintf("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: account-%d, namespace: %s}\n", i, ns)
	}
	for k, kind := range kinds {
		var accounts []string
		for i := k; i < churnAccounts; i += 2 {
			accounts = append(accounts, fmt.Sprintf("cluster.local/ns/%s/sa/account-%d", ns, i))
		}
		y += podYAML(meshed, kind, fmt.Sprintf("node%d", k+1), "args: [server]")
		y += authorizationPolicy("v1", kind, fmt.Sprintf(`{selector: {matchLabels: {app: %s}}, action: ALLOW, rules: [{from: [{source: {principals: [%s]}}]}]}`, kind, strings.Join(accounts, ", ")))
	}
	apply(t, y)
	c := &churn{pods: map[string]chan corev1.Pod{}, addresses: map[string]int{}}
	for k, kind := range kinds {
		kubectl(t, "wait", "-n", meshed, "--for=condition=Ready", "pod/"+kind, "--timeout=120s")
		wantCaptured(t, meshed, kind, true)
		v4, _ := addresses(t, meshed, kind)
		c.urls[k] = fmt.Sprintf("http://%v/", netip.AddrPortFrom(v4, 8080))
		eventually(t, patience, func() error { // the policy is there
			if try(t, meshed, "client", "get", "-timeout", "2s", c.urls[k]).OK {
				return fmt.Errorf("%s serves strangers", kind)
			}
			return nil
		})
	}
	noneIsGoing(t)
	wantNoLeaks(t)
	restarted := whole(t, nil, nil)
	before := map[string]held{"node1": holds(t, "node1"), "node2": holds(t, "node2")}
	w, err := world.kube.CoreV1().Pods(ns).Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var follower, workers sync.WaitGroup
	follower.Go(func() { c.follow(w.ResultChan()) })
	start := time.Now()
	var begun atomic.Int32
	enough := func() bool {
		return os.Getenv(churnEnv) == "" && begun.Load() >= churnLeast && time.Since(start) > churnFor
	}
	var next = map[string]chan int{"node1": make(chan int, churnPods), "node2": make(chan int, churnPods)}
	for i := range churnPods {
		next[fmt.Sprintf("node%d", i/2%2+1)] <- i // both kinds on both nodes
	}
	for node, numbers := range next {
		close(numbers)
		for range churnParallel {
			workers.Go(func() {
				for n := range numbers {
					if enough() {
						return
					}
					begun.Add(1)
					if err := c.one(t, ns, node, n); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	workers.Wait()
	took := time.Since(start)
	w.Stop()
	follower.Wait()
	again := 0
	for _, n := range c.addresses {
		again += n - 1
	}
	t.Logf("%d pods were made and deleted in %v; %d had an address that another had before", c.done, took.Round(100*time.Millisecond), again)
	if len(c.wrong) > 0 {
		t.Errorf("%d pods were not served as who they are:\n%s", len(c.wrong), strings.Join(c.wrong[:min(10, len(c.wrong))], "\n"))
	}
	leaks := c.leaks(t, before)
	if now := whole(t, nil, nil); !maps.Equal(now, restarted) {
		t.Errorf("containers of Weft: %v, before %v", now, restarted)
	}
	all := int(begun.Load())
	score.Record(t, score.Row{Name: "churn.pods", Attempted: score.N(c.done), Broken: score.N(len(c.wrong) + all - c.done)},
		score.Row{Name: "churn.leaks", Attempted: score.N(all), Broken: score.N(leaks)})
}

// noneIsGoing waits until no pod is being deleted: those of the test before may
// still be there, and what they hold is not what stays.
func noneIsGoing(t *testing.T) {
	t.Helper()
	poll(t, patience, func() error {
		pods, err := world.kube.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.DeletionTimestamp != nil {
				return fmt.Errorf("%s/%s is still being deleted", p.Namespace, p.Name)
			}
		}
		return nil
	})
}

// leaks returns how many things of pods that are gone are still held, after
// some patience.
func (c *churn) leaks(t *testing.T, before map[string]held) int {
	t.Helper()
	wantNoLeaks(t)
	n := 0
	for node, was := range before {
		if !t.Run("nothing is left on "+node, func(t *testing.T) {
			poll(t, patience, func() error {
				now := holds(t, node)
				if now.pins != was.pins || now.netns != was.netns {
					return fmt.Errorf("%d pins and %d network namespaces, before %d and %d", now.pins, now.netns, was.pins, was.netns)
				}
				for name, files := range now.files {
					// A connection or two to others may come or go by itself.
					if files > was.files[name]+20 || now.entered[name] != was.entered[name] {
						return fmt.Errorf("%s has %d descriptors, %d of them network namespaces; before %d and %d", name, files, now.entered[name], was.files[name], was.entered[name])
					}
				}
				if got, want := certificates(t, node), identities(t)[node]; !slices.Equal(got, want) {
					return fmt.Errorf("certificates for %v, the captured pods are %v", got, want)
				}
				t.Logf("descriptors %v, before %v", now.files, was.files)
				return nil
			})
		}) {
			n++
		}
	}
	return n
}
