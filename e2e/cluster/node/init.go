package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// initNode is process 1 of a node: it builds the node around itself and then
// keeps containerd, the kubelet and kube-proxy running. It ends only by
// SIGKILL from outside, which takes the whole node along.
func initNode(args []string) error {
	if len(args) != 1 {
		return errors.New("init: want the node's description")
	}
	n, err := nodespec.Read(args[0])
	if err != nil {
		return err
	}
	if err := os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
		return err
	}
	c := newChildren()
	for _, step := range []func() error{
		func() error { return buildRoot(n) },
		func() error { return unix.Sethostname([]byte(n.Name)) },
		func() error { return setSysctls() },
		func() error { return writeFiles(n) },
		func() error { return hideSysctls() },
		func() error { return delegate(n) },
		func() error { return linkPlugins(n) },
		func() error { return linkRunc(n) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	say("%s: file system and settings are ready", n.Name)
	go c.reap()
	return serve(n, c)
}

// serve starts the node's programs in order and never returns unless one of
// them cannot be started at all.
func serve(n nodespec.Node, c *children) error {
	log := func(name string) string { return filepath.Join(n.LogDir, n.Name+"-"+name+".log") }
	containerd, err := exec.LookPath("containerd")
	if err != nil {
		return err
	}
	go c.keep("containerd", log("containerd"), containerd, "--config", containerdConfig, "--log-level", "info")
	if err := waitContainerd(c, log("ctr")); err != nil {
		return err
	}
	if err := importImages(n, c, log("ctr")); err != nil {
		return err
	}
	say("images imported")
	if err := waitAPIServer(n); err != nil {
		return err
	}
	say("API server is ready")
	go c.keep("kube-proxy", log("kube-proxy"), n.Hyper, "kube-proxy", "--config="+proxyConfig, "-v=2")
	c.keep("kubelet", log("kubelet"), n.Hyper, "kubelet", "--config="+kubeletConfig, "--kubeconfig="+n.Kubeconfig,
		"--hostname-override="+n.Name, "--node-ip="+strings.Join(n.Addresses, ","), "-v=2")
	return nil
}

// waitContainerd waits until containerd answers.
func waitContainerd(c *children, log string) error {
	ctr, err := exec.LookPath("ctr")
	if err != nil {
		return err
	}
	deadline := time.Now().Add(time.Minute)
	for {
		if _, err = os.Stat(containerdSocket); err == nil {
			if err = c.run(log, ctr, "version"); err == nil {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("containerd does not answer: %w", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// importImages gives containerd every image archive the cluster holds that a
// start of the node before this one has not imported yet.
func importImages(n nodespec.Node, c *children, log string) error {
	ctr, err := exec.LookPath("ctr")
	if err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(n.ImageDir, "*.tar"))
	if err != nil {
		return err
	}
	const done = "/var/lib/containerd/weft-imported"
	if err := os.MkdirAll(done, 0o755); err != nil {
		return err
	}
	for _, a := range archives {
		info, err := os.Stat(a)
		if err != nil {
			return err
		}
		mark := filepath.Join(done, fmt.Sprintf("%s-%d-%d", filepath.Base(a), info.Size(), info.ModTime().UnixNano()))
		if _, err := os.Stat(mark); err == nil {
			continue
		}
		if err := c.run(log, ctr, "--namespace", "k8s.io", "images", "import", a); err != nil {
			return fmt.Errorf("import image: %w", err)
		}
		if err := os.WriteFile(mark, nil, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// waitAPIServer waits, without end, until the API server is ready. A kubelet
// started earlier backs off for seconds at a time.
func waitAPIServer(n nodespec.Node) error {
	pem, err := os.ReadFile(n.ClientCA)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
	}}
	for {
		if ready(&client, "https://"+n.APIServer+"/readyz") {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func ready(client *http.Client, url string) bool {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// setSysctls sets what a node needs of its network namespace. All of these are
// per namespace: nothing here reaches the machine.
func setSysctls() error {
	for path, value := range map[string]string{
		"net/ipv4/ip_forward":          "1",
		"net/ipv6/conf/all/forwarding": "1",
	} {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

// hideSysctls covers those sysctls that the kubelet insists on, and that are
// the whole machine's, with files that hold what it wants to see.
func hideSysctls() error {
	const dir = "/run/weft-node/sysctl"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for path, value := range map[string]string{
		"vm/overcommit_memory":      "1",
		"vm/panic_on_oom":           "0",
		"kernel/panic":              "10",
		"kernel/panic_on_oops":      "1",
		"kernel/keys/root_maxkeys":  "1000000",
		"kernel/keys/root_maxbytes": "25000000",
	} {
		file := filepath.Join(dir, strings.ReplaceAll(path, "/", "_"))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := bind(file, "/proc/sys/"+path, 0); err != nil {
			return err
		}
	}
	return nil
}

// delegate makes the controllers of a version 2 hierarchy usable by the node's
// pods: a group that hands controllers on may hold no process itself.
func delegate(n nodespec.Node) error {
	if !n.UnifiedOnly {
		return nil
	}
	const top = "/sys/fs/cgroup"
	if err := os.Mkdir(top+"/init", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(top+"/init/cgroup.procs", []byte("0"), 0); err != nil {
		return fmt.Errorf("leave the node's top cgroup: %w", err)
	}
	b, err := os.ReadFile(top + "/cgroup.controllers")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(b)) {
		if err := os.WriteFile(top+"/cgroup.subtree_control", []byte("+"+name), 0); err != nil {
			return fmt.Errorf("enable cgroup controller %s: %w", name, err)
		}
	}
	return nil
}

// linkPlugins fills /opt/cni/bin, which stays writable for chained plugins,
// with the machine's CNI plugins.
func linkPlugins(n nodespec.Node) error {
	entries, err := os.ReadDir(n.PluginDir)
	if err != nil {
		return fmt.Errorf("find CNI plugins: %w", err)
	}
	for _, e := range entries {
		err := os.Symlink(filepath.Join(n.PluginDir, e.Name()), filepath.Join("/opt/cni/bin", e.Name()))
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// linkRunc makes the names under which containerd and the wrapper find runc.
func linkRunc(n nodespec.Node) error {
	if err := os.Symlink(n.Runc, "/run/weft-node/"+runcReal); err != nil {
		return err
	}
	return os.Symlink(n.Self, "/run/weft-node/"+runcName)
}
