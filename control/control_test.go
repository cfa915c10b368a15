package control

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/mesh"
)

// TestConfigValidate proves that the defaults are valid and that all
// complaints are told at once.
func TestConfigValidate(t *testing.T) {
	if err := Defaults("").Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	if got := Defaults("mesh").NodeAccounts[0]; got != (mesh.Name{Namespace: "mesh", Name: "ztunnel"}) {
		t.Errorf("node account %v, want that of the namespace", got)
	}
	bad := Config{
		Namespace: "Weft System", TrustDomain: "Cluster/Local", Cluster: "a/b", Domain: "", Network: "a/b",
		NodeAccounts: nil, GRPC: "15012", Metrics: ":15014", Health: ":15021", Debug: ":1",
	}
	err := bad.Validate()
	if err == nil {
		t.Fatal("a config that is all wrong is valid")
	}
	for _, want := range []string{"namespace", "trust domain", "cluster id", "cluster domain", "network", "no node account", "grpc address"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no complaint about %s in %q", want, err)
		}
	}
	for _, a := range []mesh.Name{{}, {Namespace: "x"}, {Namespace: "x", Name: "a/b"}} {
		c := Defaults("")
		c.NodeAccounts = []mesh.Name{a}
		if c.Validate() == nil {
			t.Errorf("node account %v is valid", a)
		}
	}
}

// A vault is Secrets in memory.
type vault struct {
	mu    sync.Mutex
	data  map[string]map[string][]byte
	fails int // calls that fail before one succeeds
}

func (v *vault) Read(_ context.Context, name string) (map[string][]byte, bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fails > 0 {
		v.fails--
		return nil, false, errors.New("API server is away")
	}
	d, ok := v.data[name]
	return maps.Clone(d), ok, nil
}

func (v *vault) CreateOnce(_ context.Context, name string, data map[string][]byte) (map[string][]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.data[name]; !ok {
		v.put(name, data)
	}
	return maps.Clone(v.data[name]), nil
}

func (v *vault) put(name string, data map[string][]byte) {
	if v.data == nil {
		v.data = map[string]map[string][]byte{}
	}
	v.data[name] = data
}

func silent() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newFiles(t *testing.T) (*ca.Authority, map[string][]byte) {
	t.Helper()
	a, err := ca.New("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	f, err := a.Files()
	if err != nil {
		t.Fatal(err)
	}
	return a, f.Data()
}

// TestOpenAuthority proves where the root comes from.
func TestOpenAuthority(t *testing.T) {
	t.Run("made once and kept", func(t *testing.T) {
		v := &vault{}
		first, _, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
		if err != nil {
			t.Fatal(err)
		}
		again, _, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
		if err != nil || string(again.RootPEM()) != string(first.RootPEM()) {
			t.Errorf("a second start has another root: %v", err)
		}
	})
	t.Run("two processes that start together agree", func(t *testing.T) {
		v := &vault{}
		roots := make([]string, 8)
		var wg sync.WaitGroup
		for i := range roots {
			wg.Go(func() {
				a, _, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
				if err != nil {
					t.Error(err)
					return
				}
				roots[i] = string(a.RootPEM())
			})
		}
		wg.Wait()
		for _, r := range roots {
			if r != roots[0] {
				t.Fatal("two roots in one mesh")
			}
		}
	})
	t.Run("a plugged-in CA wins", func(t *testing.T) {
		v := &vault{}
		_, own := newFiles(t)
		brought, data := newFiles(t)
		v.put(ownSecret, own)
		v.put(pluginSecret, data)
		got, _, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
		if err != nil || string(got.RootPEM()) != string(brought.RootPEM()) {
			t.Errorf("the root is not that of %s: %v", pluginSecret, err)
		}
	})
	t.Run("the API server is away for a while", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			if _, _, err := OpenAuthority(t.Context(), &vault{fails: 20}, "cluster.local", silent()); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("an unusable Secret is never passed over", func(t *testing.T) {
		for _, name := range []string{pluginSecret, ownSecret} {
			synctest.Test(t, func(t *testing.T) {
				v := &vault{}
				_, good := newFiles(t)
				_, other := newFiles(t)
				mixed := maps.Clone(good)
				mixed[ca.KeyFile] = other[ca.KeyFile]
				v.put(name, mixed)
				if name == pluginSecret {
					v.put(ownSecret, good)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				if a, _, err := OpenAuthority(ctx, v, "cluster.local", silent()); err == nil {
					t.Errorf("opened %v with a key that is not the certificate's", a)
				}
				// Corrected, it is used without a restart.
				done := make(chan error, 1)
				go func() {
					_, _, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
					done <- err
				}()
				time.Sleep(time.Minute)
				v.mu.Lock()
				v.put(name, good)
				v.mu.Unlock()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		}
	})
}

// TestHealth proves that the service lives while it waits, and says for what.
func TestHealth(t *testing.T) {
	h := NewHealth("the CA", "the cluster")
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		h.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	if code, _ := get("/healthz/live"); code != http.StatusOK {
		t.Errorf("live: %d", code)
	}
	if code, body := get("/healthz/ready"); code != http.StatusServiceUnavailable || body != "waiting for the CA, the cluster\n" {
		t.Errorf("ready: %d %q", code, body)
	}
	h.Ready("the CA")
	if code, body := get("/healthz/ready"); code != http.StatusServiceUnavailable || body != "waiting for the cluster\n" {
		t.Errorf("ready: %d %q", code, body)
	}
	h.Ready("the cluster")
	if code, _ := get("/healthz/ready"); code != http.StatusOK {
		t.Errorf("ready: %d", code)
	}
}
