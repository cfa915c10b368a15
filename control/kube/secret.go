package kube

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Secrets reads and keeps the Secrets of the system namespace. It watches
// nothing: they are read when they are needed, and only by name.
type Secrets struct {
	Client    kubernetes.Interface
	Namespace string
}

// Read returns the data of the named Secret, and whether it exists.
func (s Secrets) Read(ctx context.Context, name string) (data map[string][]byte, ok bool, err error) {
	got, err := s.Client.CoreV1().Secrets(s.Namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("read Secret %s/%s: %w; %s", s.Namespace, name, err, remedy(err))
	}
	return got.Data, true, nil
}

// CreateOnce stores data under the name unless the Secret exists, and returns
// what is stored then. Of several processes that do so at the same time, one
// wins and all return its data.
func (s Secrets) CreateOnce(ctx context.Context, name string, data map[string][]byte) (map[string][]byte, error) {
	_, err := s.Client.CoreV1().Secrets(s.Namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: s.Namespace, Labels: map[string]string{labelManagedBy: managedByWeft}},
		Type:       corev1.SecretTypeOpaque,
		Data:       data,
	}, metav1.CreateOptions{FieldManager: fieldManager})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("create Secret %s/%s: %w; %s", s.Namespace, name, err, remedy(err))
	}
	// What counts is what the API server has, also after our own write.
	stored, ok, err := s.Read(ctx, name)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("create Secret %s/%s: it was deleted at once by somebody else; nothing is used that is not kept", s.Namespace, name)
	}
	return stored, nil
}
