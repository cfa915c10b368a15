package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// imageDir holds the archives that a node imports when it starts.
func (c *Cluster) imageDir() string { return filepath.Join(c.State, "images") }

// imageStamp tells whether the image archives have changed.
func (c *Cluster) imageStamp() string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(c.imageDir(), "*.tar"))
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			fmt.Fprintln(&b, f, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String()
}

// LoadImage imports image archives (docker-archive or OCI) into every node.
// Pods use it with imagePullPolicy Never or IfNotPresent. The cluster keeps a
// copy for a node that has to be made anew.
func (c *Cluster) LoadImage(ctx context.Context, archives ...string) error {
	for _, a := range archives {
		if err := c.loadImage(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) loadImage(ctx context.Context, archive string) error {
	kept := filepath.Join(c.imageDir(), filepath.Base(archive))
	if !strings.HasSuffix(kept, ".tar") {
		kept += ".tar"
	}
	if err := copyFile(archive, kept); err != nil {
		return fmt.Errorf("load image: %w", err)
	}
	return c.load(ctx, kept)
}

func (c *Cluster) loadAll(ctx context.Context) error {
	files, err := filepath.Glob(filepath.Join(c.imageDir(), "*.tar"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := c.load(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) load(ctx context.Context, archive string) error {
	for n := 1; n <= nodes; n++ {
		if !c.process(NodeName(n)).Running() {
			continue // it imports the archive when it starts
		}
		if err := quietly(c.NodeCommand(ctx, NodeName(n), "ctr", "--namespace", "k8s.io", "images", "import", archive)); err != nil {
			return fmt.Errorf("load image %s into %s: %w", filepath.Base(archive), NodeName(n), err)
		}
	}
	return nil
}
