// Package cluster runs a real two-node Kubernetes on one Linux machine, without
// a container engine and without changing the machine: the control plane and
// each node have namespaces and cgroups of their own, and all files are in one
// state directory.
//
// Pods and Services are dual stack, IPv4 first. Node 1 shows the machine's
// cgroup layout, and its kube-proxy uses nftables; node 2 shows cgroup version 2
// alone, and its kube-proxy uses iptables. Two clusters on one machine do not
// meet: whatever is named on the machine carries the cluster's token.
//
// The cluster's processes outlive the one that starts them. Up, Find and Down
// may be called by different processes, one after another or at once.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

// DefaultID is the id of a cluster that nobody named.
const DefaultID = "weft"

// Options choose a cluster. The zero value is the default cluster of the
// repository around the current directory.
type Options struct {
	// ID tells apart the clusters of one repository. Empty means DefaultID.
	ID string
	// State is the directory that holds all of the cluster. Empty means
	// out/cluster/<ID> in the repository.
	State string
	// Repo is the repository to build from. Empty means the one around the
	// current directory.
	Repo string
	// Out is told what is going on, step by step. Nil means nobody is.
	Out io.Writer
	// Timeout bounds every step but the builds. Zero means two minutes.
	Timeout time.Duration
}

// A Cluster is a cluster on this machine, running or not.
type Cluster struct {
	ID string
	// State is the directory that holds all of the cluster.
	State string
	// Kubeconfig is the path of an administrator's kubeconfig that works from
	// the machine itself.
	Kubeconfig string

	record       record
	controlGroup []nodespec.Hierarchy
}

// ErrNone says that the state directory holds no cluster.
var ErrNone = errors.New("there is no cluster")

// complete fills in the defaults.
func (o Options) complete() (Options, error) {
	if o.ID == "" {
		o.ID = DefaultID
	}
	if !regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$`).MatchString(o.ID) {
		return o, fmt.Errorf("cluster id %q: want at most 20 of a-z, 0-9 and -", o.ID)
	}
	if o.Repo == "" {
		var err error
		if o.Repo, err = findRepo(); err != nil {
			return o, err
		}
	}
	if o.State == "" {
		o.State = filepath.Join(o.Repo, "out", "cluster", o.ID)
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Timeout == 0 {
		o.Timeout = 2 * time.Minute
	}
	var err error
	o.State, err = filepath.Abs(o.State)
	return o, err
}

// findRepo returns the repository around the current directory.
func findRepo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "e2e", "cluster", "hyper", "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not inside the repository: run from there, or name it", dir)
		}
	}
}

// Find returns the cluster that the options name, without changing it; ErrNone
// if there is none.
func Find(o Options) (*Cluster, error) {
	o, err := o.complete()
	if err != nil {
		return nil, err
	}
	return find(o.State)
}

func find(state string) (*Cluster, error) {
	r, err := readRecord(state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNone, state)
	}
	if err != nil {
		return nil, err
	}
	return &Cluster{ID: r.ID, State: state, Kubeconfig: filepath.Join(state, "kubeconfig"), record: r}, nil
}

// Up returns the cluster that the options name, running and answering. It
// starts what does not run, be it everything or one process that has crashed,
// and leaves alone what does.
//
// The first Up of a machine builds Kubernetes, which takes minutes. When ctx
// ends early, what has been made stays and the next Up or Down deals with it.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	o, err := o.complete()
	if err != nil {
		return nil, err
	}
	u := &upper{options: o, progress: &progress{out: o.Out, total: 12}}
	if err := u.progress.step("check the machine", func() error { return checkMachine(ctx, u.progress) }); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, o.State, func() { fmt.Fprintln(o.Out, "another weft-cluster is at work on this cluster; waiting for it") })
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := u.up(ctx); err != nil {
		return nil, err
	}
	return u.cluster, nil
}

// An upper brings a cluster up.
type upper struct {
	options  Options
	progress *progress
	cluster  *Cluster
}

func (u *upper) up(ctx context.Context) error {
	var pr programs
	err := u.progress.step("build the programs", func() (err error) {
		pr, err = buildPrograms(ctx, u.options.Repo, u.progress)
		return err
	})
	if err != nil {
		return err
	}
	if err := u.open(ctx); err != nil {
		return err
	}
	c := u.cluster
	// A cluster that runs keeps the Kubernetes it has, if that is still there.
	if _, err := os.Stat(c.record.Programs.Hyper); err != nil || !c.runs() {
		c.record.Programs = pr
	}
	c.record.Programs.TestApp, c.record.Programs.Images = pr.TestApp, pr.Images
	if err := c.record.write(c.State); err != nil {
		return err
	}
	crashed := c.crashedNodes()
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"make the images", func(ctx context.Context) error { return u.images(ctx) }},
		{"make the network", func(context.Context) error { return c.makeNetwork() }},
		{"make the certificates", func(context.Context) error { return makePKI(filepath.Join(c.State, "pki")) }},
		{"start etcd and the nodes", func(ctx context.Context) error {
			if err := c.joinControl(); err != nil {
				return err
			}
			if err := c.startEtcd(ctx); err != nil || crashed {
				return err
			}
			return c.startNodes(ctx) // they wait for the API server
		}},
		{"start the API server", c.startAPIServer},
		{"open the API server to this machine", c.startForward},
		{"start the controllers and the scheduler", func(ctx context.Context) error {
			if err := c.startControllers(ctx); err != nil {
				return err
			}
			return c.waitControllers(ctx)
		}},
		{"wait for the nodes", func(ctx context.Context) error {
			if crashed {
				u.progress.note("a node has crashed; it is made anew")
				if err := c.forgetNodes(ctx); err != nil {
					return err
				}
				if err := c.startNodes(ctx); err != nil {
					return err
				}
			}
			return c.waitNodes(ctx)
		}},
		{"start CoreDNS", c.startDNS},
		{"wait until Services answer on every node", c.checkServices},
	} {
		if err := u.bounded(ctx, s.name, s.do); err != nil {
			return fmt.Errorf("%w\nlogs are in %s", err, c.LogDir())
		}
	}
	return nil
}

// bounded runs a step under the options' timeout.
func (u *upper) bounded(ctx context.Context, name string, f func(context.Context) error) error {
	timeout := fmt.Errorf("not done after %s", u.options.Timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, u.options.Timeout, timeout)
	defer cancel()
	return u.progress.step(name, func() error { return f(ctx) })
}

// open finds the cluster or begins one. What a cluster left when the machine
// was switched off is removed first.
func (u *upper) open(ctx context.Context) error {
	c, err := find(u.options.State)
	if err == nil {
		boot, err := bootID()
		if err != nil {
			return err
		}
		if c.record.Boot == boot {
			u.cluster = c
			return nil
		}
		if err := c.remove(ctx); err != nil {
			return fmt.Errorf("remove the cluster from before the machine's last start: %w", err)
		}
	} else if !errors.Is(err, ErrNone) {
		return err
	}
	if err := unused(u.options.State); err != nil {
		return err
	}
	r, err := newRecord(u.options.ID, u.options.Repo)
	if err != nil {
		return err
	}
	if err := r.write(u.options.State); err != nil {
		return err
	}
	u.cluster, err = find(u.options.State)
	return err
}

// runs reports whether any process of the cluster runs.
func (c *Cluster) runs() bool {
	for n := 1; n <= nodes; n++ {
		if c.process(NodeName(n)).Running() {
			return true
		}
	}
	for _, name := range controlProcesses() {
		if c.process(name).Running() {
			return true
		}
	}
	return false
}

// images makes the cluster's own images, and loads them into nodes that run
// already if they are new.
func (u *upper) images(ctx context.Context) error {
	c := u.cluster
	before := c.imageStamp()
	if err := makeImages(ctx, c.record.Programs, c.imageDir()); err != nil {
		return err
	}
	if before == "" || before == c.imageStamp() {
		return nil
	}
	u.progress.note("the images have changed: loading them")
	return c.loadAll(ctx)
}

// Down removes all of the cluster: its processes, namespaces, cgroups and
// files.
func (c *Cluster) Down(ctx context.Context) error {
	unlock, err := lock(ctx, c.State, nil)
	if err != nil {
		return err
	}
	defer unlock()
	// It may have been removed, and made anew, while we waited.
	now, err := find(c.State)
	if err != nil && !errors.Is(err, ErrNone) {
		return err
	}
	if err == nil {
		if err := now.remove(ctx); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(c.State, lockFile)); err != nil {
		return err
	}
	return os.Remove(c.State)
}

// remove removes all but the lock file.
func (c *Cluster) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("not done after a minute"))
	defer cancel()
	for n := 1; n <= nodes; n++ {
		if err := c.stop(ctx, NodeName(n)); err != nil {
			return err
		}
	}
	for _, name := range controlProcesses() {
		if err := c.stop(ctx, name); err != nil {
			return err
		}
	}
	if err := c.removeCgroups(ctx, ""); err != nil {
		return err
	}
	c.removeNetwork()
	entries, err := os.ReadDir(c.State)
	if err != nil {
		return err
	}
	for _, e := range entries {
		// The record goes last: until then a second try knows what to do.
		if e.Name() == lockFile || e.Name() == recordFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(c.State, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(filepath.Join(c.State, recordFile))
}
