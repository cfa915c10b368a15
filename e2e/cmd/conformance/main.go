// Conformance runs the mesh tests of the Gateway API's conformance suite on a
// real two-node cluster: first without Weft, where all that routing decides
// must fail, then with it, where nothing may. It writes the report of the second
// run.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster"
	"github.com/weft-mesh/weft/e2e/install"
)

// strict makes the suite a judge: at its default of three good answers in a row
// within half a minute, plain balancing over two pods passes by luck.
const strict = "RequiredConsecutiveSuccesses:10;MaxTimeToConsistency:8"

// image is the one that the suite's manifests name.
const image = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1"

// plain are the tests that a cluster without a mesh passes: they ask for no
// more than Kubernetes does by itself.
var plain = []string{"MeshBasic", "MeshHTTPRouteSimpleSameNamespace"}

type runner struct {
	root, out string
	c         *cluster.Cluster
	only      string
	defaults  bool
}

func main() {
	var r runner
	id := flag.String("id", "conformance", "name of the cluster")
	keep := flag.Bool("keep", false, "leave the cluster up, and use one that is up")
	skip := flag.Bool("skip-baseline", false, "do not run without Weft first")
	flag.StringVar(&r.only, "run", "", "run only the test of this name")
	flag.BoolVar(&r.defaults, "default-timeouts", false, "with Weft, wait as the suite does by default instead of more strictly")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := r.run(ctx, *id, *keep, *skip); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

func (r *runner) run(ctx context.Context, id string, keep, skip bool) (err error) {
	if r.root, err = install.Root(); err != nil {
		return err
	}
	r.out = filepath.Join(r.root, "out", "conformance")
	archive, err := r.build(ctx)
	if err != nil {
		return err
	}
	if r.c, err = cluster.Up(ctx, cluster.Options{ID: id, Out: os.Stdout}); err != nil {
		return err
	}
	if !keep {
		defer func() { err = errors.Join(err, r.c.Down(context.WithoutCancel(ctx))) }()
	}
	if err := r.prepare(ctx, archive); err != nil {
		return err
	}
	if !skip {
		if err := r.baseline(ctx); err != nil {
			return err
		}
	}
	return r.weft(ctx)
}

// build makes the test program, and the image of the suite's pods.
func (r *runner) build(ctx context.Context) (archive string, err error) {
	start := time.Now()
	module := filepath.Join(r.root, "e2e", "conformance")
	bin := filepath.Join(r.out, "bin") + "/"
	cert, key := filepath.Join(r.out, "cert.crt"), filepath.Join(r.out, "cert.key")
	archive = filepath.Join(r.out, "echo-advanced.tar")
	const echo = "istio.io/istio/pkg/test/echo/cmd/"
	for _, s := range []struct {
		dir  string
		argv []string
	}{
		{module, []string{"go", "test", "-c", "-o", filepath.Join(r.out, "mesh.test"), "."}},
		{filepath.Join(module, "echo"), []string{"go", "build", "-ldflags", "-s -w", "-o", bin, echo + "client", echo + "server"}},
		{r.root, []string{"openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
			"-subj", "/CN=echo", "-addext", "subjectAltName=DNS:echo", "-keyout", key, "-out", cert}},
		{r.root, []string{"chmod", "0644", key}},
		{r.root, []string{"go", "run", "./deploy/images", "-name", image, "-entrypoint", "/bin/server",
			"-add", bin + "server:/bin/server", "-add", bin + "client:/bin/client", "-add", cert + ":/cert.crt", "-add", key + ":/cert.key", "-o", archive}},
	} {
		if err := os.MkdirAll(bin, 0o755); err != nil {
			return "", err
		}
		if err := command(ctx, s.dir, s.argv...); err != nil {
			return "", err
		}
	}
	fmt.Printf("built the suite and its image in %v\n", time.Since(start).Round(time.Second))
	return archive, nil
}

// prepare loads the image and installs the kinds of the Gateway API.
func (r *runner) prepare(ctx context.Context, archive string) error {
	if err := r.c.LoadImage(ctx, archive); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api")
	cmd.Dir = filepath.Join(r.root, "e2e", "conformance")
	dir, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("find the module of the Gateway API: %w", err)
	}
	crds := filepath.Join(strings.TrimSpace(string(dir)), "config", "crd", "standard")
	if _, err := r.c.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-f", crds); err != nil {
		return err
	}
	_, err = r.c.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=60s", "crd/gateways.gateway.networking.k8s.io", "crd/httproutes.gateway.networking.k8s.io", "crd/grpcroutes.gateway.networking.k8s.io")
	return err
}

// baseline runs the suite without Weft.
func (r *runner) baseline(ctx context.Context) error {
	fmt.Println("== without Weft: what routing decides must fail")
	results, _ := r.suite(ctx, "baseline", "-no-mesh", "-timeout-config-overrides", strict)
	if len(results) == 0 {
		return fmt.Errorf("the run without Weft has no results; see %s", r.log("baseline"))
	}
	var luck []string
	for name, result := range results {
		if result == "PASS" && !slices.Contains(plain, name) {
			luck = append(luck, name)
		}
	}
	slices.Sort(luck)
	if len(luck) > 0 {
		return fmt.Errorf("%s pass without any mesh: the suite proves nothing about them", strings.Join(luck, ", "))
	}
	fmt.Printf("without Weft %d of %d tests fail, as they must\n", count(results, "FAIL"), len(results))
	return nil
}

// weft installs Weft and runs the suite with it.
func (r *runner) weft(ctx context.Context) error {
	a, err := install.Build(ctx, os.Stdout)
	if err != nil {
		return err
	}
	if out, err := a.Install(ctx, r.c); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	report := filepath.Join(r.root, "docs", "conformance", "mesh.yaml")
	if err := os.MkdirAll(filepath.Dir(report), 0o755); err != nil {
		return err
	}
	fmt.Println("== with Weft")
	args := []string{"-timeout-config-overrides", strict}
	if r.defaults {
		args = nil
	}
	if r.only == "" {
		args = append(args, "-report", report)
	}
	results, err := r.suite(ctx, "weft", args...)
	if err != nil {
		return err
	}
	if n := count(results, "SKIP"); n > 0 && r.only == "" {
		fmt.Printf("%d tests are of other kinds than a mesh's\n", n)
	}
	fmt.Printf("with Weft %d tests pass; the report is %s\n", count(results, "PASS"), report)
	return nil
}

func (r *runner) log(run string) string { return filepath.Join(r.out, run+".log") }

// result is the line of a test of the suite, below the one that runs it.
var result = regexp.MustCompile(`^\s{4}--- (PASS|FAIL|SKIP): TestMesh/(\w+) `)

// suite runs the suite and returns what came of each test.
func (r *runner) suite(ctx context.Context, run string, args ...string) (map[string]string, error) {
	log, err := os.Create(r.log(run))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args = append([]string{"-test.v", "-test.run", "^TestMesh$", "-test.timeout", "30m"}, args...)
	if r.only != "" {
		args = append(args, "-run-test", r.only)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(r.out, "mesh.test"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+r.c.Kubeconfig)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(log, &out), log
	start := time.Now()
	failed := cmd.Run()
	results := map[string]string{}
	lines := bufio.NewScanner(&out)
	lines.Buffer(nil, 1<<24) // some print whole objects
	for lines.Scan() {
		if m := result.FindStringSubmatch(lines.Text()); m != nil {
			results[m[2]] = m[1]
			if m[1] != "SKIP" {
				fmt.Println(strings.TrimSpace(lines.Text()))
			}
		}
	}
	fmt.Printf("ran in %v; all of it is in %s\n", time.Since(start).Round(time.Second), r.log(run))
	if failed != nil {
		return results, fmt.Errorf("the suite failed: %w; see %s", failed, r.log(run))
	}
	return results, nil
}

func count(results map[string]string, what string) (n int) {
	for _, r := range results {
		if r == what {
			n++
		}
	}
	return n
}

// command runs a program, and returns what it said if it fails.
func command(ctx context.Context, dir string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	return nil
}
