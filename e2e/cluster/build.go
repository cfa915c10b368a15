package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// kubernetesVersion is the version in hyper/go.mod.
const kubernetesVersion = "v1.36.3"

// programs are the paths of what the cluster runs, as <cache>/<name>-<key>/<name>
// with a hash of what it was built from for the key: a rebuilt program never
// replaces one that runs.
type programs struct {
	Hyper   string // every Kubernetes program
	Node    string // ./node
	Coredns string
	TestApp string
	Images  string // the image tool
}

// dir is the directory that holds them all.
func (p programs) dir() string { return filepath.Dir(filepath.Dir(p.Hyper)) }

// A source is a program to build.
type source struct {
	name    string
	module  string   // directory of its module
	pkg     string   // package in it
	deps    []string // directories that the program is built from, below module
	ldflags string
	note    string // for a person who waits for the first build
}

func sources(repo string) []source {
	e2e := filepath.Join(repo, "e2e")
	version := "k8s.io/component-base/version."
	return []source{
		{name: "node", module: e2e, pkg: "./cluster/node", deps: []string{"cluster/node", "cluster/internal"}},
		{name: "testapp", module: e2e, pkg: "./testapp", deps: []string{"testapp"}},
		{name: "images", module: repo, pkg: "./deploy/images", deps: []string{"deploy/images"}},
		{
			name: "hyper", module: filepath.Join(e2e, "cluster/hyper"), pkg: ".", deps: []string{"."},
			ldflags: "-X " + version + "gitVersion=" + kubernetesVersion + " -X " + version + "gitMajor=1 -X " + version + "gitMinor=36",
			note:    "Kubernetes " + kubernetesVersion + " from source: about 2700 packages, 10 minutes on two free cores the first time, then kept",
		},
		{
			name: "coredns", module: filepath.Join(e2e, "cluster/coredns"), pkg: ".", deps: []string{"."},
			note: "CoreDNS from source: about 2 minutes the first time, then kept",
		},
	}
}

// buildPrograms builds what is missing from the cache.
func buildPrograms(ctx context.Context, repo string, p *progress) (programs, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return programs{}, fmt.Errorf("find a directory for built programs: %w", err)
	}
	dir := filepath.Join(cache, "weft", "cluster")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return programs{}, err
	}
	unlock, err := lock(ctx, dir, func() { p.note("another build is running; waiting for it") })
	if err != nil {
		return programs{}, err
	}
	defer unlock()
	paths := map[string]string{}
	for _, s := range sources(repo) {
		if paths[s.name], err = s.build(ctx, dir, p); err != nil {
			return programs{}, fmt.Errorf("build %s: %w", s.name, err)
		}
	}
	return programs{
		Hyper: paths["hyper"], Node: paths["node"], Coredns: paths["coredns"],
		TestApp: paths["testapp"], Images: paths["images"],
	}, nil
}

// build returns the path of the program, built if it is not there yet.
func (s source) build(ctx context.Context, dir string, p *progress) (string, error) {
	key, err := s.key(ctx)
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, s.name+"-"+key, s.name)
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	p.note("build %s", s.name)
	if s.note != "" {
		p.note("  %s", s.note)
	}
	next := out + ".next"
	cmd := exec.CommandContext(ctx, "go", "build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w "+s.ldflags, "-o", next, s.pkg)
	cmd.Dir = s.module
	cmd.Env = buildEnv()
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // go then stops its compilers
	cmd.WaitDelay = 10 * time.Second
	if err := runBuild(cmd, p); err != nil {
		return "", err
	}
	return out, os.Rename(next, out)
}

// buildEnv keeps a user's workspace and flags out of the builds. Programs are
// static: they run in images that hold nothing else.
func buildEnv() []string {
	return append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
}

// runBuild runs go build -v and tells every few seconds how far it has come.
func runBuild(cmd *exec.Cmd, p *progress) error {
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run go: %w: is Go on the PATH?", err)
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for sc := bufio.NewScanner(stderr); sc.Scan(); {
			lines <- sc.Text()
		}
	}()
	start := time.Now()
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	var compiled, fetched int
	var last []string // what may explain a failure
	for open := true; open; {
		var line string
		select {
		case line, open = <-lines:
			switch {
			case strings.HasPrefix(line, "go: downloading"):
				fetched++
			case strings.ContainsAny(line, " :"):
				last = append(last[max(0, len(last)-19):], line)
			case line != "":
				compiled++
			}
		case <-tick.C:
			p.note("  %s: %d modules fetched, %d packages compiled", time.Since(start).Round(time.Second), fetched, compiled)
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s in %s: %w\n%s", strings.Join(cmd.Args, " "), cmd.Dir, err, strings.Join(last, "\n"))
	}
	return nil
}

// key returns a hash of the Go version and of every file the program is built
// from; of other modules, what go.mod and go.sum say.
func (s source) key(ctx context.Context) (string, error) {
	h := sha256.New()
	cmd := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOARCH")
	cmd.Dir = s.module
	cmd.Env = buildEnv()
	version, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run go env: %w: is Go on the PATH?", err)
	}
	h.Write(version)
	io.WriteString(h, s.ldflags)
	files := []string{filepath.Join(s.module, "go.mod"), filepath.Join(s.module, "go.sum")}
	for _, d := range s.deps {
		err := filepath.WalkDir(filepath.Join(s.module, d), func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() && !strings.HasSuffix(path, "_test.go") {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return "", err
		}
	}
	sort.Strings(files)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		rel, _ := filepath.Rel(s.module, f)
		fmt.Fprintf(h, "\n%s %d\n", rel, len(b))
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

// Image names of what the cluster itself brings.
const (
	TestImage    = "weft.test/testapp:1"
	pauseImage   = "weft.test/pause:1"
	corednsImage = "weft.test/coredns:1"
)

// makeImages puts the archives of the cluster's own images into dir.
func makeImages(ctx context.Context, pr programs, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, im := range []struct {
		name, program string
		args          []string
	}{
		{TestImage, pr.TestApp, []string{"-entrypoint", "/bin/testapp", "-add", pr.TestApp + ":/bin/testapp"}},
		{pauseImage, pr.TestApp, []string{"-entrypoint", "/bin/testapp", "-arg", "pause", "-add", pr.TestApp + ":/bin/testapp"}},
		{corednsImage, pr.Coredns, []string{"-entrypoint", "/bin/coredns", "-add", pr.Coredns + ":/bin/coredns"}},
	} {
		short := strings.TrimSuffix(filepath.Base(im.name), ":1")
		tar := filepath.Join(pr.dir(), "image-"+short+"-"+filepath.Base(filepath.Dir(im.program))+".tar")
		if _, err := os.Stat(tar); errors.Is(err, fs.ErrNotExist) {
			args := append([]string{"-name", im.name, "-o", tar + ".next"}, im.args...)
			out, err := exec.CommandContext(ctx, pr.Images, args...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("make image %s: %w: %s", im.name, err, bytes.TrimSpace(out))
			}
			if err := os.Rename(tar+".next", tar); err != nil {
				return err
			}
		}
		if err := copyFile(tar, filepath.Join(dir, short+".tar")); err != nil {
			return err
		}
	}
	return nil
}

// copyFile puts a copy of src at dst, at once or not at all; a hard link if
// both are on one file system.
func copyFile(src, dst string) error {
	next := dst + ".next"
	os.Remove(next)
	if os.Link(src, next) != nil {
		in, err := os.Open(src)
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(next)
		if err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			out.Close()
			return err
		}
		if err := out.Close(); err != nil {
			return err
		}
	}
	return os.Rename(next, dst)
}
