package control

import (
	"bytes"
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

// OpenAuthority returns the mesh's signing authority and the name of the Secret
// that it is from: the plugged-in one, or our own, which is made at the first
// start. It waits until there is one: a
// Secret that is there and cannot be used is never passed over for another
// root, since that would split the mesh. Its error is the end of ctx.
func OpenAuthority(ctx context.Context, secrets Secrets, domain string, log *slog.Logger) (*ca.Authority, string, error) {
	var authority *ca.Authority
	var secret, last string
	var logged time.Time
	err := run.Retry(ctx, run.Backoff{Min: 200 * time.Millisecond, Max: 5 * time.Second}, func(ctx context.Context) error {
		a, from, err := openAuthority(ctx, secrets, domain, log)
		if err != nil {
			if err.Error() != last || time.Since(logged) > time.Minute {
				last, logged = err.Error(), time.Now()
				log.Error("there is no CA yet, and no proxy is served until there is", "error", err)
			}
			return err
		}
		authority, secret = a, from
		log.Info("the CA is open", "secret", from, "trustDomain", domain, "signsUntil", a.Expiry().UTC(), "rootUntil", a.RootExpiry().UTC())
		return nil
	})
	return authority, secret, err
}

// openAuthority tries once. It also returns the name of the Secret that was
// read.
func openAuthority(ctx context.Context, secrets Secrets, domain string, log *slog.Logger) (*ca.Authority, string, error) {
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
	log.Info("there is no CA: making a new root. If this mesh had one, its certificates are no longer trusted until every proxy has a new one", "secret", ownSecret)
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

// A Keeper looks after the Secret of a CA that is in use. Two replicas, or one
// before and after a restart, must not sign with different roots.
type Keeper struct {
	Secrets   Secrets
	Authority *ca.Authority
	Secret    string // that Authority was read from
	Log       *slog.Logger
}

// keepEvery is how often a Keeper looks.
const keepEvery = time.Minute

// Run looks after the Secret until ctx ends. Its error says that another CA is
// in force, and that this process has to start again to use it.
func (k Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := k.look(ctx); err != nil {
			return err
		}
	}
}

// look looks once. A Secret that cannot be read or used now changes nothing: a
// process that starts with it says so, and this one still has the CA.
func (k Keeper) look(ctx context.Context) error {
	for _, name := range []string{pluginSecret, ownSecret} {
		data, ok, err := k.Secrets.Read(ctx, name)
		if err != nil {
			return nil // it is said elsewhere that the API server is away
		}
		if !ok {
			continue
		}
		stored, err := parseAuthority(name, k.Authority.TrustDomain(), data)
		if err != nil {
			k.Log.Error("the stored CA is not used; this process goes on with the one it has, and a new one will not start", "error", err)
			return nil
		}
		if !sameAuthority(stored, k.Authority) {
			return fmt.Errorf("the Secret %s holds another CA than the one in use, which is from %s: starting again with it; "+
				"proxies trust each other once all of them have certificates of it", name, k.Secret)
		}
		return nil
	}
	if k.Secret != ownSecret {
		k.Log.Error("the Secret of the CA in use is gone; this process goes on with it, and the next one makes a new root: put the Secret back, or restart weft-control", "secret", k.Secret)
		return nil
	}
	files, err := k.Authority.Files()
	if err == nil {
		_, err = k.Secrets.CreateOnce(ctx, ownSecret, files.Data())
	}
	if err != nil {
		k.Log.Error("the Secret of the CA in use is gone and cannot be put back", "secret", ownSecret, "error", err)
		return nil
	}
	k.Log.Warn("the Secret of the CA in use was gone and has been put back; find out who deleted it", "secret", ownSecret)
	return nil
}

// sameAuthority reports whether a and b sign and are trusted alike.
func sameAuthority(a, b *ca.Authority) bool {
	x, err := a.Files()
	if err != nil {
		return false
	}
	y, err := b.Files()
	return err == nil && bytes.Equal(x.Cert, y.Cert) && bytes.Equal(x.Key, y.Key) && bytes.Equal(x.Root, y.Root) && bytes.Equal(x.Chain, y.Chain)
}
