package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Versions is what version prints.
type versions struct {
	Client  string `json:"client"`
	Control string `json:"control,omitempty"` // tag of the control service's image
	Ztunnel string `json:"ztunnel,omitempty"`
}

func versionCommand(to *target) *cobra.Command {
	var out output
	var clientOnly bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this command and of what is installed",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			v := versions{Client: version}
			if !clientOnly {
				k, err := to.connect(cmd.Context())
				if err != nil {
					return fmt.Errorf("%w (--client prints this command's version alone)", err)
				}
				if err := k.versions(cmd.Context(), to.namespace, &v); err != nil {
					return err
				}
			}
			return out.print(cmd.OutOrStdout(), v, v.people(clientOnly))
		},
	}
	out.flag(c)
	c.Flags().BoolVar(&clientOnly, "client", false, "print only the version of this command, without asking the cluster")
	return c
}

func (v versions) people(clientOnly bool) func(io.Writer) error {
	return func(w io.Writer) error {
		rows := [][]string{{"weft", v.Client}}
		if !clientOnly {
			rows = append(rows, []string{"weft-control", orNone(v.Control)}, []string{"ztunnel", orNone(v.Ztunnel)})
		}
		return table(w, rows)
	}
}

func orNone(v string) string {
	if v == "" {
		return "not installed"
	}
	return v
}

// versions fills in what is installed; what is not stays empty.
func (k *kube) versions(ctx context.Context, namespace string, v *versions) error {
	d, err := k.typed.AppsV1().Deployments(namespace).Get(ctx, "weft-control", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("read the Deployment weft-control: %w", err)
	}
	if err == nil {
		v.Control = imageTag(d.Spec.Template.Spec.Containers, "weft-control")
	}
	ds, err := k.typed.AppsV1().DaemonSets(namespace).Get(ctx, "ztunnel", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("read the DaemonSet ztunnel: %w", err)
	}
	if err == nil {
		v.Ztunnel = imageTag(ds.Spec.Template.Spec.Containers, "istio-proxy")
	}
	return nil
}

// imageTag returns the tag of a container's image.
func imageTag(cs []corev1.Container, name string) string {
	for _, c := range cs {
		if c.Name == name {
			return c.Image[strings.LastIndex(c.Image, ":")+1:]
		}
	}
	return ""
}
