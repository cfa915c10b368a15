// Package admit tells authors of objects what is wrong with them before they
// are stored: the errors that compile would give, as a validating admission
// webhook.
package admit

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"unicode/utf8"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weft-mesh/weft/control/compile"
)

// gatewayAPI is the group of the Gateway API.
const gatewayAPI = "gateway.networking.k8s.io"

const (
	// longestReview is more than the API server takes of an object, twice (the
	// object and what it was before).
	longestReview = 8 << 20
	// mostWarnings and longestWarning are what kubectl shows whole.
	mostWarnings   = 16
	longestWarning = 256
)

// Handler answers AdmissionReviews of version v1.
func Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			http.Error(w, "want POST with an AdmissionReview", http.StatusMethodNotAllowed)
			return
		}
		b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, longestReview))
		if err != nil {
			http.Error(w, fmt.Sprintf("read the AdmissionReview: %v", err), http.StatusRequestEntityTooLarge)
			return
		}
		var in admissionv1.AdmissionReview
		if err := json.Unmarshal(b, &in); err != nil || in.Request == nil {
			http.Error(w, fmt.Sprintf("read the AdmissionReview: want one of admission.k8s.io/v1 with a request: %v", err), http.StatusBadRequest)
			return
		}
		out := admissionv1.AdmissionReview{TypeMeta: in.TypeMeta, Response: Review(in.Request)}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(out) // the API server has gone; nobody is left to tell
	})
}

// Review decides on one request. Errors in an object deny it, warnings go to
// whoever writes it. Errors in an object of the Gateway API are warnings: that
// API wants it stored, and told in its status, and another controller may see
// it differently. An object that is being deleted is always let through, so that
// one that was never valid can lose its finalizers.
func Review(r *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	allowed := &admissionv1.AdmissionResponse{UID: r.UID, Allowed: true}
	if r.Operation != admissionv1.Create && r.Operation != admissionv1.Update || r.SubResource != "" {
		return allowed
	}
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal(r.Object.Raw, &u.Object); err != nil || u.Object == nil {
		return denied(r.UID, "the object is not readable", []compile.Finding{{Message: fmt.Sprintf("is not JSON of an object: %v", err)}})
	}
	if u.GetDeletionTimestamp() != nil {
		return allowed
	}
	if u.GetNamespace() == "" {
		u.SetNamespace(r.Namespace) // a client may leave it to the URL
	}
	found, _ := compile.Review(u)
	var bad []compile.Finding
	for _, f := range found {
		if f.Severity == compile.SeverityError && u.GroupVersionKind().Group != gatewayAPI {
			bad = append(bad, f)
		} else if len(allowed.Warnings) < mostWarnings {
			allowed.Warnings = append(allowed.Warnings, shortened(f.String()))
		}
	}
	if len(bad) == 0 {
		return allowed
	}
	out := denied(r.UID, fmt.Sprintf("%s %q is invalid", u.GetKind(), u.GetName()), bad)
	out.Warnings = allowed.Warnings
	return out
}

func denied(uid types.UID, what string, bad []compile.Finding) *admissionv1.AdmissionResponse {
	s := &metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusUnprocessableEntity,
		Reason:  metav1.StatusReasonInvalid,
		Details: &metav1.StatusDetails{},
	}
	var lines []string
	for _, f := range bad {
		lines = append(lines, f.String())
		s.Details.Causes = append(s.Details.Causes, metav1.StatusCause{Type: metav1.CauseTypeFieldValueInvalid, Field: f.Path, Message: f.Message})
	}
	s.Message = what + ": " + strings.Join(lines, "; ")
	return &admissionv1.AdmissionResponse{UID: uid, Result: s}
}

// shortened cuts a warning where the API server would, between characters.
func shortened(s string) string {
	if len(s) <= longestWarning {
		return s
	}
	n := longestWarning - len("...")
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "..."
}
