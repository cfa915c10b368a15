package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// served checks that a client's request to a meshed server is answered, or
// refused, and waits for it: policies take a moment to arrive.
func wantServed(t *testing.T, ns, client, server string, want bool) {
	t.Helper()
	eventually(t, patience, func() error {
		got, err := tryQuietly(t.Context(), ns, client, "get", "http://"+server+"."+meshed+"/")
		if err != nil || got.OK != want {
			return fmt.Errorf("%s/%s to %s: got %+v, %v; want served=%v", ns, client, server, got, err, want)
		}
		return nil
	})
}

// A plaintext client from outside is refused under STRICT and served under
// PERMISSIVE, in every served version of the API; meshed clients are served
// under both.
func TestPlaintextUnderStrictAndPermissive(t *testing.T) {
	for _, version := range []string{"v1", "v1beta1"} {
		t.Run(version, func(t *testing.T) {
			wantServed(t, outside, "client", "far", true)
			apply(t, peerAuthentication(version, "default", "STRICT"))
			for _, server := range []string{"near", "far"} {
				wantServed(t, outside, "client", server, false)
				wantServed(t, meshed, "client", server, true)
			}
			apply(t, peerAuthentication(version, "default", "PERMISSIVE"))
			wantServed(t, outside, "client", "far", true)
			wantServed(t, meshed, "client", "far", true)
		})
	}
}

func peerAuthentication(version, name, mode string) string {
	return fmt.Sprintf(`---
apiVersion: security.istio.io/%s
kind: PeerAuthentication
metadata: {name: %s, namespace: %s}
spec: {mtls: {mode: %s}}
`, version, name, meshed, mode)
}

func authorizationPolicy(version, name, spec string) string {
	return fmt.Sprintf(`---
apiVersion: security.istio.io/%s
kind: AuthorizationPolicy
metadata: {name: %s, namespace: %s}
spec: %s
`, version, name, meshed, spec)
}

// The L4 subset of AuthorizationPolicy decides who is served.
func TestAuthorizationPolicy(t *testing.T) {
	rows := []struct {
		name, version, spec string
		near, far           bool // meshed/client is served
		outside             bool // outside/client is served by far
	}{
		{"allow by principal", "v1", `{action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/meshed/sa/client]}}]}]}`, true, true, false},
		{"allow another principal", "v1beta1", `{action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/meshed/sa/other]}}]}]}`, false, false, false},
		{"deny by namespace", "v1", `{action: DENY, rules: [{from: [{source: {namespaces: [meshed]}}]}]}`, false, false, true},
		{"deny at one server's port", "v1", `{selector: {matchLabels: {app: far}}, action: DENY, rules: [{to: [{operation: {ports: ["8080"]}}]}]}`, true, false, false},
		{"deny at a port nobody asks", "v1", `{action: DENY, rules: [{to: [{operation: {ports: ["9999"]}}]}]}`, true, true, true},
		{"allow nothing", "v1", `{}`, false, false, false},
		{"an allow rule about HTTP never holds at L4", "v1", `{action: ALLOW, rules: [{to: [{operation: {methods: [GET]}}]}]}`, false, false, false},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			wantServed(t, outside, "client", "far", true)
			wantServed(t, meshed, "client", "far", true)
			wantServed(t, meshed, "client", "near", true)
			apply(t, authorizationPolicy(r.version, "rule", r.spec))
			if !r.near {
				wantServed(t, meshed, "client", "near", false)
			}
			wantServed(t, meshed, "client", "far", r.far)
			wantServed(t, meshed, "client", "near", r.near)
			wantServed(t, outside, "client", "far", r.outside)
		})
	}
}

// A policy that comes to forbid an open connection ends it within a second;
// one that still allows it leaves it alone.
func TestPolicyEndsOpenConnections(t *testing.T) {
	wantServed(t, meshed, "client", "far", true)
	v4, _ := addresses(t, meshed, "far")
	type result struct {
		reply
		err error
	}
	hold := func(ns string) chan result {
		c := make(chan result, 1)
		go func() {
			r, err := tryQuietly(context.Background(), ns, "client", "hold", "-addr", v4.String()+":9000", "-for", "25s")
			c <- result{r, err}
		}()
		return c
	}
	denied, kept := hold(meshed), hold(outside)
	wantConnections(t, "far", 2)
	apply(t, authorizationPolicy("v1", "no-meshed", `{action: DENY, rules: [{from: [{source: {namespaces: [meshed]}}]}]}`))
	at := time.Now()
	r := <-denied
	if r.err != nil || r.OK || r.Echoes == 0 {
		t.Errorf("the forbidden connection: got %+v, want some echoes and then an end", r)
	}
	// A second for the policy to be enforced, and one for a busy machine.
	if d := time.Unix(0, r.End).Sub(at); d > 2*time.Second {
		t.Errorf("the forbidden connection ended after %v, want one second", d)
	}
	if r := <-kept; r.err != nil || !r.OK {
		t.Errorf("the allowed connection: got %+v, want it to last", r)
	}
}

// wantConnections waits until the server has n open connections at its echo
// port.
func wantConnections(t *testing.T, server string, n int) {
	t.Helper()
	eventually(t, patience, func() error {
		table := kubectl(t, "exec", "-n", meshed, server, "--", "/bin/testapp", "cat", "/proc/net/tcp", "/proc/net/tcp6")
		// 9000 is 0x2328; state 01 is established.
		if got := countEstablished(table, ":2328"); got < n {
			return fmt.Errorf("%d connections at port 9000 of %s, want %d", got, server, n)
		}
		return nil
	})
}
