package mesh

import (
	"fmt"
	"strings"
)

// An Identity is who a workload is: its trust domain, namespace and service
// account. It is comparable. The zero Identity is nobody, and matches nothing.
type Identity struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// IsZero reports whether id is nobody.
func (id Identity) IsZero() bool { return id == Identity{} }

// String returns the SPIFFE ID, "spiffe://td/ns/namespace/sa/account", or ""
// for the zero Identity.
func (id Identity) String() string {
	if id.IsZero() {
		return ""
	}
	return "spiffe://" + id.Principal()
}

// Principal returns the identity as policies write it: the SPIFFE ID without
// its scheme.
func (id Identity) Principal() string {
	if id.IsZero() {
		return ""
	}
	return id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}

// MarshalText writes the SPIFFE ID.
func (id Identity) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads a SPIFFE ID; an empty text is the zero Identity.
func (id *Identity) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*id = Identity{}
		return nil
	}
	got, err := ParseIdentity(string(b))
	if err != nil {
		return err
	}
	*id = got
	return nil
}

// ParseIdentity reads a SPIFFE ID of the form
// "spiffe://trust-domain/ns/namespace/sa/account". Every other form is an
// error: an identity that is half understood is not one.
func ParseIdentity(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return Identity{}, fmt.Errorf("parse identity %q: want spiffe://trust-domain/ns/namespace/sa/account", s)
	}
	p := strings.Split(rest, "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "sa" || p[0] == "" || p[2] == "" || p[4] == "" {
		return Identity{}, fmt.Errorf("parse identity %q: want spiffe://trust-domain/ns/namespace/sa/account", s)
	}
	for _, part := range []string{p[0], p[2], p[4]} {
		if i := strings.IndexFunc(part, notIdentityRune); i >= 0 {
			return Identity{}, fmt.Errorf("parse identity %q: character %q is not allowed", s, part[i])
		}
		if part == "." || part == ".." {
			return Identity{}, fmt.Errorf("parse identity %q: %q is not a part of a path", s, part) // SPIFFE-ID 2.2
		}
	}
	return Identity{TrustDomain: p[0], Namespace: p[2], ServiceAccount: p[4]}, nil
}

// notIdentityRune reports whether r may not stand in a part of a SPIFFE ID
// (SPIFFE-ID 2.1 and 2.2: letters, digits, dot, dash, underscore).
func notIdentityRune(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '.', r == '-', r == '_':
		return false
	}
	return true
}
