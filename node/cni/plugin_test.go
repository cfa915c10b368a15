package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/google/go-cmp/cmp"
)

// runAsPlugin makes the test binary behave as the plugin's.
const runAsPlugin = "WEFT_TEST_RUN_AS_PLUGIN"

func TestMain(m *testing.M) {
	if os.Getenv(runAsPlugin) != "" {
		skel.PluginMainFuncs(Plugin{Out: os.Stdout}.Funcs(), Versions(), "weft-cni")
		return
	}
	os.Exit(m.Run())
}

// fakeAgent remembers what it was asked and answers what it was told.
type fakeAgent struct {
	mu    sync.Mutex
	calls []string
	last  Request
	err   error
	hang  bool
}

func (a *fakeAgent) note(ctx context.Context, verb string, r Request) error {
	a.mu.Lock()
	a.calls = append(a.calls, verb+" "+r.Namespace+"/"+r.Pod)
	a.last = r
	hang, err := a.hang, a.err
	a.mu.Unlock()
	if hang {
		<-ctx.Done()
	}
	return err
}

func (a *fakeAgent) AddPod(ctx context.Context, r Request) (Response, error) {
	return Response{Captured: true}, a.note(ctx, "ADD", r)
}
func (a *fakeAgent) CheckPod(ctx context.Context, r Request) error { return a.note(ctx, "CHECK", r) }
func (a *fakeAgent) DelPod(ctx context.Context, r Request) error   { return a.note(ctx, "DEL", r) }

func (a *fakeAgent) seen() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls
}

// serve runs h on a socket until the test ends and returns its path.
func serve(t *testing.T, h Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sub", "cni.sock")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, path, h, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the socket", func() bool { _, err := os.Stat(path); return err == nil })
	return path
}

const prevResult = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/var/run/netns/x","futureField":7}],"ips":[{"address":"10.244.1.7/24","interface":0},{"address":"fd00::7/64","interface":0}],"dns":{},"unknown":{"kept":true}}`

func stdin(socket, prev string) string {
	s := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","type":"weft-cni","agentSocket":%q,"excludeNamespaces":["weft-system","kube-system"]`, socket)
	if prev != "" {
		s += `,"prevResult":` + prev
	}
	return s + "}"
}

const podArg = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-1;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1"

// exec runs the plugin as a runtime does.
func execPlugin(t *testing.T, command, args, in string) (stdout string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{runAsPlugin + "=1", "CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_NETNS=/var/run/netns/x", "CNI_IFNAME=eth0", "CNI_ARGS=" + args, "CNI_PATH=/opt/cni/bin"}
	cmd.Stdin = strings.NewReader(in)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String() + errOut.String(), err
}

func TestPluginAddPassesTheResultThrough(t *testing.T) {
	agent := &fakeAgent{}
	out, err := execPlugin(t, "ADD", podArg, stdin(serve(t, agent), prevResult))
	if err != nil {
		t.Fatal(err, out)
	}
	if out != prevResult {
		t.Errorf("result changed:\n got %s\nwant %s", out, prevResult)
	}
	want := Request{Namespace: "shop", Pod: "cart-1", UID: "u-1", ContainerID: "c1", Netns: "/var/run/netns/x", Interface: "eth0",
		Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.7"), netip.MustParseAddr("fd00::7")}}
	if diff := cmp.Diff(want, agent.last, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestPluginSpeaksOldVersions(t *testing.T) {
	agent := &fakeAgent{}
	prev := `{"cniVersion":"0.3.1","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"version":"4","address":"10.244.1.7/24","interface":0}],"dns":{}}`
	in := strings.Replace(stdin(serve(t, agent), prev), `"cniVersion":"1.0.0"`, `"cniVersion":"0.3.1"`, 1)
	out, err := execPlugin(t, "ADD", podArg, in)
	if err != nil || out != prev {
		t.Errorf("%v: %s", err, out)
	}
	if len(agent.last.Addresses) != 1 {
		t.Errorf("addresses %v", agent.last.Addresses)
	}
}

func TestPluginRefusesWhatCouldLeak(t *testing.T) {
	refusing := serve(t, &fakeAgent{err: errors.New("ztunnel is not connected; see its log")})
	nobody := filepath.Join(t.TempDir(), "none.sock")
	tests := []struct {
		name, args, stdin string
		want              []string
	}{
		{"the agent is away", podArg, stdin(nobody, prevResult), []string{"shop/cart-1 is not started", "does not answer", "DaemonSet ztunnel", nobody}},
		{"the agent refuses", podArg, stdin(refusing, prevResult), []string{"shop/cart-1 is not started", "ztunnel is not connected; see its log"}},
		{"a pod without a name", "K8S_POD_NAMESPACE=shop", stdin(refusing, prevResult), []string{"K8S_POD_NAME"}},
		{"a pod without a namespace", "K8S_POD_NAME=weft-system", stdin(refusing, prevResult), []string{"K8S_POD_NAMESPACE"}},
		{"no result before us", podArg, stdin(refusing, ""), []string{"prevResult"}},
		{"a broken result", podArg, stdin(refusing, `{"cniVersion":"1.0.0","ips":[{"address":"x"}]}`), []string{"prevResult"}},
		{"no socket", podArg, stdin("", prevResult), []string{"agentSocket"}},
		{"not JSON", podArg, "{", []string{"unexpected end"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			out, err := execPlugin(t, "ADD", tt.args, tt.stdin)
			if err == nil {
				t.Fatalf("started the pod: %s", out)
			}
			var e struct {
				Code    uint   `json:"code"`
				Msg     string `json:"msg"`
				Details string `json:"details"`
			}
			if json.Unmarshal([]byte(out), &e) != nil || e.Code == 0 {
				t.Fatalf("not a CNI error: %s", out)
			}
			for _, w := range tt.want {
				if !strings.Contains(e.Msg+" "+e.Details, w) {
					t.Errorf("message lacks %q: %s; %s", w, e.Msg, e.Details)
				}
			}
		})
	}
}

func TestPluginLetsThrough(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "none.sock")
	tests := []struct{ name, args string }{
		{"the agent's own namespace", "K8S_POD_NAMESPACE=weft-system;K8S_POD_NAME=ztunnel-x"},
		{"kube-system", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=coredns-x"},
		{"a sandbox that is not a pod", "IgnoreUnknown=1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if out, err := execPlugin(t, "ADD", tt.args, stdin(nobody, prevResult)); err != nil || out != prevResult {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// A removal that fails leaves a pod that cannot be deleted, and a plugin that
// is not ready keeps the kubelet from starting the agent.
func TestPluginNeverFailsToRemoveOrToBeReady(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "none.sock")
	for _, command := range []string{"DEL", "GC", "STATUS"} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			in := strings.Replace(stdin(nobody, prevResult), `"cniVersion":"1.0.0"`, `"cniVersion":"1.1.0"`, 1)
			if out, err := execPlugin(t, command, podArg, in); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

func TestPluginDelAndCheckAsk(t *testing.T) {
	agent := &fakeAgent{}
	path := serve(t, agent)
	for _, command := range []string{"DEL", "CHECK"} {
		if out, err := execPlugin(t, command, podArg, stdin(path, prevResult)); err != nil || out != "" {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	if diff := cmp.Diff([]string{"DEL shop/cart-1", "CHECK shop/cart-1"}, agent.seen()); diff != "" {
		t.Error(diff)
	}
	agent.mu.Lock()
	agent.err = errors.New("not captured")
	agent.mu.Unlock()
	if out, err := execPlugin(t, "CHECK", podArg, stdin(path, prevResult)); err == nil || !strings.Contains(out, "not captured") {
		t.Errorf("CHECK of a pod that is not captured: %v: %s", err, out)
	}
}

func TestClientWaitsForAnAgentThatIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cni.sock")
	got := make(chan error, 1)
	go func() {
		_, err := NewClient(path).Add(t.Context(), Request{Namespace: "a", Pod: "b", ContainerID: "c"})
		got <- err
	}()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Serve(ctx, path, &fakeAgent{}, slog.New(slog.DiscardHandler)) }()
	if err := <-got; err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestClientGivesUpWithItsContext(t *testing.T) {
	path := serve(t, &fakeAgent{hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := NewClient(path).Add(ctx, Request{Namespace: "a", Pod: "b", ContainerID: "c"}); !errors.Is(err, errAway) {
		t.Errorf("got %v, want %v", err, errAway)
	}
}

func TestServeBadInput(t *testing.T) {
	agent := &fakeAgent{}
	path := serve(t, agent)
	for _, body := range []string{"", "{", `{"namespace":"a"}`, `{"namespace":"a","pod":"b","containerID":"c","addresses":["x"]}`, `{"namespace":"` + strings.Repeat("x", 2*maxBody) + `"}`} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "POST /v1/add HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		line := make([]byte, 12)
		if _, err := c.Read(line); err != nil || string(line) != "HTTP/1.1 400" {
			t.Errorf("%.40q: %s %v", body, line, err)
		}
		c.Close()
	}
	if calls := agent.seen(); len(calls) != 0 {
		t.Errorf("the agent was asked: %v", calls)
	}
}

// The next agent takes the socket while the one before still runs.
func TestServeReplacesTheSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cni.sock")
	log := slog.New(slog.DiscardHandler)
	type run struct {
		agent  *fakeAgent
		cancel context.CancelFunc
		done   chan error
	}
	start := func() run {
		ctx, cancel := context.WithCancel(t.Context())
		r := run{&fakeAgent{}, cancel, make(chan error, 1)}
		go func() { r.done <- Serve(ctx, path, r.agent, log) }()
		return r
	}
	ask := func() { _, _ = NewClient(path).Add(t.Context(), Request{Namespace: "a", Pod: "b", ContainerID: "c"}) }
	before := start()
	eventually(t, "the first agent", func() bool { ask(); return len(before.agent.seen()) > 0 })
	after := start()
	eventually(t, "the second agent", func() bool { ask(); return len(after.agent.seen()) > 0 })
	before.cancel()
	if err := <-before.done; err != nil {
		t.Error(err)
	}
	n := len(after.agent.seen())
	ask()
	if len(after.agent.seen()) != n+1 {
		t.Error("the first agent took the socket of the second with it")
	}
	after.cancel()
	if err := <-after.done; err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", st, err)
	}
}
