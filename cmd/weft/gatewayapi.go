package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/mod/semver"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/weft-mesh/weft/deploy"
)

// bundleVersion is the annotation by which definitions of the Gateway API say
// their version.
const bundleVersion = "gateway.networking.k8s.io/bundle-version"

// gatewayDefinitions returns the definitions of the Gateway API, marked as made
// by install.
func gatewayDefinitions() ([]*unstructured.Unstructured, error) {
	text, err := deploy.GatewayAPI()
	if err != nil {
		return nil, err
	}
	crds, err := objects(text)
	if err != nil {
		return nil, fmt.Errorf("read the definitions of the Gateway API: %w", err)
	}
	for _, crd := range crds {
		unstructured.RemoveNestedField(crd.Object, "status")
		labels := crd.GetLabels()
		if labels == nil {
			labels = map[string]string{}
		}
		labels[managedBy] = "weft"
		crd.SetLabels(labels)
	}
	return crds, nil
}

// planGatewayAPI says which of the wanted definitions are to be created or
// updated where those of have are. The whole set has one owner: if one of them
// was not made by install none is touched, and foreign is its version. Nothing
// goes back to an older version.
func planGatewayAPI(have map[string]*unstructured.Unstructured, want []*unstructured.Unstructured) (create, update []*unstructured.Unstructured, foreign string) {
	for _, w := range want {
		h := have[w.GetName()]
		switch {
		case h == nil:
			create = append(create, w)
		case h.GetLabels()[managedBy] != "weft":
			version := h.GetAnnotations()[bundleVersion]
			if version == "" {
				version = "of an unknown version"
			}
			return nil, nil, version
		case semver.Compare(h.GetAnnotations()[bundleVersion], w.GetAnnotations()[bundleVersion]) < 0:
			update = append(update, w)
		}
	}
	return create, update, ""
}

// installGatewayAPI makes the definitions of the Gateway API, where the cluster
// has none. Weft works without them, only not waypoints: so a cluster that
// refuses them gets Weft all the same.
func (k *kube) installGatewayAPI(ctx context.Context, out io.Writer) error {
	want, err := gatewayDefinitions()
	if err != nil {
		return err
	}
	have := map[string]*unstructured.Unstructured{}
	for _, crd := range want {
		r, err := k.resource(crd)
		if err != nil {
			return err
		}
		got, err := r.Get(ctx, crd.GetName(), metav1.GetOptions{})
		if err == nil {
			have[crd.GetName()] = got
		} else if !apierrors.IsNotFound(err) {
			return fmt.Errorf("read %s: %w", describe(crd), err)
		}
	}
	create, update, foreign := planGatewayAPI(have, want)
	if foreign != "" {
		fmt.Fprintf(out, "The Gateway API is there, %s, and stays as it is\n", foreign)
		return nil
	}
	for _, crd := range create {
		_, err := k.create(ctx, crd)
		if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
			fmt.Fprintf(out, "The Gateway API could not be installed, so there can be no waypoints: %v\n", err)
			return nil
		}
		if err != nil {
			return err
		}
	}
	for _, crd := range update {
		if err := k.apply(ctx, crd); err != nil {
			return err
		}
	}
	if len(create)+len(update) == 0 {
		return nil
	}
	for _, crd := range want {
		err := await(ctx, out, time.Minute, func(ctx context.Context) (bool, string, error) {
			r, err := k.resource(crd)
			if err != nil {
				return false, "", err
			}
			got, err := r.Get(ctx, crd.GetName(), metav1.GetOptions{})
			return err == nil && established(got), "", err
		})
		if err != nil {
			return fmt.Errorf("wait for the definition %s: %w", crd.GetName(), err)
		}
	}
	fmt.Fprintf(out, "Gateway API %s installed\n", want[0].GetAnnotations()[bundleVersion])
	return nil
}
