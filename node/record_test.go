package node

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/netns"
)

func newRecords(t *testing.T, boot string) *records {
	t.Helper()
	proc := t.TempDir()
	dir := filepath.Join(proc, "sys/kernel/random")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "boot_id"), []byte(boot+"\n"), 0o444)); err != nil {
		t.Fatal(err)
	}
	r, err := openRecords(filepath.Join(t.TempDir(), "pods"), proc)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// recorded is a pod as the agent before wrote it down; its UID is its name.
func recorded(w *world, uid string) record {
	w.set(func() { w.sandboxes[uid] = uint64(100 + len(w.sandboxes)) })
	return record{Kubelet: uid, Netns: netns.ID{Ino: w.sandboxes[uid]},
		Pod: handoff.Pod{UID: uid, Name: uid, Namespace: "shop", ServiceAccount: "sa", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Node: "n1"}}
}

func TestRecords(t *testing.T) {
	w := newWorld(t)
	r := newRecords(t, "boot-1")
	want := recorded(w, "a")
	if err := r.save(want); err != nil {
		t.Fatal(err)
	}
	want.Version, want.Boot = recordVersion, "boot-1"
	got, err := r.load("a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if st, err := os.Stat(filepath.Join(r.dir, "a")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v %v", st, err)
	}
	if err := errors.Join(r.save(recorded(w, "b")), r.sweep(map[string]bool{"b": true})); err != nil {
		t.Fatal(err)
	}
	if _, err := r.load("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("swept, and still: %v", err)
	}
	if err := errors.Join(r.remove("b"), r.remove("b")); err != nil {
		t.Error(err)
	}
	var none *records
	if err := errors.Join(none.save(want), none.remove("a"), none.sweep(nil)); err != nil {
		t.Error(err)
	}
	if _, err := none.load("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// A record that is not whole, not ours or not of now is no record.
func TestRecordsAreNotBelieved(t *testing.T) {
	good := func(w *world) []byte {
		rec := recorded(w, "a")
		rec.Version, rec.Boot = recordVersion, "boot-1"
		b, _ := json.Marshal(rec)
		return b
	}
	replace := func(old, new string) func([]byte) []byte {
		return func(b []byte) []byte {
			if !strings.Contains(string(b), old) {
				panic("no " + old)
			}
			return []byte(strings.Replace(string(b), old, new, 1))
		}
	}
	tests := []struct {
		name   string
		change func([]byte) []byte
		file   func(path string) error
		want   string
	}{
		{"of another boot", replace("boot-1", "boot-0"), nil, "booted"},
		{"of another pod", replace(`"uid":"a"`, `"uid":"b"`), nil, "record of pod b"},
		{"of another version", replace(`"version":1`, `"version":2`), nil, "version 2"},
		{"cut", func(b []byte) []byte { return b[:len(b)-3] }, nil, "EOF"},
		{"with more behind it", func(b []byte) []byte { return append(b, "{}"...) }, nil, "follows"},
		{"with a field that is not known", replace(`{"version"`, `{"x":1,"version"`), nil, "unknown field"},
		{"without a namespace", replace(`"Ino":100`, `"Ino":0`), nil, "lacks"},
		{"without addresses", replace(`["10.0.0.1"]`, `[]`), nil, "lacks"},
		{"with an identity that is none", replace(`"serviceAccount":"sa"`, `"serviceAccount":"../sa"`), nil, "not valid"},
		{"too long", func(b []byte) []byte { return append(b, make([]byte, maxRecord)...) }, nil, "more than"},
		{"that others may write", nil, func(p string) error { return os.Chmod(p, 0o666) }, "only user"},
		{"behind a link", nil, func(p string) error {
			return errors.Join(os.Rename(p, p+".x"), os.Symlink(p+".x", p))
		}, "symbolic links"},
		{"that is a directory", nil, func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, "only user"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			r := newRecords(t, "boot-1")
			b := good(w)
			if tt.change != nil {
				b = tt.change(b)
			}
			path := filepath.Join(r.dir, "a")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if tt.file != nil {
				if err := tt.file(path); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := r.load("a"); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	r := newRecords(t, "boot-1")
	if err := os.Chmod(r.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	proc := t.TempDir()
	if _, err := openRecords(r.dir, proc); err == nil {
		t.Error("opened without a boot ID")
	}
	if err := onlyOurs(r.dir, 0o040000); err == nil {
		t.Error("a directory that all may write")
	}
}

// Without the API server a captured pod is served only if everything that was
// written down of it still holds; otherwise it stays as it is, blocked.
func TestAdoptRecorded(t *testing.T) {
	w := newWorld(t)
	r := newRecords(t, "boot-1")
	w.keeper.records = r
	w.pins = []string{"changed", "claimed", "gone", "good", "held", "unknown"}
	for _, uid := range []string{"changed", "claimed", "gone", "good", "held"} {
		if err := r.save(recorded(w, uid)); err != nil {
			t.Fatal(err)
		}
	}
	w.set(func() {
		w.sandboxes["changed"] = 900 // a namespace of another number has the address
		delete(w.sandboxes, "gone")
		w.sandboxes["unknown"] = 901 // runs, and nothing was written down
	})
	entry := func(uid, sa string) handoff.Entry {
		return handoff.Entry{Pod: handoff.Pod{UID: uid, Name: uid, Namespace: "shop", ServiceAccount: sa}}
	}
	held := map[string]handoff.Entry{"held": entry("held", "sa"), "claimed": entry("claimed", "admin")}
	if err := w.keeper.adoptRecorded(t.Context(), fakeCapturer{w}, held); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"prepare good", "attach good", "prepare held with held", "attach held"}, w.read()); diff != "" {
		t.Error(diff)
	}
	var served []string
	for _, e := range w.keeper.entries() {
		served = append(served, e.Pod.UID)
		e.Files.Close()
	}
	if !slices.Equal(served, []string{"good", "held"}) {
		t.Errorf("a ztunnel that connects is given %v", served)
	}

	// Nobody has said yet that these pods do not belong: they stay, until
	// their sandbox is gone.
	w.keeper.enable(fakeCapturer{w})
	for range 2 {
		if again, err := w.keeper.reconcile(t.Context(), "good"); err != nil || again != watchInterval {
			t.Errorf("looked after with %v, %v", again, err)
		}
	}
	w.set(func() { w.dead[w.sandboxes["held"]] = true })
	if _, err := w.keeper.reconcile(t.Context(), "held"); err != nil {
		t.Error(err)
	}
	if w.keeper.count() != 1 || !slices.Contains(w.read(), "forget held") {
		t.Errorf("a pod whose sandbox is gone: %v", w.read())
	}
	if _, err := r.load("held"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its record: %v", err)
	}
}

// When the API server is back, pods that were served by their records go on
// untouched, and the others are taken over by their objects.
func TestAdoptAfterRecords(t *testing.T) {
	w := newWorld(t, namespace("shop", "ambient"))
	w.keeper.records = newRecords(t, "boot-1")
	w.pins = []string{"good", "late"}
	if err := w.keeper.records.save(recorded(w, "good")); err != nil {
		t.Fatal(err)
	}
	c := fakeCapturer{w}
	if err := w.keeper.adoptRecorded(t.Context(), c, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"good", "late"} {
		ino := w.sandboxes[name]
		w.create(runningPod(w, name))
		if ino != 0 {
			w.set(func() { w.sandboxes[name] = ino })
		}
	}
	w.keeper.enable(c)
	w.work()
	w.keeper.queue.Add("late") // woken by a failure before, it must not be captured as if nothing held it
	w.until("a worker to look at it", func() bool { return w.keeper.queue.Len() == 0 })
	if err := w.keeper.adopt(context.Background(), c, nil); err != nil {
		t.Fatal(err)
	}
	w.follow()
	w.until("both, each once", func() bool {
		var got []string
		for _, e := range w.read() {
			if !strings.HasPrefix(e, "annotate") {
				got = append(got, e)
			}
		}
		return slices.Equal(got, []string{"prepare good", "attach good", "prepare late", "attach late"})
	}, func() { t.Error(w.read()) })
	if _, err := w.keeper.records.load("late"); err != nil {
		t.Error(err)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"boot":"b","kubeletUID":"u","netns":{"Dev":4,"Ino":5},"pod":{"uid":"u","name":"n","namespace":"s","serviceAccount":"a","addresses":["10.0.0.1"]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := parseRecord(b)
		if err == nil && (rec.Pod.Validate() != nil || rec.Netns.Ino == 0 || len(rec.Pod.Addresses) == 0) {
			t.Errorf("believed %+v", rec)
		}
	})
}
