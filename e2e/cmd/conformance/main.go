// Conformance runs the mesh tests of the Gateway API's conformance suite on a
// real two-node cluster: first without Weft, where all that routing decides
// must fail, then with it, where nothing may. It keeps the report of the second
// run, and removes the cluster.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster"
	"github.com/weft-mesh/weft/e2e/install"
)

// strict makes the suite a judge: at its default of three good answers in a row
// within half a minute, plain balancing over two pods passes by luck.
const strict = "RequiredConsecutiveSuccesses:10;MaxTimeToConsistency:8"

type runner struct {
	root, out string
	c         *cluster.Cluster
	weft      install.Artifacts
	only      string
	defaults  bool
}

func main() {
	var r runner
	id := flag.String("id", "conformance", "name of the cluster")
	keep := flag.Bool("keep", false, "leave the cluster up, and use one that is up")
	skip := flag.Bool("skip-baseline", false, "do not run without Weft first")
	flag.StringVar(&r.only, "run", "", "run only the test of this name; the report stays as it is")
	flag.BoolVar(&r.defaults, "default-timeouts", false, "with Weft, wait as the suite does by default instead of more strictly")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	if err := r.run(ctx, *id, *keep, *skip); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
	fmt.Printf("conformance: all of it in %v\n", time.Since(start).Round(time.Second))
}

func (r *runner) run(ctx context.Context, id string, keep, skip bool) (err error) {
	if r.root, err = install.Root(); err != nil {
		return err
	}
	r.out = filepath.Join(r.root, "out", "conformance")
	fmt.Println("== build")
	image, err := r.build(ctx)
	if err != nil {
		return err
	}
	if r.weft, err = install.Build(ctx, os.Stdout); err != nil {
		return err
	}
	fmt.Println("== a cluster")
	if r.c, err = cluster.Up(ctx, cluster.Options{ID: id, Out: os.Stdout}); err != nil {
		return err
	}
	if !keep {
		defer func() {
			fmt.Println("removing the cluster ...")
			err = errors.Join(err, r.c.Down(context.WithoutCancel(ctx)))
		}()
	}
	if err := r.prepare(ctx, image); err != nil {
		return err
	}
	return r.compare(ctx, skip)
}

// compare runs the suite without Weft and with it, and judges.
func (r *runner) compare(ctx context.Context, skip bool) error {
	var without, with results
	var luck error
	if !skip {
		fmt.Println("== without Weft: what routing decides must fail")
		var err error
		if without, err = r.baseline(ctx); err != nil {
			return err
		}
		luck = judgeBaseline(without)
	}
	fmt.Println("== with Weft")
	report := filepath.Join(r.out, "mesh.yaml")
	with, err := r.mesh(ctx, report)
	if err != nil {
		return err
	}
	fmt.Println()
	table(os.Stdout, without, with)
	fmt.Println()
	if err := errors.Join(luck, judgeMesh(with, without)); err != nil {
		return fmt.Errorf("%w\nall of both runs is in %s", err, r.out)
	}
	fmt.Printf("with Weft all %d tests pass\n", len(with))
	if r.only != "" || skip || r.defaults {
		return nil
	}
	return r.publish(report)
}

// baseline runs the suite without Weft. A test that passes there has perhaps
// only been lucky, so it has to do it again.
func (r *runner) baseline(ctx context.Context) (results, error) {
	// Most of a failing test is waiting: many can wait at once.
	args := []string{"-test.parallel", "8", "-no-mesh", "-timeout-config-overrides", strict}
	got, err := r.suite(ctx, "without", r.only, args...)
	if err != nil {
		return nil, err
	}
	for name, t := range got {
		if t.result != "pass" || plain[name] {
			continue
		}
		fmt.Printf("%s passed: once more, as it may have been luck\n", name)
		again, err := r.suite(ctx, "without-"+name, name, args...)
		if err != nil {
			return nil, err
		}
		got[name] = again[name]
	}
	return got, nil
}

// mesh installs Weft and runs the suite with it.
func (r *runner) mesh(ctx context.Context, report string) (results, error) {
	start := time.Now()
	if out, err := r.weft.Install(ctx, r.c); err != nil {
		r.c.Dump(ctx, os.Stderr)
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	fmt.Printf("installed Weft in %v\n", time.Since(start).Round(time.Second))
	args := []string{"-report", report, "-weft-version", r.version(ctx)}
	if !r.defaults {
		args = append(args, "-timeout-config-overrides", strict)
	}
	return r.suite(ctx, "with", r.only, args...)
}

// version says what was tested.
func (r *runner) version(ctx context.Context) string {
	cmd := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty")
	cmd.Dir = r.root
	if v, err := cmd.Output(); err == nil {
		return strings.TrimSpace(string(v))
	}
	return install.Tag
}

// publish keeps the report with the documents.
func (r *runner) publish(report string) error {
	b, err := os.ReadFile(report)
	if err != nil {
		return err
	}
	kept := filepath.Join("docs", "conformance", "mesh.yaml")
	if err := os.MkdirAll(filepath.Join(r.root, filepath.Dir(kept)), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(r.root, kept), b, 0o644); err != nil {
		return err
	}
	fmt.Printf("the report is %s\n", kept)
	return nil
}
