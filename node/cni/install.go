package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// repairInterval is how often the installer looks without being told to: for
// directories that do not exist yet and events that got lost.
const repairInterval = 5 * time.Second

// settle is how long the installer waits after an event, so that it does not
// read a file that somebody is still writing.
const settle = 20 * time.Millisecond

// InstallerConfig says what to install and where. Every field but Log is
// required.
type InstallerConfig struct {
	ConfDir string // where the runtime reads its network configuration
	BinDir  string // where the runtime finds plugins
	Source  string // the plugin's binary, as it came with the agent
	Entry   Entry  // our part of the conflist
	Log     *slog.Logger
}

// InstallState is how the installation stands. The zero value means that
// nothing was tried yet.
type InstallState struct {
	Installed bool   `json:"installed"`
	Conflist  string `json:"conflist,omitempty"` // the file that the runtime takes
	Message   string `json:"message,omitempty"`  // why it is not installed, and what to do
}

// An Installer keeps the plugin in the runtime's chain.
type Installer struct {
	cfg InstallerConfig

	// verified is the installed binary as it was when its content was last
	// compared. Only Run touches it.
	verified os.FileInfo

	mu    sync.Mutex
	state InstallState
}

// NewInstaller returns an installer that has not done anything.
func NewInstaller(cfg InstallerConfig) *Installer { return &Installer{cfg: cfg} }

// State returns how the installation stands.
func (i *Installer) State() InstallState {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.state
}

// Run installs the plugin and repairs the installation until ctx ends. It
// leaves the plugin installed: see Remove. What is in its way goes to State
// and, once per change, to the log.
func (i *Installer) Run(ctx context.Context) error {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the CNI directories: %v", err)
	}
	defer watch.Close()
	tick := time.NewTicker(repairInterval)
	defer tick.Stop()
	for {
		for _, dir := range []string{i.cfg.ConfDir, i.cfg.BinDir} {
			// A directory that is missing is reported by install, and tried
			// again with the next tick.
			_ = watch.Add(dir)
		}
		i.record(i.install())
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case err := <-watch.Errors:
			i.cfg.Log.Warn("watching the CNI directories lost events; looking again", "error", err)
		case <-watch.Events:
			if !quiet(ctx, watch.Events) {
				return nil
			}
		}
	}
}

// quiet takes events until there was none for a moment. It reports whether ctx
// still runs.
func quiet(ctx context.Context, events <-chan fsnotify.Event) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-events:
		case <-time.After(settle):
			return true
		}
	}
}

// record keeps the outcome of one look and logs it if it is news.
func (i *Installer) record(conflist string, err error) {
	s := InstallState{Installed: err == nil, Conflist: conflist}
	if err != nil {
		s.Message = err.Error()
	}
	i.mu.Lock()
	news := s != i.state
	i.state = s
	i.mu.Unlock()
	switch {
	case !news:
	case err != nil:
		i.cfg.Log.Error("the CNI plugin is not installed; new pods would start outside the mesh", "error", err)
	default:
		i.cfg.Log.Info("the CNI plugin is installed", "conflist", filepath.Join(i.cfg.ConfDir, conflist))
	}
}

// install makes one pass: the binary first, so that a conflist never names a
// plugin that is not there.
func (i *Installer) install() (conflist string, err error) {
	if err := i.installBinary(); err != nil {
		return "", err
	}
	files, err := readConfDir(i.cfg.ConfDir)
	if err != nil {
		return "", err
	}
	in, err := planInstall(files, i.cfg.Entry)
	for _, e := range in.edits {
		if err := apply(i.cfg.ConfDir, e); err != nil {
			return "", err
		}
		i.cfg.Log.Info("changed the network configuration of the node", "file", filepath.Join(i.cfg.ConfDir, e.name), "removed", e.data == nil)
	}
	if err != nil {
		return "", fmt.Errorf("chain the CNI plugin in %s: %v", i.cfg.ConfDir, err)
	}
	return in.active, nil
}

// Remove takes the plugin out of every configuration of the node. Call it when
// Run has returned. The binary stays: runtimes that remember the chain a pod
// was started with still call it when that pod is deleted, and could not
// delete the pod without it.
func (i *Installer) Remove() error {
	files, err := readConfDir(i.cfg.ConfDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range planRemove(files) {
		if err := apply(i.cfg.ConfDir, e); err != nil {
			errs = append(errs, err)
			continue
		}
		i.cfg.Log.Info("took the CNI plugin out of the network configuration", "file", filepath.Join(i.cfg.ConfDir, e.name))
	}
	i.mu.Lock()
	i.state = InstallState{Message: "taken out, because Weft is being uninstalled"}
	i.mu.Unlock()
	return errors.Join(errs...)
}

// readConfDir reads the files that a runtime would look at. One that vanishes
// meanwhile is passed over.
func readConfDir(dir string) ([]confFile, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the CNI configuration directory %s does not exist; install a CNI network plugin, or set cni.confDir to the directory that the container runtime of this node reads", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read the CNI configuration directory: %v", err)
	}
	var files []confFile
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conflist", ".conf", ".json":
		default:
			continue
		}
		data, err := readSmall(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the CNI configuration: %v", err)
		}
		files = append(files, confFile{e.Name(), data})
	}
	return files, nil
}

// maxConf bounds a configuration file, in bytes. Real ones have a few hundred.
const maxConf = 1 << 20

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is not a regular file", path))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err == nil && len(b) > maxConf {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxConf)
	}
	return b, err
}

// apply makes one edit so that a reader finds either the old file or the new.
func apply(dir string, e edit) error {
	path := filepath.Join(dir, e.name)
	if e.data == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove a CNI configuration: %v", err)
		}
		return nil
	}
	// The mode that the network plugin chose, which may hide a token.
	mode := fs.FileMode(0o600)
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
	}
	if err := replace(path, bytes.NewReader(e.data), mode); err != nil {
		return fmt.Errorf("write a CNI configuration: %v", err)
	}
	return nil
}

// installBinary copies the plugin's binary unless the same is there already.
func (i *Installer) installBinary() error {
	from, to := i.cfg.Source, filepath.Join(i.cfg.BinDir, PluginType)
	if st, err := os.Stat(to); err == nil && unchanged(i.verified, st) {
		return nil
	}
	same, err := sameFile(from, to)
	if err != nil {
		return err
	}
	if !same {
		src, err := os.Open(from)
		if err != nil {
			return fmt.Errorf("install the CNI plugin: %v", err)
		}
		defer src.Close()
		if err := replace(to, src, 0o755); err != nil {
			return fmt.Errorf("install the CNI plugin into %s: %v; cni.binDir has to be the directory where the container runtime of this node finds its plugins", i.cfg.BinDir, err)
		}
	}
	if i.verified, err = os.Stat(to); err != nil {
		return fmt.Errorf("install the CNI plugin: %v", err)
	}
	return nil
}

// unchanged reports whether a file seen twice was left alone between.
func unchanged(was, is os.FileInfo) bool {
	return was != nil && os.SameFile(was, is) && was.Size() == is.Size() && was.Mode() == is.Mode() && was.ModTime().Equal(is.ModTime())
}

// sameFile reports whether two files have the same bytes. A missing second
// file differs.
func sameFile(from, to string) (bool, error) {
	a, err := os.Open(from)
	if err != nil {
		return false, fmt.Errorf("install the CNI plugin: %v; the image of weft-node is not complete", err)
	}
	defer a.Close()
	b, err := os.Open(to)
	if err != nil {
		return false, nil
	}
	defer b.Close()
	sa, errA := a.Stat()
	sb, errB := b.Stat()
	if errA != nil || errB != nil || sa.Size() != sb.Size() || sb.Mode().Perm()&0o111 == 0 {
		return false, nil
	}
	bufA, bufB := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(a, bufA)
		m, errB := io.ReadFull(b, bufB)
		if !bytes.Equal(bufA[:n], bufB[:m]) {
			return false, nil
		}
		if errA != nil || errB != nil {
			return errors.Is(errA, io.EOF) == errors.Is(errB, io.EOF), nil
		}
	}
}

// replace writes a file beside path and renames it over path. The name it
// writes under ends in none of the suffixes that runtimes read.
func replace(path string, content io.Reader, mode fs.FileMode) (err error) {
	dir, base := filepath.Split(path)
	f, err := os.CreateTemp(dir, "."+strings.ReplaceAll(base, ".", "-")+".weft-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = io.Copy(f, content); err != nil {
		return err
	}
	if err = f.Chmod(mode); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
