package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A record is what a cluster must know of itself to be found again and to be
// removed. It is written before anything it describes is made.
type record struct {
	ID string // chosen by the user
	// Token makes the names of namespaces and cgroups unique on the machine.
	Token string
	// Boot is the machine's boot: nothing but files outlives it.
	Boot    string
	Created time.Time
	Repo    string
	// Networked says that the network namespaces are complete.
	Networked bool
	// Programs are the paths of the programs that run the cluster.
	Programs programs
}

func (r record) name() string { return "weft-" + r.ID + "-" + r.Token }

const (
	recordFile = "cluster.json"
	lockFile   = "lock"
)

// unused makes sure that a directory holds nothing that Down would take along.
func unused(state string) error {
	entries, err := os.ReadDir(state)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != lockFile && e.Name() != recordFile+".next" {
			return fmt.Errorf("%s holds %s, which is not of a cluster: name an empty directory for the state", state, e.Name())
		}
	}
	return nil
}

// readRecord reads the record in a state directory; fs.ErrNotExist means there
// is no cluster.
func readRecord(state string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(state, recordFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read the cluster's record: %w: remove %s if no cluster runs from it", err, state)
	}
	return r, nil
}

func (r record) write(state string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(state, recordFile)
	if err := os.WriteFile(path+".next", append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".next", path)
}

// newRecord begins a cluster.
func newRecord(id, repo string) (record, error) {
	boot, err := bootID()
	if err != nil {
		return record{}, err
	}
	token := make([]byte, 3)
	rand.Read(token)
	return record{ID: id, Token: hex.EncodeToString(token), Boot: boot, Created: time.Now().UTC(), Repo: repo}, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// lock takes the state directory for one up or down at a time and returns how
// to give it back. While another process has it, lock says so once and waits.
func lock(ctx context.Context, state string, waiting func()) (func(), error) {
	path := filepath.Join(state, lockFile)
	for {
		if err := os.MkdirAll(state, 0o755); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed by another down just now
		}
		if err != nil {
			return nil, err
		}
		if err := flock(ctx, f, waiting); err != nil {
			f.Close()
			return nil, err
		}
		// Another down may have removed the file we waited for.
		var ours, now syscall.Stat_t
		if syscall.Fstat(int(f.Fd()), &ours) == nil && syscall.Stat(path, &now) == nil && ours.Ino == now.Ino && ours.Dev == now.Dev {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

func flock(ctx context.Context, f *os.File, waiting func()) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// pause waits a moment between two looks at a condition.
func pause(ctx context.Context) error {
	t := time.NewTimer(100 * time.Millisecond)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
