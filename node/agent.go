package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/netns"
	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/node/capture"
	"github.com/weft-mesh/weft/node/cni"
)

// The ways to treat the connections that a running pod has when it is captured.
const (
	ExistingKeep  = "keep"  // they go on outside the mesh until they end
	ExistingReset = "reset" // they are reset, and come back through the mesh
)

// A Config is what an Agent needs. Zero fields have the defaults that Validate
// does not complain about: see Defaults.
type Config struct {
	Node      string // this node's name in Kubernetes
	Namespace string // the namespace Weft runs in
	DaemonSet string // the DaemonSet whose removal means that Weft is uninstalled
	Version   string // of the program, for people

	Address string // TCP address for health, metrics and status

	ProcRoot      string // the host's /proc, writable
	NetnsDir      string // the host's named network namespaces
	BPFRoot       string // where programs and maps are pinned
	HandoffSocket string // where ztunnel connects
	CNISocket     string // where the CNI plugin connects, seen from here
	LockFile      string // held by the one agent that works
	RecordsDir    string // where captured pods are written down, on a file system that a boot empties
	Pod           string // this agent's own pod; empty if it runs in none

	CNIConfDir     string // the runtime's network configuration, seen from here
	CNIBinDir      string // the runtime's plugins, seen from here
	CNIPlugin      string // the plugin's binary in this image
	CNIAgentSocket string // CNISocket as the host sees it

	// ExcludeNamespaces are never in the mesh, beside Namespace and
	// kube-system. New pods of theirs start without the agent.
	ExcludeNamespaces []string
	// LeaveGrace is how long a pod that leaves is still captured after its
	// peers were told, so that none meets a closed door.
	LeaveGrace time.Duration
	// Existing is ExistingKeep or ExistingReset: for running pods that do not
	// say themselves, nor their namespace.
	Existing string
	// Uncaptured is UncapturedCapture, UncapturedReport or UncapturedRestart.
	Uncaptured string
	// DNS captures the DNS requests of pods that do not forbid it.
	DNS bool
	// DisableFeatures turns features of the kernel off, as if it had not got
	// them: see capture.Config.
	DisableFeatures []string
	// StartupTaints are the keys of the taints that the agent takes off its
	// node when it is ready. None is none.
	StartupTaints []string
}

// Defaults returns the configuration of an agent in the DaemonSet of the chart.
// Node is left to the caller.
func Defaults() Config {
	return Config{
		Namespace: "weft-system", DaemonSet: "ztunnel", Version: "dev",
		Address:  ":15022",
		ProcRoot: "/host/proc", NetnsDir: "/var/run/netns", BPFRoot: "/sys/fs/bpf/weft/v1",
		HandoffSocket: "/var/run/weft/handoff.sock", CNISocket: "/var/run/weft/cni.sock", LockFile: "/var/run/weft/agent.lock",
		RecordsDir: "/var/run/weft/pods",
		CNIConfDir: "/host/etc/cni/net.d", CNIBinDir: "/host/opt/cni/bin", CNIPlugin: "/bin/weft-cni",
		CNIAgentSocket: "/var/run/weft/cni.sock",
		LeaveGrace:     2 * time.Second, Existing: ExistingKeep, Uncaptured: UncapturedCapture,
	}
}

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	for _, f := range []struct{ name, value string }{
		{"the node's name (NODE_NAME)", c.Node}, {"the namespace of Weft (POD_NAMESPACE)", c.Namespace}, {"the DaemonSet's name", c.DaemonSet},
		{"the address to serve on", c.Address}, {"the host's /proc", c.ProcRoot}, {"the directory of network namespaces", c.NetnsDir},
		{"the directory for BPF pins", c.BPFRoot}, {"the handoff socket", c.HandoffSocket}, {"the CNI socket", c.CNISocket},
		{"the lock file", c.LockFile}, {"the directory for records of pods", c.RecordsDir}, {"the CNI configuration directory", c.CNIConfDir}, {"the CNI plugin directory", c.CNIBinDir},
		{"the CNI plugin", c.CNIPlugin}, {"the CNI socket on the host", c.CNIAgentSocket},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s is not set", f.name))
		}
	}
	if c.LeaveGrace < 0 || c.LeaveGrace > 10*time.Second {
		errs = append(errs, fmt.Errorf("the grace of leaving pods is %v: want 0 to 10s, an uninstallation waits for it", c.LeaveGrace))
	}
	if c.Existing != ExistingKeep && c.Existing != ExistingReset {
		errs = append(errs, fmt.Errorf("what becomes of existing connections is %q: want %s or %s", c.Existing, ExistingKeep, ExistingReset))
	}
	if !slices.Contains([]string{UncapturedCapture, UncapturedReport, UncapturedRestart}, c.Uncaptured) {
		errs = append(errs, fmt.Errorf("what becomes of pods that run uncaptured is %q: want %s, %s or %s", c.Uncaptured, UncapturedCapture, UncapturedReport, UncapturedRestart))
	}
	for _, key := range c.StartupTaints {
		if key == "" || strings.ContainsAny(key, " ,:=") {
			errs = append(errs, fmt.Errorf("startup taint %q: want the key of a taint, such as %s", key, StartupTaint))
		}
	}
	return errors.Join(errs...)
}

// excluded returns the namespaces that are never in the mesh.
func (c Config) excluded() []string {
	all := append([]string{c.Namespace, "kube-system"}, c.ExcludeNamespaces...)
	slices.Sort(all)
	return slices.Compact(all)
}

// An Agent is the node agent. Make it with New, then call Run once.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	registry  *prometheus.Registry
	kube      *kube
	keeper    *keeper
	handoff   *handoff.Server
	installer *cni.Installer
	holds     *holds
	adopted   chan struct{} // closed when the pods of the agent before are taken over
	adoptOnce sync.Once
	ended     chan struct{} // closed when it serves ztunnel no more
	release   chan struct{} // closed when its pod was asked to let the node's pods go
	relOnce   sync.Once
	begun     chan struct{} // closed when the kernel can capture pods
	gone      atomic.Bool   // the DaemonSet was seen to be removed
	ending    atomic.Bool   // its namespace was seen to be deleted
	opened    []io.Closer   // what begin has opened; closed when the workers are done

	mu      sync.Mutex
	stage   string // what the agent waits for, and what to do; empty when it works
	standby bool
	freed   bool // the node's pods were let go because its pod was asked to
	capture CaptureStatus
}

// New returns an agent that has done nothing yet. It registers its metrics
// with reg, which it also serves.
func New(cfg Config, client kubernetes.Interface, reg *prometheus.Registry, log *slog.Logger) (*Agent, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure the node agent: %w", err)
	}
	k, err := newKube(client, cfg.Node, cfg.Namespace, cfg.DaemonSet, log)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: log, registry: reg, kube: k, holds: newHolds(), adopted: make(chan struct{}), ended: make(chan struct{}),
		release: make(chan struct{}), begun: make(chan struct{}),
		stage: "the agent is starting", capture: CaptureStatus{Design: "none", Why: "the kernel has not been asked yet"},
		installer: cni.NewInstaller(cni.InstallerConfig{
			ConfDir: cfg.CNIConfDir, BinDir: cfg.CNIBinDir, Source: cfg.CNIPlugin, Log: log,
			Entry: cni.Entry{AgentSocket: cfg.CNIAgentSocket, ExcludeNamespaces: cfg.excluded()},
		}),
	}
	a.handoff = handoff.NewServer(handoff.ServerConfig{
		Path: cfg.HandoffSocket, Log: log, OnHold: a.holds.add, OnHoldEnd: a.holds.end,
		Snapshot: func() []handoff.Entry {
			// Before that, ztunnel would drop what it serves.
			select {
			case <-a.adopted:
			case <-a.ended:
			}
			return a.keeper.entries()
		},
	})
	a.keeper = newKeeper(k, a.handoff, nil, newMetrics(reg), log)
	a.keeper.excluded, a.keeper.leaveGrace = cfg.excluded(), cfg.LeaveGrace
	a.keeper.existing, a.keeper.uncaptured, a.keeper.dns = cfg.Existing, cfg.Uncaptured, cfg.DNS
	a.gauges(reg)
	return a, nil
}

// Run works until ctx ends. Then it leaves everything as it is, for the agent
// after it, or takes every pod out of the mesh if its DaemonSet is gone. It
// returns an error only for what trying again cannot mend.
func (a *Agent) Run(ctx context.Context) error {
	sandboxes, err := newHostSandboxes(a.cfg.ProcRoot, a.cfg.NetnsDir)
	if err != nil {
		return err
	}
	a.keeper.sandboxes = sandboxes
	// What serves goes on while pods leave after the end of ctx.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	if a.keeper.records, err = openRecords(a.cfg.RecordsDir, a.cfg.ProcRoot); err != nil {
		return err
	}
	if err := a.followEnd(); err != nil {
		return err
	}
	return run.All(work,
		func(ctx context.Context) error { return obs.Serve(ctx, a.cfg.Address, a.handler(a.registry)) },
		a.kube.run,
		func(work context.Context) error { return a.lead(ctx, work) },
	)
}

// lead becomes the node's one agent and works until life ends.
func (a *Agent) lead(life, work context.Context) error {
	lock, err := lockNode(life, a.cfg.LockFile, func() {
		a.mu.Lock()
		a.standby, a.stage = true, ""
		a.mu.Unlock()
		a.log.Info("another agent works on this node; standing by until it stops")
	})
	if life.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	a.mu.Lock()
	a.standby = false
	a.mu.Unlock()

	install, stopInstall := context.WithCancel(work)
	defer stopInstall()
	installed := make(chan struct{})
	defer a.close() // when no worker needs it any more
	return run.All(work,
		func(ctx context.Context) error { return cni.Serve(ctx, a.cfg.CNISocket, a.keeper, a.log) },
		func(ctx context.Context) error {
			defer context.AfterFunc(ctx, stopInstall)()
			err := a.installer.Run(install)
			close(installed)
			if err == nil {
				<-ctx.Done() // stopping it is not the end of the agent
			}
			return err
		},
		func(ctx context.Context) error {
			context.AfterFunc(ctx, func() { close(a.ended) }) // or a snapshot that waits would wait for ever
			return a.handoff.Run(ctx)
		},
		a.keeper.run, a.keeper.mendCapture, a.watchZtunnel, a.begin,
		func(ctx context.Context) error {
			select {
			case <-a.begun:
			case <-ctx.Done():
				return nil
			}
			return a.untaint(ctx)
		},
		func(ctx context.Context) error {
			select {
			case <-ctx.Done():
				return nil
			case <-a.release:
				stopInstall()
				<-installed
				a.letGo(ctx, life)
				return nil
			case <-life.Done():
			}
			if !a.uninstalled(ctx) {
				a.log.Info("stopping; the pods of this node stay in the mesh")
				return nil
			}
			stopInstall()
			<-installed
			return a.uninstall(ctx)
		},
	)
}

// letGo takes the node out of the mesh because its pod was asked to, and
// waits for the end of life.
func (a *Agent) letGo(ctx, life context.Context) {
	for a.log.Info("asked to let the pods of this node go", "annotation", releaseAnnotation); ; {
		err := a.uninstall(ctx)
		a.mu.Lock()
		a.freed = err == nil
		a.stage = ""
		if err != nil {
			a.stage = err.Error()
		}
		a.mu.Unlock()
		again := time.After(mendInterval)
		if err == nil {
			again = nil
		} else {
			a.log.Error("the node could not be released; it is tried again", "error", err)
		}
		select {
		case <-life.Done():
			return
		case <-ctx.Done():
			return
		case <-again:
		}
	}
}

// watchZtunnel wakes pods that may have waited for ztunnel.
func (a *Agent) watchZtunnel(ctx context.Context) error {
	for {
		n, changed := a.handoff.Connected()
		if n > 0 {
			a.keeper.serveDNS(ctx, a.handoff.ServesDNS())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			a.keeper.wakeFailed()
		}
	}
}

// How often what an operator has to mend is looked at again.
const mendInterval = 30 * time.Second

// begin brings the agent from its start to work: the kernel, the API server,
// the pods of the agent before. Then it holds what it has opened until ctx ends.
func (a *Agent) begin(ctx context.Context) error {
	features, ok := a.probe(ctx)
	if !ok {
		return nil
	}
	a.keeper.resetOnly = !features.Keep
	close(a.begun)
	a.enter("waiting for the first answer of the API server")
	wait, cancel := context.WithTimeout(ctx, apiPatience)
	cache.WaitForCacheSync(wait.Done(), a.kube.synced)
	cancel()
	for ctx.Err() == nil && !a.work(ctx) {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(mendInterval):
		}
	}
	tidyMemory(ctx)
	return nil
}

// apiPatience is how long an agent that starts waits for the API server before
// it goes by what the agent before has written down.
const apiPatience = 5 * time.Second

// work opens the capture, takes over the pods of the agent before and lets the
// workers go. It reports whether that worked; if not, the status says why.
func (a *Agent) work(ctx context.Context) bool {
	c, err := a.open()
	if err == nil && !a.kube.synced() {
		err = a.workBlind(ctx, c)
	}
	if err == nil {
		a.enter("taking over the pods of the agent before")
		err = a.keeper.adopt(ctx, c, a.holds.wait(ctx, holdWait))
	}
	if ctx.Err() != nil {
		return true
	}
	if err == nil {
		err = a.keeper.follow()
	}
	if err != nil {
		a.log.Error("no pod can be captured; it is tried again", "error", err)
		a.keeper.disable(err)
		a.enter(err.Error())
		a.close()
		return false
	}
	a.holds.close()
	a.keeper.enable(c)
	a.handOver()
	a.enter("")
	a.log.Info("the node agent works", "node", a.cfg.Node, "version", a.cfg.Version)
	return true
}

// workBlind serves the captured pods that can be known without the API server,
// until that answers.
func (a *Agent) workBlind(ctx context.Context, c capturer) error {
	if err := a.keeper.adoptRecorded(ctx, c, a.holds.wait(ctx, holdWait)); err != nil {
		return err
	}
	a.keeper.enable(c)
	a.handOver()
	a.enter("the API server does not answer: captured pods are served by what was written down of them, pods whose record does not hold any more stay blocked, and no pod can join or start in the mesh")
	cache.WaitForCacheSync(ctx.Done(), a.kube.synced)
	return ctx.Err()
}

// handOver lets ztunnels have the pods that were taken over.
func (a *Agent) handOver() { a.adoptOnce.Do(func() { close(a.adopted) }) }

// open opens the capture. close closes it again.
func (a *Agent) open() (capturer, error) {
	host, err := netns.Open(filepath.Join(a.cfg.ProcRoot, "1/ns/net"))
	if err != nil {
		return nil, fmt.Errorf("open the host's network namespace: %w", err)
	}
	c, err := capture.New(capture.Config{BPFRoot: a.cfg.BPFRoot, ProcRoot: a.cfg.ProcRoot, HostNS: host, Disable: a.cfg.DisableFeatures, Log: a.log})
	if err != nil {
		host.Close()
		return nil, err
	}
	a.opened = []io.Closer{c, host}
	return kernelCapture{c}, nil
}

func (a *Agent) close() {
	for _, c := range a.opened {
		if err := c.Close(); err != nil {
			a.log.Debug("closing the capture failed", "error", err)
		}
	}
	a.opened = nil
}

// probe asks the kernel until it can capture pods. It reports false when ctx
// ended first.
func (a *Agent) probe(ctx context.Context) (capture.Features, bool) {
	last := ""
	for {
		f, err := capture.Probe(a.cfg.DisableFeatures...)
		if err == nil {
			a.mu.Lock()
			a.capture = CaptureStatus{Design: "bpf", Rung: string(f.Rung), Why: cmp.Or(f.Why, "the kernel has all that capture needs"),
				Features: map[string]bool{"keep existing connections": f.Keep, "reset existing connections": f.Reset}}
			a.mu.Unlock()
			return f, true
		}
		if last != err.Error() {
			last = err.Error()
			a.log.Error("no pod of this node can be in the mesh; pods outside it are not affected", "error", err)
			a.keeper.disable(err)
			a.mu.Lock()
			a.stage, a.capture = err.Error(), CaptureStatus{Design: "none", Why: err.Error()}
			a.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return capture.Features{}, false
		case <-time.After(mendInterval):
		}
	}
}

func (a *Agent) enter(stage string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stage = stage
}

// followEnd remembers whether the agent's DaemonSet and namespace exist, for
// the time when the API server will not tell any more, and watches its own pod
// for the wish that it lets the node's pods go.
func (a *Agent) followEnd() error {
	see := func(obj any) {
		switch o := obj.(type) {
		case *appsv1.DaemonSet:
			a.gone.Store(o.DeletionTimestamp != nil)
		case *corev1.Namespace:
			if o.Name == a.cfg.Namespace && o.DeletionTimestamp != nil {
				a.ending.Store(true)
			}
		case *corev1.Pod:
			if a.cfg.Pod != "" && o.Name == a.cfg.Pod && o.Namespace == a.cfg.Namespace && o.Annotations[releaseAnnotation] == "true" {
				a.relOnce.Do(func() { close(a.release) })
			}
		}
	}
	for what, inf := range map[string]cache.SharedIndexInformer{"the DaemonSet": a.kube.daemonSets, "namespaces": a.kube.namespaces, "pods": a.kube.pods} {
		_, err := inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    see,
			UpdateFunc: func(_, obj any) { see(obj) },
			DeleteFunc: func(obj any) {
				if inf == a.kube.daemonSets {
					a.gone.Store(true)
				}
			},
		})
		if err != nil {
			return fmt.Errorf("follow %s: %v", what, err)
		}
	}
	return nil
}

// uninstalled reports whether the DaemonSet is gone or going. In doubt it is
// not: pods that stay captured are safe, pods that are let go are not.
func (a *Agent) uninstalled(ctx context.Context) bool {
	gone, err := a.kube.uninstalled(ctx)
	if err == nil {
		return gone
	}
	seen := a.gone.Load() || a.ending.Load()
	a.log.Warn("the API server does not tell whether Weft is being uninstalled; going by what was seen last", "uninstalled", seen, "error", err)
	return seen
}

// uninstallTimeout leaves some of the pod's 30 s for stopping.
const uninstallTimeout = 22 * time.Second

// uninstall takes the plugin out of the node's chain and every pod out of the
// mesh, and removes what is pinned.
func (a *Agent) uninstall(ctx context.Context) error {
	a.log.Info("Weft is being uninstalled; the pods of this node leave the mesh")
	ctx, cancel := context.WithTimeout(ctx, uninstallTimeout)
	defer cancel()
	errs := []error{a.installer.Remove(), a.keeper.leaveAll(ctx)}
	if a.keeper.count() == 0 {
		errs = append(errs, os.RemoveAll(a.cfg.BPFRoot), os.RemoveAll(a.cfg.RecordsDir))
		_ = os.Remove(filepath.Dir(a.cfg.BPFRoot)) // unless another version has something there
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall from node %s: %w", a.cfg.Node, err)
	}
	a.log.Info("nothing of Weft is left on this node but the file of the CNI plugin")
	return nil
}
