package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// deliver pushes an image, one v1.Image for each platform, or writes it to path
// as a docker archive or an OCI layout.
func (c config) deliver(ctx context.Context, out io.Writer, tag name.Tag, path string, images []v1.Image) error {
	switch {
	case c.push:
		digest, err := c.pushTo(ctx, tag, images)
		if err != nil {
			return fmt.Errorf("push %s: %w", tag, err)
		}
		fmt.Fprintf(out, "pushed %s@%s\n", tag, digest)
		return nil
	case c.layout:
		if err := c.writeLayout(tag, path, images); err != nil {
			return fmt.Errorf("write OCI layout %s: %w", path, err)
		}
	default:
		if err := writeArchive(tag, path, images[0]); err != nil {
			return fmt.Errorf("write archive %s: %w", path, err)
		}
	}
	digest, err := images[0].Digest()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s: %s %s\n", path, tag, digest)
	return nil
}

// writeArchive writes the archive whole or not at all.
func writeArchive(tag name.Tag, path string, img v1.Image) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	next := path + ".next"
	defer os.Remove(next)
	if err := tarball.WriteToFile(next, tag, img); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// index makes one name for the images of several platforms.
func (c config) index(images []v1.Image) v1.ImageIndex {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, img := range images {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &c.platforms[i]},
		})
	}
	return index
}

func (c config) writeLayout(tag name.Tag, path string, images []v1.Image) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	l, err := layout.Write(path, empty.Index)
	if err != nil {
		return err
	}
	// org.opencontainers.image.ref.name is how importers learn the name.
	return l.AppendIndex(c.index(images), layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": tag.TagStr(),
		"io.containerd.image.name":          tag.Name(),
	}))
}

func (c config) pushTo(ctx context.Context, tag name.Tag, images []v1.Image) (v1.Hash, error) {
	if c.insecure {
		var err error
		if tag, err = name.NewTag(tag.Name(), name.Insecure); err != nil {
			return v1.Hash{}, err
		}
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
	if len(images) == 1 {
		if err := remote.Write(tag, images[0], options...); err != nil {
			return v1.Hash{}, err
		}
		return images[0].Digest()
	}
	index := c.index(images)
	if err := remote.WriteIndex(tag, index, options...); err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}
