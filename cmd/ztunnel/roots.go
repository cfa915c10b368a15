package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/weft-mesh/weft/identity"
)

// rootsPause is how often the file with the roots is looked at. kubelet takes
// about a minute to bring a change.
const rootsPause = 5 * time.Second

// rootsFile keeps Roots current with a file. The CA's answers change them too;
// the file counts again when it changes.
type rootsFile struct {
	*identity.Roots
	path        string
	trustDomain string
	log         *slog.Logger
	last        []byte // owned by Run
	complaint   string // the last one that was logged
}

// newRootsFile returns roots that are as the file is now, or empty if it cannot
// be read; Run reads it again.
func newRootsFile(c config, log *slog.Logger) *rootsFile {
	r := &rootsFile{Roots: new(identity.Roots), path: c.rootsFile, trustDomain: c.trustDomain, log: log}
	r.read()
	return r
}

// Run follows the file until ctx ends.
func (r *rootsFile) Run(ctx context.Context) error {
	tick := time.NewTicker(rootsPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			r.read()
		}
	}
}

// read takes over what the file says, if that is new. A file that is missing or
// broken leaves the roots as they are.
func (r *rootsFile) read() {
	text, err := os.ReadFile(r.path)
	if err == nil && !bytes.Equal(text, r.last) {
		if err = r.Update(r.trustDomain, text); err == nil {
			r.last = text
			r.log.Info("trusting the roots of the mesh", "file", r.path, "roots", len(r.Certificates(r.trustDomain)))
		}
	}
	switch {
	case err == nil:
		r.complaint = ""
	case err.Error() != r.complaint:
		r.complaint = err.Error()
		r.log.Error("cannot read the roots of the mesh: what was trusted before stays so", "file", r.path, "error", err)
	}
}

// loaded reports whether anybody is trusted.
func (r *rootsFile) loaded() bool { return len(r.Certificates(r.trustDomain)) > 0 }
