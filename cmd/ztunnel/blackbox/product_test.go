package blackbox

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"istio.io/api/security/v1alpha1"

	"crypto/tls"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/internal/testnet"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/node/capture"
)

const trustDomain = "cluster.local"

// control is the control service of the benchmark: the real feed, and a CA that
// signs for anybody.
type control struct {
	v1alpha1.UnimplementedIstioCertificateServiceServer
	ca      *testca.CA
	feed    *feed.Server
	address string
}

func newControl(t *testing.T, ca *testca.CA, r feed.Resources) *control {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	c := &control{ca: ca, feed: feed.NewServer(log, prometheus.NewRegistry(), func(context.Context) (feed.Subscriber, error) {
		return feed.Subscriber{}, nil
	})}
	cert := ca.IssueAs(mesh.Identity{TrustDomain: trustDomain, Namespace: "weft-system", ServiceAccount: "weft-control"},
		func(c *x509.Certificate) { c.DNSNames = []string{"control.bench"} })
	g := grpc.NewServer(append(feed.ServerOptions(), grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}})))...)
	c.feed.Register(g)
	v1alpha1.RegisterIstioCertificateServiceServer(g, c)
	c.feed.Update(r)
	c.feed.SetSynced()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.address = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return c
}

// CreateCertificate signs for the identity that is asked for.
func (c *control) CreateCertificate(_ context.Context, r *v1alpha1.IstioCertificateRequest) (*v1alpha1.IstioCertificateResponse, error) {
	id, err := mesh.ParseIdentity(r.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue())
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(r.GetCsr()))
	if block == nil {
		return nil, errors.New("the request is not PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	leaf := c.ca.Sign(id, csr.PublicKey, nil)
	return &v1alpha1.IstioCertificateResponse{CertChain: []string{
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})), string(c.ca.PEM()),
	}}, nil
}

// A product is a running ztunnel with the agent's side of its node.
type product struct {
	*bench.Process
	agent        *handoff.Server
	capture      *capture.Capture
	admin, stats string
}

// program returns the ztunnel to measure: WEFT_BENCH_ZTUNNEL, or one that is
// built now.
func program(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("WEFT_BENCH_ZTUNNEL"); path != "" {
		return path
	}
	path := filepath.Join(t.TempDir(), "ztunnel")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "github.com/weft-mesh/weft/cmd/ztunnel")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build ztunnel: %v\n%s", err, out)
	}
	return path
}

// freeAddr returns an address that nobody listens on, nor will: its port is none
// that the kernel chooses for others.
func freeAddr() string {
	return fmt.Sprintf("127.%d.%d.%d:15020", 128+rand.IntN(127), rand.IntN(256), 1+rand.IntN(254))
}

// newProduct starts a ztunnel for a node, and waits until it has connected to
// the agent.
func newProduct(t *testing.T, path string, node *testnet.Node, c *control, bpffs string) *product {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	p := &product{admin: freeAddr(), stats: freeAddr()}
	p.agent = handoff.NewServer(handoff.ServerConfig{Path: filepath.Join(dir, "handoff.sock"), Log: slog.New(slog.DiscardHandler)})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.agent.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-done
	})
	p.Process, err = bench.Exec(path, []string{
		"--control-address=" + c.address, "--control-name=control.bench", "--roots=" + write("roots", c.ca.PEM()), "--token=" + write("token", []byte("token")),
		"--handoff=" + filepath.Join(dir, "handoff.sock"), "--handover=" + filepath.Join(dir, "handover.sock"), "--pod-name=ztunnel-" + node.Name, "--pod-namespace=weft-system", "--pod-ip=127.0.0.1", "--node-name=" + node.Name,
		"--admin=" + p.admin, "--stats=" + p.stats, "--ready=" + freeAddr(),
	}, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Stop()
		log.Close()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("the first of what %s has logged:\n%.4000s", node.Name, b)
		}
	})
	if p.capture, err = capture.New(capture.Config{BPFRoot: bpffs + "/" + node.Name, ProcRoot: "/proc", HostNS: node.NS}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.capture.Close() })
	deadline := time.After(20 * time.Second)
	for connected, changed := p.agent.Connected(); connected == 0; connected, changed = p.agent.Connected() {
		select {
		case <-changed:
		case <-deadline:
			t.Fatal("ztunnel does not connect to the agent")
		}
	}
	return p
}

// enrol captures a pod and hands it to the ztunnel.
func (p *product) enrol(t *testing.T, pod *testnet.Pod) {
	t.Helper()
	captured, err := p.capture.Prepare(t.Context(), capture.Target{UID: "uid-" + pod.Name, Netns: pod.NS, Addrs: []netip.Addr{pod.V4}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { captured.Close() })
	f, err := captured.Files()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := handoff.Files{Netns: f.Netns, Blessed: f.Blessed}
	copy(files.Listeners[:], f.Listeners[:])
	if err := p.agent.Add(t.Context(), handoff.Pod{
		UID: "uid-" + pod.Name, Name: pod.Name, Namespace: "shop", ServiceAccount: pod.Name, Addresses: []netip.Addr{pod.V4},
	}, files); err != nil {
		t.Fatal(err)
	}
	if err := captured.Attach(t.Context(), capture.Mode{New: true}); err != nil {
		t.Fatal(err)
	}
}

// metric returns the sum of metrics without labels.
func (p *product) metric(names ...string) (sum float64, err error) {
	b, err := fetch("http://" + p.stats + "/metrics")
	if err != nil {
		return 0, err
	}
	found := 0
	for line := range strings.SplitSeq(b, "\n") {
		name, value, _ := strings.Cut(line, " ")
		if !slices.Contains(names, name) {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += v
		found++
	}
	if found != len(names) {
		return 0, fmt.Errorf("%d of the metrics %v are there", found, names)
	}
	return sum, nil
}

// mallocs returns how many objects the process has allocated so far.
func (p *product) mallocs() (float64, error) { return p.metric("go_memstats_mallocs_total") }

// live returns how many bytes are in use, once garbage was collected.
func (p *product) live() (float64, error) {
	return p.metric("go_memstats_heap_alloc_bytes", "go_memstats_stack_inuse_bytes")
}

// collect runs the garbage collector of the process.
func (p *product) collect() error {
	_, err := fetch("http://" + p.admin + "/debug/pprof/heap?gc=1")
	return err
}

func fetch(url string) (string, error) {
	r, err := http.Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, r.Status)
	}
	return string(b), err
}

const echoPort, sinkPort = 7001, 7002

// A street is two nodes with a captured pod and a bare one each, and
// applications in the pods of the second.
type street struct {
	world                  *testnet.World
	nodeOne, nodeTwo       *testnet.Node
	ca                     *testca.CA
	one, two               *product
	client, server         *testnet.Pod
	pairs                  []pair // more captured ones, if asked for
	bareClient, bareServer *testnet.Pod
	apps, nearApps         [2]netip.AddrPort // echo and sink of server, and of bareServer
}

// A pair is a captured client, and a captured server with its applications.
type pair struct {
	client, server *testnet.Pod
	apps           [2]netip.AddrPort
}

func newStreet(t *testing.T) *street { return newWideStreet(t, 0) }

// newWideStreet is newStreet with more pairs of captured pods.
func newWideStreet(t *testing.T, more int) *street {
	t.Helper()
	return newStreetOf(t, program(t), more)
}

// newStreetOf is newWideStreet with the ztunnel at path.
func newStreetOf(t *testing.T, path string, more int) *street {
	t.Helper()
	w := testnet.New(t)
	one, two := w.Node("one"), w.Node("two")
	s := &street{
		world: w, nodeOne: one, nodeTwo: two,
		ca:     testca.New(t, trustDomain),
		client: one.PodWithoutIPv6("client", testnet.Routed), server: two.PodWithoutIPv6("server", testnet.Routed),
		bareClient: one.PodWithoutIPv6("bare-client", testnet.Routed), bareServer: two.PodWithoutIPv6("bare-server", testnet.Routed),
	}
	captured := []*testnet.Pod{s.client, s.server}
	for i := range more {
		p := pair{client: one.PodWithoutIPv6(fmt.Sprint("client-", i), testnet.Routed), server: two.PodWithoutIPv6(fmt.Sprint("server-", i), testnet.Routed)}
		p.apps = [2]netip.AddrPort{netip.AddrPortFrom(p.server.V4, echoPort), netip.AddrPortFrom(p.server.V4, sinkPort)}
		s.pairs = append(s.pairs, p)
		captured = append(captured, p.client, p.server)
	}
	for _, p := range append([]*testnet.Pod{s.bareClient, s.bareServer}, captured...) {
		p.Sysctl("net/ipv4/tcp_tw_reuse", "1")
		p.Sysctl("net/ipv4/ip_local_port_range", "16384 60999")
	}
	c := newControl(t, s.ca, resources(captured...))
	bpffs := testnet.BPFFS(t)
	s.one, s.two = newProduct(t, path, one, c, bpffs), newProduct(t, path, two, c, bpffs)
	for i, p := range captured {
		[]*product{s.one, s.two}[i%2].enrol(t, p)
	}
	s.apps = [2]netip.AddrPort{netip.AddrPortFrom(s.server.V4, echoPort), netip.AddrPortFrom(s.server.V4, sinkPort)}
	s.nearApps = [2]netip.AddrPort{netip.AddrPortFrom(s.bareServer.V4, echoPort), netip.AddrPortFrom(s.bareServer.V4, sinkPort)}
	s.process(t, "server", s.apps, s.server)
	s.process(t, "server", s.nearApps, s.bareServer)
	for _, p := range s.pairs {
		s.process(t, "server", p.apps, p.server)
	}
	return s
}

// process starts a load generator in a pod.
func (s *street) process(t *testing.T, role string, arg any, at *testnet.Pod) *bench.Process {
	t.Helper()
	p, err := bench.Start(benchTest, role, arg, at.Do)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// resources is a mesh of workloads, clients and servers in turn, and of two
// policies, one of which lets the clients in.
func resources(pods ...*testnet.Pod) feed.Resources {
	workload := func(p *testnet.Pod) mesh.Workload {
		return mesh.Workload{
			UID: mesh.UID("Kubernetes//Pod/shop/" + p.Name), Name: mesh.Name{Namespace: "shop", Name: p.Name},
			Addresses: []netip.Addr{p.V4}, Cluster: "Kubernetes", Transport: mesh.HBONE, Healthy: true,
			Identity: identityOf(p.Name), CanonicalName: p.Name, CanonicalRevision: "v1", Node: p.Node.Name,
		}
	}
	principal := func(names ...string) (m mesh.Match) {
		for _, name := range names {
			m.Principals = append(m.Principals, mesh.StringMatch{Kind: mesh.MatchExact, Value: strings.TrimPrefix(identityOf(name).String(), "spiffe://")})
		}
		return m
	}
	policy := func(name string, action mesh.Action, m mesh.Match) mesh.Policy {
		return mesh.Policy{
			Name: mesh.Name{Namespace: "shop", Name: name}, Scope: mesh.ScopeNamespace, Action: action,
			Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}}},
		}
	}
	var workloads []mesh.Workload
	var clients []string
	for i, p := range pods {
		workloads = append(workloads, workload(p))
		if i%2 == 0 {
			clients = append(clients, p.Name)
		}
	}
	return feed.Resources{
		Workloads: workloads,
		Policies:  []mesh.Policy{policy("allow-client", mesh.Allow, principal(clients...)), policy("deny-mallory", mesh.Deny, principal("mallory"))},
	}
}

func identityOf(name string) mesh.Identity {
	return mesh.Identity{TrustDomain: trustDomain, Namespace: "shop", ServiceAccount: name}
}
