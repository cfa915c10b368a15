package handoff

import (
	"encoding/json"
	"fmt"
	"os"
)

// kind is what a message asks or answers. The zero kind is invalid.
type kind string

const (
	hello       kind = "hello"       // ztunnel: Version, Instance, DNS, Pair, Active, Eager, Twin
	hold        kind = "hold"        // ztunnel: Pod and the files that it serves it with
	holdEnd     kind = "holdEnd"     // ztunnel: all holds are sent
	ack         kind = "ack"         // ztunnel: Seq of the request, Error if it failed
	add         kind = "add"         // agent: Pod and files
	snapshotEnd kind = "snapshotEnd" // agent: every captured pod has been sent; Pairs
	activate    kind = "activate"    // agent: accept connections from now on; to one that does, the question whether it is alive
	del         kind = "del"         // agent: UID
	refuse      kind = "refuse"      // agent: Error; the connection is over
)

// maxPacket bounds a packet's text. A pod is a few hundred bytes.
const maxPacket = 16 << 10

// maxFiles is the number of files that one message can carry.
const maxFiles = 2 + Roles

// message is one packet.
type message struct {
	Kind     kind   `json:"kind"`
	Version  int    `json:"version,omitempty"`
	Instance string `json:"instance,omitempty"`
	DNS      bool   `json:"dns,omitempty"`    // takes the sockets of DNS4 and DNS6
	Pair     string `json:"pair,omitempty"`   // one of those with this name is to be active; empty: it is always
	Active   bool   `json:"active,omitempty"` // it accepts connections already
	Eager    bool   `json:"eager,omitempty"`  // it is to be the active one if there is none
	Twin     bool   `json:"twin,omitempty"`   // an active one of its pair lives, and will connect
	Pairs    bool   `json:"pairs,omitempty"`  // the agent knows of pairs, and says who is active
	Seq      uint64 `json:"seq,omitempty"`
	Pod      *Pod   `json:"pod,omitempty"`
	UID      string `json:"uid,omitempty"`
	Error    string `json:"error,omitempty"`
	// Files names the files beside the packet, in their order.
	Files []string `json:"files,omitempty"`
}

// slots are the names of the files of a pod, in the order of Files.list.
func slots() []string {
	names := []string{"netns", "blessed"}
	for r := range Role(Roles) {
		names = append(names, r.String())
	}
	return names
}

// decode reads a packet that came with files number of files. A message that
// it returns without error has all that its kind needs.
func decode(b []byte, files int) (message, error) {
	var m message
	if err := json.Unmarshal(b, &m); err != nil {
		return message{}, fmt.Errorf("read handoff message: %v", err)
	}
	if len(m.Files) != files {
		return message{}, fmt.Errorf("read handoff message %q: it names %d files and carries %d", m.Kind, len(m.Files), files)
	}
	if err := m.check(); err != nil {
		return message{}, fmt.Errorf("read handoff message %q: %w", m.Kind, err)
	}
	return m, nil
}

// check reports whether m is complete for its kind.
func (m message) check() error {
	if m.Kind != add && m.Kind != hold && len(m.Files) != 0 {
		return fmt.Errorf("it carries %d files, want none", len(m.Files))
	}
	switch m.Kind {
	case add, hold:
		if m.Pod == nil {
			return fmt.Errorf("it has no pod")
		}
		if err := m.Pod.Validate(); err != nil {
			return err
		}
		return checkFiles(m.Files)
	case del:
		return validUID(m.UID)
	case hello, holdEnd, ack, snapshotEnd, activate, refuse:
		return nil
	}
	return fmt.Errorf("the kind is not known")
}

// checkFiles wants the netns, the map, at least one listener for TCP, and no
// name twice. A name that is not known is refused: a file that nobody serves
// would be a pod whose traffic hangs.
func checkFiles(names []string) error {
	known := make(map[string]bool)
	for _, s := range slots() {
		known[s] = true
	}
	seen := make(map[string]bool)
	for _, n := range names {
		if !known[n] || seen[n] {
			return fmt.Errorf("file %q is not known or named twice", n)
		}
		seen[n] = true
	}
	listeners := len(names) - 2
	for _, r := range []Role{DNS4, DNS6} {
		if seen[r.String()] {
			listeners--
		}
	}
	if !seen["netns"] || !seen["blessed"] || listeners < 1 {
		return fmt.Errorf("files %q: want netns, blessed and listeners", names)
	}
	return nil
}

// name sets m.Files and returns the files to send beside it.
func (m *message) attach(f Files) []*os.File {
	var out []*os.File
	m.Files = nil
	names := slots()
	for i, file := range f.list() {
		if file != nil {
			out = append(out, file)
			m.Files = append(m.Files, names[i])
		}
	}
	return out
}

// detach gives each file that came with m its place.
func (m message) detach(files []*os.File) Files {
	var f Files
	at := map[string]**os.File{"netns": &f.Netns, "blessed": &f.Blessed}
	for r := range Role(Roles) {
		at[r.String()] = &f.Listeners[r]
	}
	for i, n := range m.Files {
		*at[n] = files[i]
	}
	return f
}
