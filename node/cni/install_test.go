package cni

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for: %s", what)
		}
		<-tick.C
	}
}

func put(t *testing.T, path, data string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), mode); err != nil {
		t.Fatal(err)
	}
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// startInstaller runs an installer over fresh directories until the test ends.
func startInstaller(t *testing.T, confDir, binDir string) *Installer {
	t.Helper()
	src := filepath.Join(t.TempDir(), "plugin")
	put(t, src, "the plugin", 0o755)
	i := NewInstaller(InstallerConfig{ConfDir: confDir, BinDir: binDir, Source: src, Entry: testEntry, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- i.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return i
}

func TestInstallerRepairs(t *testing.T) {
	conf, bin := t.TempDir(), t.TempDir()
	list, plugin := filepath.Join(conf, "10-net.conflist"), filepath.Join(bin, PluginType)
	put(t, list, bridge, 0o640)
	i := startInstaller(t, conf, bin)
	good := func() bool {
		return i.State().Installed && read(list) == bridgeChained && read(plugin) == "the plugin"
	}
	eventually(t, "installation", good)
	if st, _ := os.Stat(list); st.Mode().Perm() != 0o640 {
		t.Errorf("mode of the conflist became %v", st.Mode())
	}
	if st, _ := os.Stat(plugin); st.Mode().Perm() != 0o755 {
		t.Errorf("mode of the plugin is %v", st.Mode())
	}

	put(t, list, bridge, 0o640)
	eventually(t, "the conflist that its owner wrote again", good)
	put(t, plugin, "garbage!!!", 0o755)
	eventually(t, "the overwritten plugin", good)
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the removed plugin", good)

	first := filepath.Join(conf, "05-first.conflist")
	put(t, first, bridge, 0o600)
	eventually(t, "a conflist sorted before", func() bool {
		return read(first) == bridgeChained && i.State().Conflist == "05-first.conflist"
	})
	for _, f := range []string{first, list} {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a status that says what is missing", func() bool {
		s := i.State()
		return !s.Installed && strings.Contains(s.Message, "install a CNI network plugin")
	})
	put(t, list, bridge, 0o640)
	eventually(t, "the network plugin that came back", good)

	left, err := os.ReadDir(conf)
	if err != nil || len(left) != 1 {
		t.Errorf("files left in the directory: %v, %v", left, err)
	}
}

func TestInstallerWaitsForMissingDirectories(t *testing.T) {
	top := t.TempDir()
	conf, bin := filepath.Join(top, "net.d"), filepath.Join(top, "bin")
	i := startInstaller(t, conf, bin)
	eventually(t, "a status that names the plugin directory", func() bool { return strings.Contains(i.State().Message, "cni.binDir") })
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a status that names the configuration directory", func() bool { return strings.Contains(i.State().Message, "cni.confDir") })
}

func TestRemove(t *testing.T) {
	conf, bin := t.TempDir(), t.TempDir()
	src := filepath.Join(t.TempDir(), "plugin")
	put(t, src, "the plugin", 0o755)
	lone := `{"cniVersion":"1.0.0","name":"n","type":"a"}`
	put(t, filepath.Join(conf, "10-a.conf"), lone, 0o600)
	put(t, filepath.Join(conf, "20-b.conflist"), bridgeChained, 0o600)
	i := NewInstaller(InstallerConfig{ConfDir: conf, BinDir: bin, Source: src, Entry: testEntry, Log: slog.New(slog.DiscardHandler)})
	if active, err := i.install(); err != nil || active != "10-a-weft.conflist" {
		t.Fatal(active, err)
	}
	if err := i.Remove(); err != nil {
		t.Fatal(err)
	}
	if got := read(filepath.Join(conf, "20-b.conflist")); got != bridge {
		t.Errorf("conflist not given back: %s", got)
	}
	if _, err := os.Stat(filepath.Join(conf, "10-a-weft.conflist")); !os.IsNotExist(err) {
		t.Errorf("derived conflist still there: %v", err)
	}
	if i.State().Installed {
		t.Error("says it is installed")
	}
}
