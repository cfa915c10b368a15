package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// plain are the tests that a cluster without a mesh passes: they ask for no
// more than Kubernetes does by itself.
var plain = map[string]bool{
	"MeshBasic": true, // that a service can be reached
}

// namespaces are those of the suite.
var namespaces = []string{"gateway-conformance-mesh", "gateway-conformance-mesh-consumer"}

// A tested is what came of a test: pass, fail or skip.
type tested struct {
	result, levels string
	took           time.Duration
}

// results are what came of the mesh tests, by name.
type results map[string]tested

// suite runs the suite, or one test of it, says how far it is, and returns what
// came of the tests.
func (r *runner) suite(ctx context.Context, run, only string, args ...string) (results, error) {
	// What an earlier run has made is gone only a while after its end.
	gone := append([]string{"delete", "namespace", "--ignore-not-found", "--timeout=120s"}, namespaces...)
	if _, err := r.c.Kubectl(ctx, gone...); err != nil {
		return nil, err
	}
	name := filepath.Join(r.out, run+".log")
	log, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args = append([]string{"-test.v", "-test.run", "^TestMesh$", "-test.timeout", "30m"}, args...)
	if only != "" {
		args = append(args, "-run-test", only)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(r.out, "mesh.test"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+r.c.Kubeconfig)
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	got, read := follow(io.TeeReader(out, log), os.Stdout)
	failed := errors.Join(read, cmd.Wait())
	fmt.Printf("ran in %v; its log is %s\n", time.Since(start).Round(time.Second), name)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// A failure of a test is told by its result; one without that is the suite's.
	if failed != nil && !slices.ContainsFunc(slices.Collect(maps.Values(got)), func(t tested) bool { return t.result == "fail" }) {
		return nil, fmt.Errorf("the suite could not run: %w; see %s", failed, name)
	}
	if len(got) == 0 {
		return nil, fmt.Errorf("the suite has run none of the mesh tests; see %s", name)
	}
	return got, nil
}

// follow reads the output of the suite to its end, and prints each result.
func follow(in io.Reader, out io.Writer) (results, error) {
	got := results{}
	last := time.Now()
	r := bufio.NewReader(in)
	for {
		line, err := r.ReadString('\n') // some lines hold whole objects
		if f := strings.Fields(line); len(f) == 4 && f[0] == "result" {
			t := tested{result: f[2], levels: f[3], took: time.Since(last)}
			last = time.Now()
			got[f[1]] = t
			fmt.Fprintf(out, "        %-4s %s (%.1f s)\n", t.result, f[1], t.took.Seconds())
		}
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}

// judgeBaseline says what is wrong with the results without Weft: they have to
// show that the suite tells a mesh from none.
func judgeBaseline(got results) error {
	var luck, broken []string
	for name, t := range got {
		switch {
		case t.result == "pass" && !plain[name]:
			luck = append(luck, name)
		case t.result != "pass" && plain[name]:
			broken = append(broken, name)
		}
	}
	slices.Sort(luck)
	slices.Sort(broken)
	var errs []error
	if luck != nil {
		errs = append(errs, fmt.Errorf("without any mesh %s pass, so they prove nothing", strings.Join(luck, ", ")))
	}
	if broken != nil {
		errs = append(errs, fmt.Errorf("without any mesh %s should pass: what fails in this cluster proves nothing", strings.Join(broken, ", ")))
	}
	return errors.Join(errs...)
}

// judgeMesh says what is wrong with the results with Weft: all of the tests that
// also ran without it have to pass.
func judgeMesh(got, without results) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if t := got[name]; t.result != "pass" {
			errs = append(errs, fmt.Errorf("with Weft %s: %s", name, t.result))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(without)) {
		if _, ran := got[name]; !ran {
			errs = append(errs, fmt.Errorf("with Weft %s did not run", name))
		}
	}
	return errors.Join(errs...)
}

// table prints all results side by side.
func table(out io.Writer, without, with results) {
	all := maps.Clone(without)
	if all == nil {
		all = results{}
	}
	maps.Copy(all, with)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "test\tMESH-HTTP\tMESH-GRPC\twithout Weft\twith Weft")
	for _, name := range slices.Sorted(maps.Keys(all)) {
		level := map[string]string{}
		for l := range strings.SplitSeq(all[name].levels, ",") {
			profile, at, _ := strings.Cut(l, ":")
			level[profile] = at
		}
		show := func(s string) string {
			if s == "" {
				return "-"
			}
			return s
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", name, show(level["MESH-HTTP"]), show(level["MESH-GRPC"]), show(without[name].result), show(with[name].result))
	}
	w.Flush()
}
