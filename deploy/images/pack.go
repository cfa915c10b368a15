package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// A file is something to put into an image: a local file, a symbolic link, or a
// text.
type file struct {
	path  string // in the image, absolute
	local string
	link  string
	text  string
}

// pack makes an image of one layer that runs entrypoint. Everything in it is
// dated 1970, so that equal files make an equal image.
func pack(p v1.Platform, user string, entrypoint []string, files []file) (v1.Image, error) {
	files = append([]file{
		{path: "/etc/passwd", text: "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n"},
		{path: "/etc/group", text: "root:x:0:\nnonroot:x:65532:\n"},
	}, files...)
	content, err := layer(files)
	if err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
	if err != nil {
		return nil, err
	}
	epoch := v1.Time{Time: time.Unix(0, 0).UTC()}
	img, err := mutate.Append(empty.Image, mutate.Addendum{Layer: l, History: v1.History{Created: epoch, CreatedBy: "weft deploy/images"}})
	if err != nil {
		return nil, err
	}
	base, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	c := base.DeepCopy()
	c.OS, c.Architecture, c.Variant = p.OS, p.Architecture, p.Variant
	c.Created = epoch
	c.Config = v1.Config{
		Entrypoint: entrypoint[:1],
		Cmd:        entrypoint[1:],
		User:       user,
		Env:        []string{"PATH=/bin"},
		WorkingDir: "/",
	}
	return mutate.ConfigFile(img, c)
}

// layer writes files, and the directories they lie in, as a tar stream.
func layer(files []file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	made := map[string]bool{"": true, ".": true}
	// Mount points that a runtime otherwise has to make in a read-only root.
	for _, d := range []string{"bin", "dev", "etc", "proc", "run", "sys", "tmp", "var/run"} {
		if err := directory(w, made, d); err != nil {
			return nil, err
		}
	}
	for _, f := range files {
		name := strings.TrimPrefix(path.Clean(f.path), "/")
		if err := directory(w, made, path.Dir(name)); err != nil {
			return nil, err
		}
		if err := put(w, name, f); err != nil {
			return nil, fmt.Errorf("put %s: %w", f.path, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// directory writes dir and those above it, once.
func directory(w *tar.Writer, made map[string]bool, dir string) error {
	if made[dir] {
		return nil
	}
	if err := directory(w, made, path.Dir(dir)); err != nil {
		return err
	}
	made[dir] = true
	h := header(dir+"/", tar.TypeDir, 0o755)
	if dir == "tmp" {
		h.Mode = 0o1777
	}
	return w.WriteHeader(h)
}

// put writes one file.
func put(w *tar.Writer, name string, f file) error {
	if f.link != "" {
		h := header(name, tar.TypeSymlink, 0o777)
		h.Linkname = f.link
		return w.WriteHeader(h)
	}
	content, mode := []byte(f.text), int64(0o644)
	if f.local != "" {
		info, err := os.Stat(f.local)
		if err != nil {
			return err
		}
		if info.Mode()&0o111 != 0 {
			mode = 0o755
		}
		if content, err = os.ReadFile(f.local); err != nil {
			return err
		}
	}
	h := header(name, tar.TypeReg, mode)
	h.Size = int64(len(content))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

func header(name string, kind byte, mode int64) *tar.Header {
	return &tar.Header{Name: name, Typeflag: kind, Mode: mode, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
}
