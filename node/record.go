package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/netns"
)

// A record is what the agent writes down of a captured pod, so that an agent
// after it can serve the pod while the API server is away. It holds no
// secrets, but whose identity a namespace gets: only root may write it, and it
// counts only if all of it still holds. See sandboxOf.
type record struct {
	Version   int         `json:"version"`
	Boot      string      `json:"boot"`       // the kernel's boot_id: namespaces do not outlive a boot
	Kubelet   string      `json:"kubeletUID"` // the UID that the pod's processes run under
	Netns     netns.ID    `json:"netns"`
	Container string      `json:"container,omitempty"`
	DNS       bool        `json:"dns,omitempty"`
	Pod       handoff.Pod `json:"pod"`
}

// recordVersion is the version of the records that are written and read.
const recordVersion = 1

// maxRecord bounds a record, in bytes.
const maxRecord = 16 << 10

// records is a directory with a record for each captured pod. A nil *records
// keeps nothing.
type records struct {
	dir  string
	boot string
}

// openRecords makes the directory if it is missing. Nobody else may write it.
func openRecords(dir, procRoot string) (*records, error) {
	boot, err := os.ReadFile(filepath.Join(procRoot, "sys/kernel/random/boot_id"))
	if err != nil {
		return nil, fmt.Errorf("open the records of captured pods: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open the records of captured pods: %w", err)
	}
	if err := onlyOurs(dir, unix.S_IFDIR); err != nil {
		return nil, fmt.Errorf("open the records of captured pods: %w", err)
	}
	return &records{dir: dir, boot: strings.TrimSpace(string(boot))}, nil
}

// onlyOurs wants a file of this type that this user owns and no other may
// write.
func onlyOurs(path string, kind uint32) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return checkOurs(path, kind, st)
}

func checkOurs(path string, kind uint32, st unix.Stat_t) error {
	if st.Mode&unix.S_IFMT != kind || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fmt.Errorf("%s is of mode %o and user %d: want one that only user %d may write; remove it", path, st.Mode, st.Uid, os.Geteuid())
	}
	return nil
}

// save writes the record of a pod, all of it or nothing.
func (r *records) save(rec record) error {
	if r == nil {
		return nil
	}
	rec.Version, rec.Boot = recordVersion, r.boot
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	path := filepath.Join(r.dir, rec.Pod.UID)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write down a captured pod: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write down a captured pod: %w", err)
	}
	return nil
}

// load returns the record of a pod. A missing one is fs.ErrNotExist; one that
// is not ours, not whole or of another boot is an error as well.
func (r *records) load(uid string) (record, error) {
	if r == nil {
		return record{}, fs.ErrNotExist
	}
	path := filepath.Join(r.dir, uid)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return record{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return record{}, &fs.PathError{Op: "fstat", Path: path, Err: err}
	}
	if err := checkOurs(path, unix.S_IFREG, st); err != nil {
		return record{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return record{}, err
	}
	if len(b) > maxRecord {
		return record{}, fmt.Errorf("%s has more than %d bytes", path, maxRecord)
	}
	rec, err := parseRecord(b)
	switch {
	case err != nil:
		return record{}, fmt.Errorf("read %s: %w", path, err)
	case rec.Pod.UID != uid:
		return record{}, fmt.Errorf("%s is the record of pod %s", path, rec.Pod.UID)
	case rec.Boot != r.boot:
		return record{}, fmt.Errorf("%s is from before the node was booted", path)
	}
	return rec, nil
}

// parseRecord reads one record and nothing else.
func parseRecord(b []byte) (record, error) {
	var rec record
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&rec); err != nil {
		return record{}, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return record{}, errors.New("something follows the record")
	}
	if rec.Version != recordVersion {
		return record{}, fmt.Errorf("it is of version %d, this agent reads version %d", rec.Version, recordVersion)
	}
	if err := rec.Pod.Validate(); err != nil {
		return record{}, err
	}
	if len(rec.Pod.Addresses) == 0 || rec.Kubelet == "" || rec.Netns.Ino == 0 {
		return record{}, errors.New("it lacks the pod's addresses, UID or network namespace")
	}
	return rec, nil
}

// remove removes the record of a pod.
func (r *records) remove(uid string) error {
	if r == nil {
		return nil
	}
	if err := os.Remove(filepath.Join(r.dir, uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// sweep removes every record but those of the pods in keep.
func (r *records) sweep(keep map[string]bool) error {
	if r == nil {
		return nil
	}
	list, err := os.ReadDir(r.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range list {
		if !keep[e.Name()] {
			errs = append(errs, os.RemoveAll(filepath.Join(r.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// sandboxOf finds the sandbox that a record is about. Three things must agree:
// a process whose cgroup names the pod's UID (or, without one, a named
// namespace), a namespace of the recorded number, and in it the recorded
// addresses. Any of them alone can be another pod's by now.
func (k *keeper) sandboxOf(rec record) (*sandbox, error) {
	s, err := k.sandboxes.find(rec.Kubelet, rec.Pod.Addresses)
	if err != nil {
		return nil, err
	}
	if s.id != rec.Netns {
		s.close()
		return nil, fmt.Errorf("its network namespace is %v and was %v when it was captured: it is not the same pod's", s.id, rec.Netns)
	}
	return s, nil
}

// write writes a captured pod down. Without its record it is captured just as
// well; only an agent that starts without the API server could not serve it.
func (k *keeper) write(m *member) {
	rec := record{Kubelet: m.kubelet, Netns: m.sandbox.id, Container: m.container, DNS: m.dns, Pod: m.pod}
	if err := k.records.save(rec); err != nil {
		k.log.Warn("a captured pod was not written down: if the agent starts again while the API server is away, the pod is served only when that is back", "pod", m.pod.Namespace+"/"+m.pod.Name, "error", err)
	}
}
