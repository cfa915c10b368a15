// Command weft-node is the agent that keeps the pods of one Kubernetes node in
// the mesh. It runs beside ztunnel in the pods of DaemonSet ztunnel.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"k8s.io/klog/v2"

	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/node"
)

// version is set by the linker.
var version = "dev"

func main() {
	runtime.MemProfileRate = 0 // nobody can ask for it, and it costs memory
	ctx, stop := run.UntilSignal(context.Background())
	defer stop()
	if err := program(ctx, os.Args[1:], os.Getenv, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weft-node:", err)
		os.Exit(1)
	}
}

// A config is what the user said.
type config struct {
	agent      node.Config
	kubeconfig string
	logFormat  string
	logLevel   string
}

// parse reads flags and the environment of the pod.
func parse(args []string, getenv func(string) string, out io.Writer) (config, error) {
	c := config{agent: node.Defaults()}
	a := &c.agent
	a.Version = version
	fs := flag.NewFlagSet("weft-node", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.StringVar(&a.Node, "node", getenv("NODE_NAME"), "name of this node; default from NODE_NAME")
	fs.StringVar(&a.Namespace, "namespace", orDefault(getenv("POD_NAMESPACE"), a.Namespace), "namespace that Weft runs in; default from POD_NAMESPACE")
	fs.StringVar(&a.DaemonSet, "daemonset", a.DaemonSet, "DaemonSet whose removal means that Weft is uninstalled")
	fs.StringVar(&a.Address, "address", a.Address, "TCP address for /healthz/ready, /metrics and /status")
	fs.StringVar(&a.ProcRoot, "proc", a.ProcRoot, "the host's /proc, writable")
	fs.StringVar(&a.NetnsDir, "netns-dir", a.NetnsDir, "the host's named network namespaces")
	fs.StringVar(&a.BPFRoot, "bpf-root", a.BPFRoot, "directory in the host's bpf file system for programs and maps")
	fs.StringVar(&a.HandoffSocket, "handoff-socket", a.HandoffSocket, "socket that ztunnel connects to")
	fs.StringVar(&a.CNISocket, "cni-socket", a.CNISocket, "socket that the CNI plugin connects to")
	fs.StringVar(&a.CNIAgentSocket, "cni-socket-on-host", a.CNIAgentSocket, "that socket as the host sees it")
	fs.StringVar(&a.LockFile, "lock-file", a.LockFile, "file that the one agent that works on a node holds")
	fs.StringVar(&a.RecordsDir, "records-dir", a.RecordsDir, "directory where captured pods are written down, for a start without the API server; on a file system that a boot empties")
	fs.StringVar(&a.Pod, "pod", getenv("POD_NAME"), "name of this pod; default from POD_NAME")
	fs.StringVar(&a.CNIConfDir, "cni-conf-dir", a.CNIConfDir, "network configuration of the container runtime")
	fs.StringVar(&a.CNIBinDir, "cni-bin-dir", a.CNIBinDir, "CNI plugins of the container runtime")
	fs.StringVar(&a.CNIPlugin, "cni-plugin", a.CNIPlugin, "the plugin to install")
	fs.DurationVar(&a.LeaveGrace, "leave-grace", a.LeaveGrace, "how long a pod that leaves the mesh is still served as one that is in it")
	fs.StringVar(&a.Existing, "existing-connections", a.Existing, "what becomes of the connections of a running pod when it is captured: keep or reset")
	fs.StringVar(&a.Uncaptured, "uncaptured", a.Uncaptured, "what to do about a pod that is found running outside the mesh though it belongs to it: capture, report or restart")
	fs.BoolVar(&a.DNS, "dns-capture", a.DNS, "let ztunnel answer the DNS requests of captured pods")
	fs.Func("disable-features", "features of the kernel, separated by commas, to do without, for tests: tcx, iterator, sk_lookup", list(&a.DisableFeatures))
	fs.Func("startup-taints", "keys of taints, separated by commas, that are taken off the node when the agent is ready", list(&a.StartupTaints))
	fs.Func("exclude-namespaces", "further namespaces, separated by commas, that are never in the mesh", list(&a.ExcludeNamespaces))
	fs.StringVar(&c.kubeconfig, "kubeconfig", "", "kubeconfig file; default is the pod's service account")
	fs.StringVar(&c.logFormat, "log-format", "text", "text or json")
	fs.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error")
	if err := fs.Parse(args); err != nil {
		return config{}, err
	}
	if fs.NArg() > 0 {
		return config{}, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	return c, nil
}

// list adds the words of a flag, which commas separate, to out.
func list(out *[]string) func(string) error {
	return func(words string) error {
		for word := range strings.SplitSeq(words, ",") {
			if word = strings.TrimSpace(word); word != "" {
				*out = append(*out, word)
			}
		}
		return nil
	}
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// validate returns everything that is wrong with c.
func (c config) validate() error {
	errs := []error{c.agent.Validate()}
	if _, err := obs.ParseLevel(c.logLevel); err != nil {
		errs = append(errs, err)
	}
	if c.logFormat != "text" && c.logFormat != "json" {
		errs = append(errs, fmt.Errorf("log format %q: want text or json", c.logFormat))
	}
	return errors.Join(errs...)
}

func program(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	cfg, err := parse(args, getenv, out)
	if err != nil {
		return err
	}
	if err := cfg.validate(); err != nil {
		return err
	}
	parsed, err := obs.ParseLevel(cfg.logLevel)
	if err != nil {
		return err
	}
	var level slog.LevelVar
	level.Set(parsed)
	log := obs.NewLogger(out, cfg.logFormat, &level)
	klog.SetSlogLogger(log) // client-go has no other way

	client, err := node.Connect(cfg.kubeconfig, version)
	if err != nil {
		return err
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	agent, err := node.New(cfg.agent, client, reg, log)
	if err != nil {
		return err
	}
	return agent.Run(ctx)
}
