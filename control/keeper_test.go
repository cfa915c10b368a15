package control

import (
	"context"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/identity/ca"
)

// TestKeeper proves that the Secret and the CA in use stay one.
func TestKeeper(t *testing.T) {
	for _, tc := range []struct {
		name   string
		plug   bool // the CA in use is the plugged-in one
		change func(t *testing.T, v *vault)
		want   string // in the error that ends the process; "" is none
		kept   bool   // a start afterwards has the same root
	}{
		{"nothing happens", false, func(*testing.T, *vault) {}, "", true},
		{"our own Secret is deleted", false, func(_ *testing.T, v *vault) { delete(v.data, ownSecret) }, "", true},
		{"the API server is away", false, func(_ *testing.T, v *vault) { v.fails = 3 }, "", true},
		{"another replica has made a new root", false, func(t *testing.T, v *vault) { _, d := newFiles(t); v.put(ownSecret, d) }, ownSecret, false},
		{"a CA is plugged in", false, func(t *testing.T, v *vault) { _, d := newFiles(t); v.put(pluginSecret, d) }, pluginSecret, false},
		{"the plugged-in CA is replaced", true, func(t *testing.T, v *vault) { _, d := newFiles(t); v.put(pluginSecret, d) }, pluginSecret, false},
		{"the plugged-in CA is taken away, and no other is made in its place", true, func(_ *testing.T, v *vault) { delete(v.data, pluginSecret) }, "", false},
		{"what is stored is broken", false, func(_ *testing.T, v *vault) {
			broken := maps.Clone(v.data[ownSecret])
			delete(broken, ca.KeyFile)
			v.put(ownSecret, broken)
		}, "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := &vault{}
				if tc.plug {
					_, data := newFiles(t)
					v.put(pluginSecret, data)
				}
				a, secret, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
				if err != nil {
					t.Fatal(err)
				}
				tc.change(t, v)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				err = Keeper{Secrets: v, Authority: a, Secret: secret, Log: silent()}.Run(ctx)
				if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("error %v, want one with %q", err, tc.want)
				}
				if !tc.kept {
					return
				}
				again, _, err := OpenAuthority(t.Context(), v, "cluster.local", silent())
				if err != nil || string(again.RootPEM()) != string(a.RootPEM()) {
					t.Errorf("a start afterwards has another root: %v", err)
				}
			})
		})
	}
}
