package ztunnel

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/weft-mesh/weft/internal/handoff"
)

// An agent hands a pod over, dies and comes back: the pod is served all the
// time, and the new agent is given the listeners that the proxy kept.
func TestAgentRestart(t *testing.T) {
	w := newWorld(t)
	n := w.node(nil)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	path := filepath.Join(t.TempDir(), "handoff.sock")
	e, server := w.entry("server", freshAddr())
	server.node = n
	n.enter = enterWith(server)
	w.change(func(w *world) { w.ws = append(w.ws, workload("server", server.addr.String())) })
	app := server.app(echo)
	client := w.node(nil).add("client", nil)
	service := w.publish("server", client, server, app.Port(), nil)

	first := handoff.NewServer(handoff.ServerConfig{Path: path, Log: log})
	ctx, kill := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- first.Run(ctx) }()
	agent := handoff.NewClient(handoff.ClientConfig{Path: path, Instance: "z", Handler: n.Proxy, Log: log})
	background(t, agent.Run)
	<-agent.Synced()
	if err := first.Add(t.Context(), e.Pod, e.Files); err != nil {
		t.Fatal(err)
	}
	e.Files.Close() // and now only the proxy has them
	c := client.dial(service)
	if err := roundTrip(c, "before"); err != nil {
		t.Fatal(err)
	}
	kill()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := roundTrip(c, "without an agent"); err != nil {
		t.Fatal(err)
	}

	held := make(chan handoff.Entry, 1)
	second := handoff.NewServer(handoff.ServerConfig{Path: path, Log: log,
		OnHold: func(p handoff.Pod, f handoff.Files) { held <- handoff.Entry{Pod: p, Files: f} },
		// The new agent's snapshot has the pod, with the listeners it was given.
		Snapshot: func() []handoff.Entry { return []handoff.Entry{<-held} },
	})
	background(t, second.Run)
	for connected, changed := second.Connected(); connected == 0; connected, changed = second.Connected() {
		<-changed
	}
	if err := second.Del(t.Context(), "somebody-else"); err != nil { // waits for the snapshot
		t.Fatal(err)
	}
	if err := roundTrip(c, "after"); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	if err := roundTrip(client.dial(service), "new"); err != nil {
		t.Errorf("a new connection: %v", err)
	}
	if err := second.Del(t.Context(), e.Pod.UID); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pods) != 0 {
		t.Error("the pod is served after Del")
	}
}

// A pod gets the certificate of the service account that the agent names, and
// a name that could be read as another identity gets none.
func TestServiceAccountsCannotBeForged(t *testing.T) {
	n := newWorld(t).node(nil)
	score := newCard(t)
	for _, sa := range []string{"", "a/sa/admin", "admin\x00", "../admin"} {
		e, p := n.world.entry("x", freshAddr())
		n.enter = enterWith(p)
		e.Pod.ServiceAccount = sa
		err := n.Add(t.Context(), e.Pod, e.Files)
		score.attack("attack.service_account_forged", err != nil)
		if err == nil {
			t.Errorf("service account %q was accepted", sa)
		}
	}
	if got := len(n.cfg.Identity.Dump()); got != 0 {
		t.Errorf("%d identities were asked for", got)
	}
}
