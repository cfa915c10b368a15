package kube

import (
	"context"
	"fmt"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// A Review is what the API server says of a token.
type Review struct {
	Refused   string   // why the token is not accepted; "" when it is
	Audiences []string // those that the token is for, among the asked
	// The service account that the token was made for.
	Namespace, ServiceAccount string
	// The pod and node that the token is bound to; "" when it is not.
	PodName, PodUID, NodeName string
}

// The extra values of a bound token (KEP-4193).
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
)

// ReviewToken asks the API server about a token. The error says that it could
// not be asked; a token that is not accepted is a Review with Refused set.
func ReviewToken(ctx context.Context, client kubernetes.Interface, token, audience string) (Review, error) {
	ask := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	got, err := client.AuthenticationV1().TokenReviews().Create(ctx, ask, metav1.CreateOptions{})
	if err != nil {
		return Review{}, fmt.Errorf("review token: %w; %s", err, remedy(err))
	}
	return readReview(got.Status), nil
}

// readReview reads the API server's answer.
func readReview(s authenticationv1.TokenReviewStatus) Review {
	switch {
	case s.Error != "":
		return Review{Refused: s.Error}
	case !s.Authenticated:
		return Review{Refused: "not authenticated"}
	}
	rest, isAccount := strings.CutPrefix(s.User.Username, "system:serviceaccount:")
	ns, account, ok := strings.Cut(rest, ":")
	if !isAccount || !ok || ns == "" || account == "" || strings.Contains(account, ":") {
		return Review{Refused: "not a service account token"}
	}
	// A value that is there twice is not one to rely on.
	extra := func(key string) string {
		if v := s.User.Extra[key]; len(v) == 1 {
			return v[0]
		}
		return ""
	}
	return Review{
		Audiences: s.Audiences, Namespace: ns, ServiceAccount: account,
		PodName: extra(extraPodName), PodUID: extra(extraPodUID), NodeName: extra(extraNodeName),
	}
}
