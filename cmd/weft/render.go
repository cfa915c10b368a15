package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/releaseutil"
	"helm.sh/helm/v3/pkg/strvals"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	"github.com/weft-mesh/weft/deploy"
)

// Settings are what the user says about an installation.
type settings struct {
	files    []string // values files, later ones win
	sets     []string // key=value, after the files
	registry string
	tag      string
}

// values merges what the user said, without the chart's defaults.
func (s settings) values() (map[string]any, error) {
	v := map[string]any{}
	for _, name := range s.files {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read values: %w", err)
		}
		add, err := chartutil.ReadValues(b)
		if err != nil {
			return nil, fmt.Errorf("read values of %s: %w", name, err)
		}
		v = chartutil.CoalesceTables(add, v)
	}
	for _, set := range s.sets {
		if err := strvals.ParseInto(set, v); err != nil {
			return nil, fmt.Errorf("read --set %s: %w: want key=value, for example ztunnel.sameNode=direct", set, err)
		}
	}
	// Flags of their own are text as it is: a tag may look like a number.
	image := map[string]any{}
	if s.registry != "" {
		image["registry"] = s.registry
	}
	if s.tag != "" {
		image["tag"] = s.tag
	}
	return chartutil.CoalesceTables(map[string]any{"image": image}, v), nil
}

// A rendering is the chart's objects, in the order in which to apply them.
type rendering struct {
	crds    []*unstructured.Unstructured
	objects []*unstructured.Unstructured
}

// all returns everything that an empty cluster needs, with the namespace.
func (r rendering) all(namespace string) []*unstructured.Unstructured {
	return slices.Concat(r.crds, []*unstructured.Unstructured{namespaceObject(namespace)}, r.objects)
}

// newestKube is the newest Kubernetes that the chart is tested with.
const newestKube = "v1.36.0"

// render renders the chart for a namespace and Kubernetes version ("v1.36.3";
// empty for the newest that the chart is tested with).
func render(namespace, kubeVersion string, s settings) (rendering, error) {
	c, err := loadChart()
	if err != nil {
		return rendering{}, err
	}
	if version != "dev" {
		c.Metadata.AppVersion = version
	}
	user, err := s.values()
	if err != nil {
		return rendering{}, err
	}
	caps := chartutil.DefaultCapabilities.Copy()
	kubeVersion = cmp.Or(kubeVersion, newestKube)
	kv, err := chartutil.ParseKubeVersion(kubeVersion)
	if err != nil {
		return rendering{}, fmt.Errorf("read the version of Kubernetes %q: %w", kubeVersion, err)
	}
	caps.KubeVersion = *kv
	if want := c.Metadata.KubeVersion; !chartutil.IsCompatibleRange(want, kv.Version) {
		return rendering{}, fmt.Errorf("the cluster is Kubernetes %s and Weft needs %s: upgrade the cluster", kubeVersion, want)
	}
	release := chartutil.ReleaseOptions{Name: "weft", Namespace: namespace, IsInstall: true}
	all, err := chartutil.ToRenderValues(c, user, release, caps)
	if err != nil {
		return rendering{}, fmt.Errorf("check the values: %w", err)
	}
	all["Release"].(map[string]any)["Service"] = "weft"
	files, err := engine.Render(c, all)
	if err != nil {
		return rendering{}, fmt.Errorf("render the chart: %w", plain(err))
	}
	var r rendering
	for _, crd := range c.CRDObjects() {
		os, err := objects(string(crd.File.Data))
		if err != nil {
			return rendering{}, fmt.Errorf("read %s: %w", crd.Name, err)
		}
		r.crds = append(r.crds, os...)
	}
	_, sorted, err := releaseutil.SortManifests(files, caps.APIVersions, releaseutil.InstallOrder)
	if err != nil {
		return rendering{}, fmt.Errorf("read the rendered chart: %w", err)
	}
	for _, m := range sorted {
		os, err := objects(m.Content)
		if err != nil {
			return rendering{}, fmt.Errorf("read %s: %w", m.Name, err)
		}
		r.objects = append(r.objects, os...)
	}
	return r, nil
}

// loadChart reads the chart that is part of this binary.
func loadChart() (*chart.Chart, error) {
	var files []*loader.BufferedFile
	tree := deploy.Chart()
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(tree, name)
		files = append(files, &loader.BufferedFile{Name: name, Data: b})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the built-in chart: %w", err)
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		return nil, fmt.Errorf("read the built-in chart: %w", err)
	}
	return c, nil
}

// plain takes out of a template error the part that a user can act on: what
// the chart itself says with fail.
func plain(err error) error {
	if _, rest, ok := strings.Cut(err.Error(), "execution error at ("); ok {
		if _, said, ok := strings.Cut(rest, "): "); ok {
			return errors.New(said)
		}
	}
	return err
}

// objects reads the documents of a YAML text.
func objects(text string) ([]*unstructured.Unstructured, error) {
	var os []*unstructured.Unstructured
	d := utilyaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := d.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return os, nil
		}
		if err != nil {
			return nil, err
		}
		if len(o.Object) > 0 {
			os = append(os, o)
		}
	}
}
