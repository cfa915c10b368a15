package identity

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"
)

// rootsPause is how often the file with the roots is looked at. kubelet takes
// about a minute to bring a change.
const rootsPause = 5 * time.Second

// A RootsFile keeps Roots current with a file. The CA's answers change them too;
// the file counts again when it changes.
type RootsFile struct {
	*Roots
	path        string
	trustDomain string
	log         *slog.Logger
	last        []byte // owned by Run
	complaint   string // the last one that was logged
}

// NewRootsFile returns the roots of a trust domain as the file at path has them
// now, or none if it cannot be read; Run reads it again.
func NewRootsFile(path, trustDomain string, log *slog.Logger) *RootsFile {
	r := &RootsFile{Roots: new(Roots), path: path, trustDomain: trustDomain, log: log}
	r.read()
	return r
}

// Run follows the file until ctx ends.
func (r *RootsFile) Run(ctx context.Context) error {
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
func (r *RootsFile) read() {
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

// Loaded reports whether anybody is trusted.
func (r *RootsFile) Loaded() bool { return len(r.Certificates(r.trustDomain)) > 0 }

// TokenFile returns a function that reads a service-account token from a file,
// anew each time, because kubelet replaces it.
func TokenFile(path string) func() (string, error) {
	return func() (string, error) {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("read service-account token: %w", err)
		}
		token := strings.TrimSpace(string(b))
		if token == "" {
			return "", fmt.Errorf("read service-account token: %s is empty", path)
		}
		return token, nil
	}
}
