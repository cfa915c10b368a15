package kube

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/weft-mesh/weft/control/provision"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

const aGateway = `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: %, namespace: shop, uid: uid-%, generation: 1}
spec:
  gatewayClassName: weft-waypoint
  infrastructure: {parametersRef: {group: "", kind: ConfigMap, name: %-parameters}}
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]`

// applying makes a fake API server apply: what is there is replaced.
func applying(dyn *dynamicfake.FakeDynamicClient) {
	dyn.PrependReactor("patch", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		p := a.(clienttesting.PatchAction)
		if p.GetSubresource() != "" {
			return true, &unstructured.Unstructured{}, nil
		}
		u := &unstructured.Unstructured{}
		if err := json.Unmarshal(p.GetPatch(), &u.Object); err != nil {
			return true, nil, err
		}
		if spec, _ := u.Object["spec"].(map[string]any); spec["minAvailable"] != nil && spec["maxUnavailable"] != nil {
			return true, nil, apierrors.NewInvalid(u.GroupVersionKind().GroupKind(), p.GetName(), field.ErrorList{
				field.Invalid(field.NewPath("spec"), spec, "minAvailable and maxUnavailable cannot be both set")})
		}
		_, err := dyn.Tracker().Get(p.GetResource(), p.GetNamespace(), p.GetName())
		if apierrors.IsNotFound(err) {
			err = dyn.Tracker().Create(p.GetResource(), u, p.GetNamespace())
		} else if err == nil {
			err = dyn.Tracker().Update(p.GetResource(), u, p.GetNamespace())
		}
		return true, u, err
	})
}

// TestProvisioner follows waypoints from their Gateways to the objects that run
// them, through repair and a change of mind.
func TestProvisioner(t *testing.T) {
	gateway := func(name string) *unstructured.Unstructured {
		return object(t, strings.ReplaceAll(aGateway, "%", name))
	}
	parameters := func(name, data string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name + "-parameters", Namespace: "shop", ResourceVersion: "1"},
			Data: map[string]string{"podDisruptionBudget": data}}
	}
	theirs := object(t, `{apiVersion: apps/v1, kind: Deployment, metadata: {name: taken, namespace: shop}, spec: {replicas: 7}}`)
	dyn := dynamicClient(theirs)
	for _, name := range []string{"good", "taken", "wrong", "odd"} {
		if err := dyn.Tracker().Create(resource("Gateway"), gateway(name), "shop"); err != nil { // the fake guesses a wrong plural
			t.Fatal(err)
		}
	}
	applying(dyn)
	client := fake.NewClientset(aNamespace("shop"), parameters("good", "spec: {maxUnavailable: 1}"), parameters("taken", "{}"), parameters("wrong", "{spec: {image: x}}"), parameters("odd", "spec: {minAvailable: 1, maxUnavailable: 1}"))
	var log logBook
	w := NewWatcher(WatcherConfig{Client: client, Dynamic: dyn, Sink: newSink(), Log: log.logger(), Provision: provision.Settings{Image: "example.com/waypoint:1"}})
	p := &Provisioner{Dynamic: dyn, Watcher: w, Log: log.logger()}
	start(t, func(ctx context.Context) error { return run.All(ctx, w.Run, p.Run) })
	there := func(kind, name string) func() bool {
		return func() bool {
			for _, gvr := range provision.Kinds() {
				if gvr.Resource == kind {
					_, err := dyn.Tracker().Get(gvr, "shop", name)
					return err == nil
				}
			}
			return false
		}
	}
	remove := func(kind, name string) {
		for _, gvr := range provision.Kinds() {
			if gvr.Resource == kind {
				if err := dyn.Tracker().Delete(gvr, "shop", name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	eventually(t, "the class is made", func() bool {
		_, err := dyn.Tracker().Get(resource("GatewayClass"), "", waypointClass)
		return err == nil
	})
	for _, kind := range []string{"deployments", "services", "serviceaccounts", "poddisruptionbudgets"} {
		eventually(t, "the Gateway's "+kind, there(kind, "good"))
	}
	if is, known := w.IsWaypoint(mesh.Name{Namespace: "shop", Name: "good"}); !is || !known {
		t.Error("the pods of the Gateway may not subscribe")
	}
	if is, _ := w.IsWaypoint(mesh.Name{Namespace: "shop", Name: "default"}); is {
		t.Error("any pod of the namespace may subscribe")
	}
	eventually(t, "the Deployment of somebody else is named", func() bool { return log.count("deployments/shop/taken is there") > 0 })
	got, err := dyn.Tracker().Get(provision.Kinds()[2], "shop", "taken")
	if err != nil {
		t.Fatal(err)
	}
	if n, _, _ := unstructured.NestedFieldNoCopy(got.(*unstructured.Unstructured).Object, "spec", "replicas"); n != int64(7) {
		t.Errorf("it has %v replicas now, want 7 as before", n)
	}
	if there("deployments", "wrong")() {
		t.Error("a Gateway whose parameters are not understood is provisioned")
	}
	says := func(gateway, condition, reason, part string) func() bool {
		return func() bool {
			all, _, _ := w.statuses.latest()
			for _, s := range all {
				if s.Kind == "Gateway" && s.Name.Name == gateway {
					for _, c := range s.Conditions {
						if c.Type == condition {
							return !c.OK && c.Reason == reason && strings.Contains(c.Message, part)
						}
					}
				}
			}
			return false
		}
	}
	eventually(t, "its status says why", says("wrong", "Accepted", "InvalidParameters", "image"))
	eventually(t, "the status of the one whose name is taken says so", says("taken", "Programmed", "Invalid", "deployments/shop/taken is there"))
	eventually(t, "the status of the one that the API server refuses says why", says("odd", "Accepted", "InvalidParameters", "minAvailable"))

	remove("deployments", "good")
	eventually(t, "a deleted object comes back", there("deployments", "good"))
	change := func(data map[string]string) {
		t.Helper()
		m := parameters("good", "")
		m.Data, m.ResourceVersion = data, time.Now().String()
		if _, err := client.CoreV1().ConfigMaps("shop").Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	change(nil)
	eventually(t, "what is no longer asked for goes", func() bool { return !there("poddisruptionbudgets", "good")() })
	change(map[string]string{"nonsense": "1"})
	eventually(t, "the Gateway is refused", func() bool {
		_, objects, _ := w.statuses.latest()
		for _, o := range objects {
			if o.GetName() == "good" {
				return false
			}
		}
		return true
	})
	if !there("deployments", "good")() || !there("services", "good")() {
		t.Error("a Gateway that is not understood for the moment loses what runs for it")
	}
}
