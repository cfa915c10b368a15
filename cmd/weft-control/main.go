// Command weft-control is the control service of the mesh: it compiles the
// cluster for the proxies, signs their certificates, and writes statuses and
// trust bundles.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"k8s.io/klog/v2"

	"github.com/weft-mesh/weft/control"
	"github.com/weft-mesh/weft/control/kube"
	"github.com/weft-mesh/weft/control/provision"
	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := run.UntilSignal(context.Background())
	defer stop()
	if err := program(ctx, os.Args[1:], os.Getenv, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "weft-control:", err)
		os.Exit(1)
	}
}

// A config is what the user said.
type config struct {
	control    control.Config
	identity   string // of this process in the election
	kubeconfig string
	logFormat  string
	logLevel   string
	waypoints  provision.Settings
}

// parse reads flags and the environment of the pod.
func parse(args []string, getenv func(string) string, out io.Writer) (config, error) {
	var cfg config
	c := &cfg.control
	*c = control.Defaults(getenv("POD_NAMESPACE"))
	hostname, _ := os.Hostname() // "" is complained about below
	fs := flag.NewFlagSet("weft-control", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.StringVar(&c.Namespace, "namespace", c.Namespace, "namespace that Weft runs in; default from POD_NAMESPACE")
	fs.StringVar(&cfg.identity, "pod-name", cmp.Or(getenv("POD_NAME"), hostname), "name of this pod, unique among the replicas; default from POD_NAME")
	fs.StringVar(&c.TrustDomain, "trust-domain", c.TrustDomain, "SPIFFE trust domain of the mesh")
	fs.StringVar(&c.Cluster, "cluster-id", c.Cluster, "id of this cluster in the names of workloads")
	fs.StringVar(&c.Domain, "cluster-domain", c.Domain, "DNS domain of the cluster's services")
	fs.StringVar(&c.Network, "network", c.Network, "network of this cluster's pods")
	accounts := fs.String("node-accounts", "", "service accounts of node proxies, as namespace/name, separated by commas; default is ztunnel in the namespace")
	fs.StringVar(&c.GRPC, "grpc-address", c.GRPC, "address of the gRPC service for proxies")
	fs.StringVar(&c.Webhook, "webhook-address", c.Webhook, "address of the webhook that checks objects")
	fs.StringVar(&c.Metrics, "metrics-address", c.Metrics, "address of /metrics")
	fs.StringVar(&c.Health, "health-address", c.Health, "address of /healthz/live and /healthz/ready")
	fs.StringVar(&c.Debug, "debug-address", c.Debug, "address of /debug/pprof and /logging")
	fs.StringVar(&cfg.kubeconfig, "kubeconfig", "", "kubeconfig file; default is the pod's service account")
	fs.StringVar(&cfg.logFormat, "log-format", "text", "text or json")
	fs.StringVar(&cfg.logLevel, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&cfg.waypoints.Image, "waypoint-image", "", "image of waypoints; without one none is run")
	fs.StringVar(&cfg.waypoints.PullPolicy, "waypoint-pull-policy", "", "when the image of waypoints is pulled: Always, IfNotPresent or Never")
	secrets := fs.String("waypoint-pull-secrets", "", "names of Secrets to pull the image of waypoints with, separated by commas; they must be in the namespaces of the Gateways")
	fs.DurationVar(&cfg.waypoints.Drain, "waypoint-drain", 0, "longest wait for open connections when a waypoint is stopped")
	fs.StringVar(&cfg.waypoints.LogLevel, "waypoint-log-level", "", "log level of waypoints")
	fs.BoolVar(&c.IstioWaypoints, "istio-waypoints", false, "serve the GatewayClass istio-waypoint too; only where Istio does not")
	if err := fs.Parse(args); err != nil {
		return config{}, err
	}
	if fs.NArg() > 0 {
		return config{}, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	c.NodeAccounts = []mesh.Name{{Namespace: c.Namespace, Name: "ztunnel"}}
	if *accounts != "" {
		c.NodeAccounts = nil
		for s := range strings.SplitSeq(*accounts, ",") {
			name, err := mesh.ParseName(strings.TrimSpace(s))
			if err != nil {
				return config{}, fmt.Errorf("node accounts: %w", err)
			}
			c.NodeAccounts = append(c.NodeAccounts, name)
		}
	}
	if *secrets != "" {
		cfg.waypoints.PullSecrets = strings.Split(*secrets, ",")
	}
	cfg.waypoints.ControlAddress = "weft-control." + c.Namespace + ".svc:15012"
	cfg.waypoints.TrustDomain, cfg.waypoints.Cluster, cfg.waypoints.Network = c.TrustDomain, c.Cluster, c.Network
	return cfg, cfg.validate()
}

// validate returns everything that is wrong with c.
func (c config) validate() error {
	errs := []error{c.control.Validate()}
	if c.identity == "" {
		errs = append(errs, errors.New("pod name is empty: set POD_NAME"))
	}
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
	parsed, err := obs.ParseLevel(cfg.logLevel)
	if err != nil {
		return err
	}
	var level slog.LevelVar
	level.Set(parsed)
	log := obs.NewLogger(out, cfg.logFormat, &level)
	klog.SetSlogLogger(log) // client-go has no other way
	clients, err := kube.Connect(cfg.kubeconfig, "weft-control/"+version)
	if err != nil {
		return err
	}
	log.Info("weft-control starts", "version", version, "namespace", cfg.control.Namespace, "trustDomain", cfg.control.TrustDomain)
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	health := control.NewHealth("the CA", "the cluster")
	return run.All(ctx,
		func(ctx context.Context) error { return obs.Serve(ctx, cfg.control.Health, health.Handler()) },
		func(ctx context.Context) error { return control.ServeMetrics(ctx, cfg.control.Metrics, reg) },
		func(ctx context.Context) error { return obs.Serve(ctx, cfg.control.Debug, obs.Debug(&level)) },
		func(ctx context.Context) error { return serve(ctx, cfg, clients, health, log, reg) },
	)
}

// serve puts the service together and runs it until ctx ends.
func serve(ctx context.Context, cfg config, clients kube.Clients, health *control.Health, log *slog.Logger, reg *prometheus.Registry) error {
	c := cfg.control
	authn := control.NewAuthenticator(control.AuthenticatorConfig{
		Review: func(ctx context.Context, token, audience string) (control.Review, error) {
			r, err := kube.ReviewToken(ctx, clients.Typed, token, audience)
			return control.Review(r), err
		},
		Log: log, Registerer: reg,
	})
	var watcher *kube.Watcher // fills the feed, and knows who may read it
	isWaypoint := func(account mesh.Name) (is, known bool) { return watcher.IsWaypoint(account) }
	feed := control.NewFeed(c, authn, isWaypoint, log, reg)
	watcher = kube.NewWatcher(kube.WatcherConfig{
		Client: clients.Typed, Dynamic: clients.Dynamic, Settings: c.Settings(), Provision: cfg.waypoints, Sink: feed, Log: log, Registerer: reg,
	})
	synced := func(ctx context.Context) error {
		select {
		case <-watcher.Synced():
			health.Ready("the cluster")
		case <-ctx.Done():
		}
		<-ctx.Done()
		return nil
	}
	withCA := func(ctx context.Context) error {
		secrets := kube.Secrets{Client: clients.Typed, Namespace: c.Namespace}
		authority, secret, err := control.OpenAuthority(ctx, secrets, c.TrustDomain, log)
		if err != nil {
			return nil // ctx has ended
		}
		service := control.NewService(control.Parts{
			Config: c, Authority: authority, Authenticator: authn, Feed: feed, Pods: watcher, Log: log, Registerer: reg,
		})
		bundles := &kube.BundleWriter{Client: clients.Typed, Watcher: watcher, Roots: authority.RootPEM, Log: log}
		statuses := &kube.StatusWriter{Dynamic: clients.Dynamic, Watcher: watcher, Log: log}
		waypoints := &kube.Provisioner{Dynamic: clients.Dynamic, Watcher: watcher, Log: log}
		webhook := control.NewWebhook(c, authority, log)
		trust := &kube.WebhookWriter{Client: clients.Typed, Watcher: watcher, Name: "weft-control-" + c.Namespace, Roots: authority.RootPEM, Log: log}
		keeper := control.Keeper{Secrets: secrets, Authority: authority, Secret: secret, Log: log}
		health.Ready("the CA")
		return run.All(ctx, service.Run, webhook.Run, keeper.Run, func(ctx context.Context) error {
			return kube.RunLeader(ctx, kube.LeaderConfig{
				Client: clients.Typed, Namespace: c.Namespace, Identity: cfg.identity,
				Tasks: []run.Task{bundles.Run, statuses.Run, waypoints.Run, trust.Run}, Log: log, Registerer: reg,
			})
		})
	}
	return run.All(ctx, watcher.Run, synced, withCA)
}
