package obs

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestHealth(t *testing.T) {
	var err error
	h := Health(func() error { return err })
	ask := func(path string) (int, string) {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		return rec.Code, rec.Body.String()
	}
	if code, _ := ask("/healthz/ready"); code != 200 {
		t.Errorf("ready answers %d", code)
	}
	err = errors.New("no certificate yet")
	if code, body := ask("/healthz/ready"); code != 503 || !strings.Contains(body, "no certificate yet") {
		t.Errorf("not ready answers %d %q", code, body)
	}
	if code, _ := ask("/healthz/live"); code != 200 {
		t.Errorf("live answers %d", code)
	}
}

func TestStats(t *testing.T) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(Build("waypoint"))
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		rec := httptest.NewRecorder()
		Stats(reg).ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		if !strings.Contains(rec.Body.String(), `istio_build{component="waypoint"`) {
			t.Errorf("%s: %s", path, rec.Body)
		}
	}
}

func TestWriteJSON(t *testing.T) {
	rec := httptest.NewRecorder()
	WriteJSON(rec, map[string]int{"a": 1})
	if rec.Code != 200 || rec.Body.String() != "{\n  \"a\": 1\n}\n" {
		t.Errorf("%d %q", rec.Code, rec.Body)
	}
	rec = httptest.NewRecorder()
	WriteJSON(rec, func() {})
	if rec.Code != 500 {
		t.Errorf("what is no JSON answers %d", rec.Code)
	}
}
