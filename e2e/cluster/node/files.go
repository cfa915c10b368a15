package main

import (
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

const (
	containerdSocket = "/run/containerd/containerd.sock"
	containerdConfig = "/etc/containerd/config.toml"
	kubeletConfig    = "/etc/kubernetes/kubelet.yaml"
	proxyConfig      = "/etc/kubernetes/kube-proxy.yaml"
	networkConfig    = "/etc/cni/net.d/10-pods.conflist"
)

// Templates over nodespec.Node.
var (
	//go:embed containerd.toml
	containerdText string
	//go:embed kubelet.yaml
	kubeletText string
	//go:embed kube-proxy.yaml
	proxyText string
	//go:embed network.conflist
	networkText string
)

// writeFiles writes the node's own configuration into its private /etc.
func writeFiles(n nodespec.Node) error {
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	for _, a := range n.Addresses {
		hosts += a + " " + n.Name + "\n"
	}
	for path, text := range map[string]string{
		"/etc/hosts":       hosts,
		"/etc/hostname":    n.Name + "\n",
		"/etc/resolv.conf": "", // no names outside the cluster
		containerdConfig:   containerdText,
		kubeletConfig:      kubeletText,
		proxyConfig:        proxyText,
		networkConfig:      networkText,
	} {
		if _, err := os.Stat(path); path == networkConfig && err == nil {
			continue // it is on the node's disk, and plugins may be chained to it
		}
		if err := writeTemplate(path, text, n); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return nil
}

func writeTemplate(path, text string, n nodespec.Node) error {
	t, err := template.New(filepath.Base(path)).Funcs(template.FuncMap{"join": strings.Join}).Parse(text)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// A file that is mounted or linked from elsewhere on the machine, as
	// /etc/resolv.conf often is, must not be written through.
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := t.Execute(f, n); err != nil {
		return err
	}
	return f.Close()
}
