package control

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/internal/run"
)

// The Secrets of the system namespace that a CA is read from.
const (
	// pluginSecret holds a CA that the user brings. It wins.
	pluginSecret = "cacerts"
	// ownSecret holds the self-signed root that is made when there is none.
	ownSecret = "weft-ca-secret"
)

// Secrets reads and keeps the Secrets of the system namespace.
type Secrets interface {
	// Read returns the data of a Secret, and whether it exists.
	Read(ctx context.Context, name string) (data map[string][]byte, ok bool, err error)
	// CreateOnce stores data unless the Secret exists, and returns what is
	// stored then.
	CreateOnce(ctx context.Context, name string, data map[string][]byte) (map[string][]byte, error)
}

// OpenAuthority returns the mesh's signing authority: the plugged-in one, or
// our own, which is made at the first start. It waits until there is one: a
// Secret that is there and cannot be used is never passed over for another
// root, since that would split the mesh. Its error is the end of ctx.
func OpenAuthority(ctx context.Context, secrets Secrets, domain string, log *slog.Logger) (*ca.Authority, error) {
	var authority *ca.Authority
	var last string
	var logged time.Time
	err := run.Retry(ctx, run.Backoff{Min: 200 * time.Millisecond, Max: 5 * time.Second}, func(ctx context.Context) error {
		a, from, err := openAuthority(ctx, secrets, domain)
		if err != nil {
			if err.Error() != last || time.Since(logged) > time.Minute {
				last, logged = err.Error(), time.Now()
				log.Error("there is no CA yet, and no proxy is served until there is", "error", err)
			}
			return err
		}
		authority = a
		log.Info("the CA is open", "secret", from, "trustDomain", domain, "signsUntil", a.Expiry().UTC(), "rootUntil", a.RootExpiry().UTC())
		return nil
	})
	return authority, err
}

// openAuthority tries once. It also returns the name of the Secret that was
// read.
func openAuthority(ctx context.Context, secrets Secrets, domain string) (*ca.Authority, string, error) {
	for _, name := range []string{pluginSecret, ownSecret} {
		data, ok, err := secrets.Read(ctx, name)
		if err != nil {
			return nil, "", err
		}
		if ok {
			a, err := parseAuthority(name, domain, data)
			return a, name, err
		}
	}
	fresh, err := ca.New(domain)
	if err != nil {
		return nil, "", err
	}
	files, err := fresh.Files()
	if err != nil {
		return nil, "", err
	}
	stored, err := secrets.CreateOnce(ctx, ownSecret, files.Data())
	if err != nil {
		return nil, "", err
	}
	a, err := parseAuthority(ownSecret, domain, stored)
	return a, ownSecret, err
}

func parseAuthority(name, domain string, data map[string][]byte) (*ca.Authority, error) {
	a, err := ca.Parse(domain, ca.FilesOf(data))
	if err == nil {
		return a, nil
	}
	do := "correct the Secret, or delete it to fall back to a self-signed root"
	if name == ownSecret {
		do = "restore the Secret from a backup; deleting it makes a new root, and certificates of the old one are no longer trusted"
	}
	return nil, fmt.Errorf("the Secret %s cannot be used: %w; %s", name, err, do)
}
