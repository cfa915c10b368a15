package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/weft-mesh/weft/e2e/cluster/internal/enter"
)

func isNotFound(err error) bool { return apierrors.IsNotFound(err) }

// RESTConfig returns the configuration of a client with every right. Its
// connections start inside the control plane's network namespace.
func (c *Cluster) RESTConfig() *rest.Config {
	return &rest.Config{
		Host: fmt.Sprintf("https://%s:%d", controlIP4, apiPort),
		TLSClientConfig: rest.TLSClientConfig{
			CAFile: c.pki("ca.crt"), CertFile: c.pki("admin.crt"), KeyFile: c.pki("admin.key"),
		},
		Dial: enter.Dialer(c.netnsPath("control")),
		QPS:  200, Burst: 400,
	}
}

// client returns a client for the tool's own waiting, which must not hang on a
// server that accepts and does not answer.
func (c *Cluster) client() (*kubernetes.Clientset, error) {
	config := c.RESTConfig()
	config.Timeout = 10 * time.Second
	return kubernetes.NewForConfig(config)
}

// KubectlCommand returns a kubectl command for the cluster, of the cluster's
// own version.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.record.Programs.Hyper, append([]string{"kubectl", "--kubeconfig", c.Kubeconfig}, args...)...)
}

// Kubectl runs kubectl and returns what it wrote to its standard output. The
// error holds what it wrote to the other.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.KubectlInput(ctx, "", args...)
}

// KubectlInput is Kubectl with something to read, for "apply -f -".
func (c *Cluster) KubectlInput(ctx context.Context, in string, args ...string) (string, error) {
	var out, complaint bytes.Buffer
	cmd := c.KubectlCommand(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(in), &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// Command returns a command that runs on the machine, with its files, but in
// the control plane's network, from where the API server, the nodes and the
// pods can be reached; KUBECONFIG names an administrator's kubeconfig.
func (c *Cluster) Command(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + c.ControlNetns(), "--"}, argv...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.pki("admin.kubeconfig"))
	return cmd
}

// waitControllers waits until the controller manager has made what every pod
// needs.
func (c *Cluster) waitControllers(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	return c.waitFor(ctx, func(ctx context.Context) error {
		if err := c.alive(controllersName); err != nil {
			return stopWaiting(err)
		}
		for _, ns := range []string{metav1.NamespaceDefault, metav1.NamespaceSystem} {
			if _, err := client.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{}); err != nil {
				return err
			}
			if _, err := client.CoreV1().ConfigMaps(ns).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{}); err != nil {
				return err
			}
		}
		return nil
	})
}
