package main

import (
	"archive/tar"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// program writes something to put into images and returns its path.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "app")
	if err := os.WriteFile(path, []byte("not really a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestParseRefuses(t *testing.T) {
	for _, r := range []struct {
		name string
		args []string
		want string
	}{
		{"several platforms in one archive", []string{"-platform", "linux/amd64,linux/arm64"}, "-push or -oci"},
		{"a platform without architecture", []string{"-platform", "linux"}, "OS/ARCHITECTURE"},
		{"an image nobody knows", []string{"-only", "weft-moon"}, "weft-control, weft-node, ztunnel, waypoint"},
		{"files without a name", []string{"-add", "a:/b"}, "need -name"},
		{"a name without files", []string{"-name", "x/y:1", "-entrypoint", "/b"}, "-add"},
		{"a name without program", []string{"-name", "x/y:1", "-add", "a:/b"}, "-entrypoint"},
		{"a path that is not absolute", []string{"-name", "x/y:1", "-add", "a:b"}, "absolute"},
		{"a name that is none", []string{"-name", "X Y", "-entrypoint", "/b", "-add", "a:/b"}, "-name"},
		{"left-over arguments", []string{"what"}, "unexpected argument"},
	} {
		t.Run(r.name, func(t *testing.T) {
			_, err := parse(r.args, io.Discard)
			if err == nil || !strings.Contains(err.Error(), r.want) {
				t.Errorf("got %v, want an error with %q", err, r.want)
			}
		})
	}
}

func TestOneImage(t *testing.T) {
	app, out := program(t), filepath.Join(t.TempDir(), "x.tar")
	c, err := parse([]string{"-name", "weft.test/app:1", "-entrypoint", "/bin/app", "-arg", "serve", "-user", "7:8",
		"-add", app + ":/bin/app", "-link", "app:/bin/other", "-o", out, "-platform", "linux/arm64"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), c, io.Discard); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("weft.test/app:1")
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(out, &tag)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(append(config.Config.Entrypoint, config.Config.Cmd...), " "); got != "/bin/app serve" {
		t.Errorf("command: got %q", got)
	}
	if config.Architecture != "arm64" || config.Config.User != "7:8" || !config.Created.Equal(time.Unix(0, 0)) {
		t.Errorf("got %s, user %s, created %s; want arm64, 7:8, 1970", config.Architecture, config.Config.User, config.Created)
	}
	files := contents(t, img)
	if h := files["bin/app"]; h == nil || h.Mode != 0o755 || h.Size == 0 {
		t.Errorf("bin/app: got %+v, want an executable file", h)
	}
	if h := files["bin/other"]; h == nil || h.Linkname != "app" {
		t.Errorf("bin/other: got %+v, want a link to app", h)
	}
	if h := files["tmp/"]; h == nil || h.Mode != 0o1777 {
		t.Errorf("tmp: got %+v, want mode 1777", h)
	}
	if files["etc/passwd"] == nil {
		t.Error("no etc/passwd")
	}
}

// contents lists an image's files.
func contents(t *testing.T, img v1.Image) map[string]*tar.Header {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*tar.Header{}
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			files[h.Name] = h
		}
		r.Close()
	}
	return files
}

func TestReproducible(t *testing.T) {
	digest := func() v1.Hash {
		img, err := pack(v1.Platform{OS: "linux", Architecture: "amd64"}, "0", []string{"/bin/app"}, []file{{path: "/bin/app", local: program(t)}})
		if err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if a, b := digest(), digest(); a != b {
		t.Errorf("the same file at two places and times made two images, %s and %s", a, b)
	}
}

// twoPlatforms packs one image for each of two platforms.
func twoPlatforms(t *testing.T) (config, []v1.Image) {
	t.Helper()
	c := config{platforms: []v1.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}}}
	var images []v1.Image
	for _, p := range c.platforms {
		img, err := pack(p, nonroot, []string{"/bin/app"}, []file{{path: "/bin/app", local: program(t)}})
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, img)
	}
	return c, images
}

func TestPushSeveralPlatforms(t *testing.T) {
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	c, images := twoPlatforms(t)
	c.push, c.insecure = true, true
	tag, err := name.NewTag(strings.TrimPrefix(s.URL, "http://") + "/weft/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.deliver(t.Context(), io.Discard, tag, "", images); err != nil {
		t.Fatal(err)
	}
	for i, p := range c.platforms {
		img, err := remote.Image(tag, remote.WithPlatform(p))
		if err != nil {
			t.Fatal(err)
		}
		got, _ := img.Digest()
		if want, _ := images[i].Digest(); got != want {
			t.Errorf("%s: pulled %s, want %s", p, got, want)
		}
	}
}

func TestLayoutSeveralPlatforms(t *testing.T) {
	c, images := twoPlatforms(t)
	tag, err := name.NewTag("weft.test/app:1")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "app")
	for range 2 { // a second time replaces the first
		if err := c.writeLayout(tag, dir, images); err != nil {
			t.Fatal(err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	top, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(top.Manifests) != 1 {
		t.Fatalf("got %d entries, want one index", len(top.Manifests))
	}
	inner, err := index.ImageIndex(top.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	m, err := inner.IndexManifest()
	if err != nil || len(m.Manifests) != 2 || m.Manifests[1].Platform.Architecture != "arm64" {
		t.Errorf("got %+v, %v; want an image for each platform", m, err)
	}
}

func TestArchiveIsWholeOrAbsent(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.tar")
	c, err := parse([]string{"-name", "x/y:1", "-entrypoint", "/b", "-add", "/does/not/exist:/b", "-o", out}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), c, io.Discard); err == nil {
		t.Error("an image of a missing file was made")
	}
	if left, _ := filepath.Glob(out + "*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
