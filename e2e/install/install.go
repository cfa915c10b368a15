// Package install builds Weft from this checkout and installs it in a cluster,
// as a user would: with the release images and the weft command.
package install

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster"
)

// Registry and Tag name the images that Build makes.
const (
	Registry = "weft.test"
	Tag      = "dev"
)

// An Artifact set is what Build makes of a checkout.
type Artifacts struct {
	CLI    string   // path of the weft command
	Images []string // paths of image archives
}

// Root returns the top folder of the checkout that the working directory is in.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "deploy", "chart")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find the checkout: no deploy/chart above the working directory: run this inside a checkout of Weft")
}

// Build compiles the weft command and the release images into out/ of the
// checkout, and tells its progress to w. It is quick when nothing has changed.
func Build(ctx context.Context, w io.Writer) (Artifacts, error) {
	root, err := Root()
	if err != nil {
		return Artifacts{}, err
	}
	out := filepath.Join(root, "out")
	a := Artifacts{CLI: filepath.Join(out, "bin", "weft")}
	if err := Make(ctx, w, "the weft command", root, "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+Tag, "-o", a.CLI, "./cmd/weft"); err != nil {
		return Artifacts{}, fmt.Errorf("build the weft command: %w", err)
	}
	images := filepath.Join(out, "images")
	if err := Make(ctx, w, "the images of weft-control, weft-node and ztunnel", root, "go", "run", "-trimpath", "./deploy/images", "-registry", Registry, "-tag", Tag, "-o", images); err != nil {
		return Artifacts{}, fmt.Errorf("build the images: %w", err)
	}
	a.Images, err = filepath.Glob(filepath.Join(images, "*.tar"))
	if err == nil && len(a.Images) == 0 {
		err = fmt.Errorf("build the images: none in %s", images)
	}
	return a, err
}

// Make runs a program in dir, which makes what, and says every ten seconds that
// it still does: cold, the go command compiles for minutes. The error has what
// the program printed.
func Make(ctx context.Context, w io.Writer, what, dir string, argv ...string) error {
	start := time.Now()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out.Bytes())
			}
			fmt.Fprintf(w, "        built %s in %v\n", what, time.Since(start).Round(100*time.Millisecond))
			return nil
		case <-tick.C:
			fmt.Fprintf(w, "        building %s ... %v\n", what, time.Since(start).Round(time.Second))
		}
	}
}

// Weft runs the weft command against the cluster and returns what it printed.
func (a Artifacts) Weft(ctx context.Context, c *cluster.Cluster, args ...string) (string, error) {
	out, err := c.Command(ctx, append([]string{a.CLI}, args...)...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("weft %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// Install loads the images on every node and runs `weft install`, which waits
// until Weft is ready.
func (a Artifacts) Install(ctx context.Context, c *cluster.Cluster, args ...string) (string, error) {
	if err := c.LoadImage(ctx, a.Images...); err != nil {
		return "", fmt.Errorf("load the images: %w", err)
	}
	return a.Weft(ctx, c, append([]string{"install", "--image-registry", Registry, "--image-tag", Tag}, args...)...)
}
