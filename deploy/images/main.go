// Images builds Weft's container images, without Docker: static binaries on an
// empty base, the same bytes from the same source.
//
//	go run ./deploy/images -tag v1.0.0 -o out/images
//	go run ./deploy/images -tag v1.0.0 -platform linux/amd64,linux/arm64 -push -registry ghcr.io/weft-mesh
//
// With -name it packs one image of files that are there already; the test
// cluster makes its own images so:
//
//	go run ./deploy/images -name weft.test/app:1 -entrypoint /bin/app -add ./app:/bin/app -o app.tar
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A config is what the command line asks for.
type config struct {
	out       string
	registry  string
	tag       string
	push      bool
	insecure  bool
	layout    bool
	platforms []v1.Platform
	only      []string

	// one image of given files
	name       string
	entrypoint string
	args       []string
	user       string
	files      []file
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	c, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err == nil {
		err = run(ctx, c, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func parse(args []string, complain io.Writer) (config, error) {
	var c config
	var platforms, only string
	fs := flag.NewFlagSet("images", flag.ContinueOnError)
	fs.SetOutput(complain)
	fs.StringVar(&c.out, "o", "out/images", "directory for the archives; with -name the archive's file")
	fs.StringVar(&c.registry, "registry", "ghcr.io/weft-mesh", "registry and prefix of the images' names")
	fs.StringVar(&c.tag, "tag", "dev", "tag of the images, and the version the programs report")
	fs.BoolVar(&c.push, "push", false, "push to the registry instead of writing archives; uses docker's credentials")
	fs.BoolVar(&c.insecure, "insecure", false, "push over plain HTTP")
	fs.BoolVar(&c.layout, "oci", false, "write one OCI layout directory for each image, which holds every platform, instead of docker archives")
	fs.StringVar(&platforms, "platform", "linux/"+goarch(), "platforms, separated by commas; more than one needs -push or -oci")
	fs.StringVar(&only, "only", "", "build only these of the release's images, separated by commas")
	fs.StringVar(&c.name, "name", "", "pack one image of this name from -add and -link, instead of the release's")
	fs.StringVar(&c.entrypoint, "entrypoint", "", "with -name: the program to run, a path in the image")
	fs.Func("arg", "with -name: a default argument of the program; repeat for more", func(s string) error {
		c.args = append(c.args, s)
		return nil
	})
	fs.StringVar(&c.user, "user", "0", "with -name: the user to run as, as uid or uid:gid")
	fs.Func("add", "with -name: put a file into the image, as LOCAL:PATH; repeat for more", func(s string) error {
		return c.add(s, false)
	})
	fs.Func("link", "with -name: make a symbolic link in the image, as TARGET:PATH; repeat for more", func(s string) error {
		return c.add(s, true)
	})
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if fs.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q: see -help", fs.Arg(0))
	}
	if only != "" {
		c.only = strings.Split(only, ",")
	}
	for p := range strings.SplitSeq(platforms, ",") {
		parsed, err := v1.ParsePlatform(p)
		if err != nil || parsed.OS == "" || parsed.Architecture == "" {
			return c, fmt.Errorf("platform %q: want OS/ARCHITECTURE, such as linux/arm64", p)
		}
		c.platforms = append(c.platforms, *parsed)
	}
	return c, c.validate()
}

// add notes one -add or -link.
func (c *config) add(s string, link bool) error {
	from, to, ok := strings.Cut(s, ":")
	if !ok || from == "" || !strings.HasPrefix(to, "/") {
		return fmt.Errorf("%q: want FROM:PATH with an absolute PATH", s)
	}
	f := file{path: to}
	if link {
		f.link = from
	} else {
		f.local = from
	}
	c.files = append(c.files, f)
	return nil
}

func (c config) validate() error {
	var errs []error
	if len(c.platforms) > 1 && !c.push && !c.layout {
		errs = append(errs, errors.New("a docker archive holds one platform: use -push or -oci for several"))
	}
	if c.name != "" {
		if _, err := name.NewTag(c.name, name.StrictValidation, name.WeakValidation); err != nil {
			errs = append(errs, fmt.Errorf("-name: %w", err))
		}
		if c.entrypoint == "" {
			errs = append(errs, errors.New("-name needs -entrypoint"))
		}
		if len(c.files) == 0 {
			errs = append(errs, errors.New("-name needs at least one -add"))
		}
		if len(c.platforms) > 1 {
			errs = append(errs, errors.New("-name packs files of one platform"))
		}
		return errors.Join(errs...)
	}
	if c.entrypoint != "" || len(c.files) > 0 || len(c.args) > 0 {
		errs = append(errs, errors.New("-entrypoint, -arg, -add and -link need -name"))
	}
	for _, n := range c.only {
		if _, ok := find(n); !ok {
			errs = append(errs, fmt.Errorf("-only: no image %q: want some of %s", n, strings.Join(names(), ", ")))
		}
	}
	return errors.Join(errs...)
}

func run(ctx context.Context, c config, out io.Writer) error {
	if c.name != "" {
		tag, err := name.NewTag(c.name)
		if err != nil {
			return err
		}
		img, err := pack(c.platforms[0], c.user, append([]string{c.entrypoint}, c.args...), c.files)
		if err != nil {
			return fmt.Errorf("pack %s: %w", c.name, err)
		}
		return c.deliver(ctx, out, tag, c.out, []v1.Image{img})
	}
	work, err := os.MkdirTemp("", "weft-images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	for _, r := range release() {
		if !c.wants(r.name) {
			continue
		}
		tag, err := name.NewTag(c.registry + "/" + r.name + ":" + c.tag)
		if err != nil {
			return err
		}
		var images []v1.Image
		for _, p := range c.platforms {
			img, err := r.build(ctx, work, c.tag, p)
			if err != nil {
				return fmt.Errorf("build %s for %s: %w", r.name, p, err)
			}
			images = append(images, img)
		}
		file := filepath.Join(c.out, r.name)
		if !c.layout {
			file += ".tar"
		}
		if err := c.deliver(ctx, out, tag, file, images); err != nil {
			return err
		}
	}
	return nil
}

func (c config) wants(image string) bool {
	for _, n := range c.only {
		if n == image {
			return true
		}
	}
	return len(c.only) == 0
}
