package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// nonroot is the user of programs that need no rights; nobody has a password.
const nonroot = "65532:65532"

// A releaseImage is an image of Weft: programs of cmd/, the first of which
// runs.
type releaseImage struct {
	name     string
	programs []string
	user     string
}

// release lists Weft's images. The node's programs run as user 0 because only
// that user keeps capabilities across exec; the chart takes away all but a few.
func release() []releaseImage {
	return []releaseImage{
		{name: "weft-control", programs: []string{"weft-control"}, user: nonroot},
		{name: "weft-node", programs: []string{"weft-node", "weft-cni"}, user: "0:0"},
		{name: "ztunnel", programs: []string{"ztunnel"}, user: "0:0"},
		{name: "waypoint", programs: []string{"waypoint"}, user: nonroot},
	}
}

func find(image string) (releaseImage, bool) {
	for _, r := range release() {
		if r.name == image {
			return r, true
		}
	}
	return releaseImage{}, false
}

func names() []string {
	var ns []string
	for _, r := range release() {
		ns = append(ns, r.name)
	}
	return ns
}

func goarch() string { return runtime.GOARCH }

// build compiles the image's programs for a platform and packs them. Work is a
// directory for them.
func (r releaseImage) build(ctx context.Context, work, version string, p v1.Platform) (v1.Image, error) {
	var files []file
	for _, program := range r.programs {
		out := filepath.Join(work, p.Architecture, program)
		if err := compile(ctx, program, out, version, p); err != nil {
			return nil, err
		}
		files = append(files, file{path: "/bin/" + program, local: out})
	}
	return pack(p, r.user, []string{"/bin/" + r.programs[0]}, files)
}

// compile builds ./cmd/<program> as a static binary that tells nothing of where
// it was built.
func compile(ctx context.Context, program, out, version string, p v1.Platform) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X main.version="+version, "-o", out, "./cmd/"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Architecture, "GOWORK=off")
	if _, err := os.Stat(filepath.Join("cmd", program)); err != nil {
		return fmt.Errorf("%w: run this in the top directory of the repository", err)
	}
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/%s: %w\n%s", program, err, bytes.TrimSpace(msg))
	}
	return nil
}
