package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// The control plane's processes, as their logs and pid files are called.
const (
	etcdName        = "etcd"
	apiserverName   = "kube-apiserver"
	controllersName = "kube-controller-manager"
	schedulerName   = "kube-scheduler"
	forwardName     = "forward"
)

// pki returns the path of a file of the cluster's certificates.
func (c *Cluster) pki(file string) string { return filepath.Join(c.State, "pki", file) }

// control describes a process of the control plane.
func (c *Cluster) control(name string, flags ...string) start {
	return start{
		name:    name,
		netns:   c.netnsPath("control"),
		cgroups: c.controlGroup,
		argv:    append([]string{c.record.Programs.Hyper, name}, flags...),
	}
}

// joinControl makes the control plane's cgroup. One hierarchy is enough: it is
// there to find the processes again, not to limit them.
func (c *Cluster) joinControl() error {
	hs, err := hierarchies()
	if err != nil {
		return err
	}
	one := hs[:1]
	for i, h := range hs {
		if h.Options == "" {
			one = hs[i : i+1]
		}
	}
	c.controlGroup, err = c.makeCgroups("control", one)
	return err
}

func (c *Cluster) startEtcd(ctx context.Context) error {
	return c.ensure(ctx, c.control(etcdName,
		"--data-dir="+filepath.Join(c.State, "etcd"),
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380",
		"--unsafe-no-fsync", // a test cluster does not survive the machine
		"--log-level=warn"))
}

func (c *Cluster) startAPIServer(ctx context.Context) error {
	err := c.ensure(ctx, c.control(apiserverName,
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address="+controlIP4, "--bind-address=::", fmt.Sprintf("--secure-port=%d", apiPort),
		"--service-cluster-ip-range="+serviceCIDR4+","+serviceCIDR6,
		"--client-ca-file="+c.pki("ca.crt"),
		"--tls-cert-file="+c.pki("apiserver.crt"), "--tls-private-key-file="+c.pki("apiserver.key"),
		"--kubelet-client-certificate="+c.pki("kubelet-client.crt"), "--kubelet-client-key="+c.pki("kubelet-client.key"),
		"--kubelet-certificate-authority="+c.pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+c.pki("sa.pub"), "--service-account-signing-key-file="+c.pki("sa.key"),
		"--requestheader-client-ca-file="+c.pki("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file="+c.pki("front-proxy.crt"), "--proxy-client-key-file="+c.pki("front-proxy.key"),
		// No kube-proxy runs beside the API server: it must find the pods behind
		// webhook Services itself.
		"--enable-aggregator-routing=true",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true", "--profiling=false"))
	if err != nil {
		return err
	}
	return c.waitFor(ctx, func(ctx context.Context) error {
		if err := c.alive(etcdName); err != nil {
			return stopWaiting(err)
		}
		if err := c.alive(apiserverName); err != nil {
			return stopWaiting(err)
		}
		client, err := c.client()
		if err != nil {
			return stopWaiting(err)
		}
		_, err = client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
}

func (c *Cluster) startControllers(ctx context.Context) error {
	config := func(name string) []string {
		file := c.pki(name + ".kubeconfig")
		return []string{
			"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file,
			"--leader-elect=false", "--bind-address=127.0.0.1",
			// The usual 20 a second make the controllers take six seconds to start.
			"--kube-api-qps=500", "--kube-api-burst=1000",
		}
	}
	if err := c.ensure(ctx, c.control(controllersName, append(config("controllers"),
		"--use-service-account-credentials=true",
		"--service-account-private-key-file="+c.pki("sa.key"), "--root-ca-file="+c.pki("ca.crt"),
		"--cluster-signing-cert-file="+c.pki("ca.crt"), "--cluster-signing-key-file="+c.pki("ca.key"),
		"--allocate-node-cidrs=false",
		"--service-cluster-ip-range="+serviceCIDR4+","+serviceCIDR6,
	)...)); err != nil {
		return err
	}
	return c.ensure(ctx, c.control(schedulerName, config("scheduler")...))
}

// startForward opens the API server to the machine, on a port of 127.0.0.1
// only, and writes the kubeconfig that goes there.
func (c *Cluster) startForward(ctx context.Context) error {
	address := filepath.Join(c.State, "forward.address")
	was, err := os.ReadFile(address)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The old port first: kubeconfigs out there name it.
	for _, listen := range []string{strings.TrimSpace(string(was)), "127.0.0.1:0"} {
		if listen == "" {
			continue
		}
		if err = c.forwardOn(ctx, listen, address); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	b, err := os.ReadFile(address)
	if err != nil {
		return err
	}
	return writeKubeconfig(c.Kubeconfig, filepath.Join(c.State, "pki"), "admin", "https://"+string(b))
}

func (c *Cluster) forwardOn(ctx context.Context, listen, address string) error {
	if err := c.ensure(ctx, start{
		name: forwardName, cgroups: c.controlGroup,
		argv: []string{
			c.record.Programs.Node, "forward", "-listen", listen, "-netns", c.netnsPath("control"),
			"-to", fmt.Sprintf("%s:%d", controlIP4, apiPort), "-address", address,
		},
	}); err != nil {
		return err
	}
	return c.waitFor(ctx, func(context.Context) error {
		if err := c.alive(forwardName); err != nil {
			return stopWaiting(err)
		}
		_, err := os.Stat(address)
		return err
	})
}

// controlProcesses are in the order in which they are stopped.
func controlProcesses() []string {
	return []string{forwardName, schedulerName, controllersName, apiserverName, etcdName}
}
