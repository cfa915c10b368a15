package kube

import (
	"fmt"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Clients are the two ways to talk to one API server.
type Clients struct {
	Typed   kubernetes.Interface
	Dynamic dynamic.Interface
}

// Connect makes clients from a kubeconfig file, or from the pod's service
// account when its name is empty. It does not talk to the API server yet.
func Connect(kubeconfig, userAgent string) (Clients, error) {
	rc, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if kubeconfig == "" {
		rc, err = rest.InClusterConfig()
	}
	if err != nil {
		return Clients{}, fmt.Errorf("find the API server: %w", err)
	}
	rc.QPS, rc.Burst = 100, 200
	rc.UserAgent = userAgent
	dyn, err := dynamic.NewForConfig(rc)
	if err != nil {
		return Clients{}, fmt.Errorf("connect to the API server: %w", err)
	}
	rc = rest.CopyConfig(rc)
	rc.ContentType = "application/vnd.kubernetes.protobuf" // smaller and cheaper to read than JSON
	rc.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	typed, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return Clients{}, fmt.Errorf("connect to the API server: %w", err)
	}
	return Clients{Typed: typed, Dynamic: dyn}, nil
}
