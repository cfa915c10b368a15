package conformance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// A Config says what is tested, and as whom.
type Config struct {
	// Address is the host:port of the server.
	Address string
	// Dial connects to Address; nil is as this process does.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Certificate is presented to the server; without it every check fails
	// that is not about its absence.
	Certificate *tls.Certificate
	// Roots verify the server. With nil its certificate is only read.
	Roots *x509.CertPool
	// Peer is the SPIFFE ID that the server must prove; empty is any.
	Peer string
	// Target is the authority of an application behind the server that sends
	// back what it receives and ends when its peer has. Empty skips the checks
	// that need one.
	Target string
	// Closed is an authority behind the server where nothing listens. Empty
	// skips the check of that.
	Closed string
	// Foreign is an authority that the server must not serve; empty is
	// 192.0.2.1:80, which nobody has (RFC 5737).
	Foreign string
	// Slow adds the checks that wait for the server's PING.
	Slow bool
	// Timeout bounds how long one answer may take: 5 s if it is zero.
	Timeout time.Duration
	// Only runs the checks whose name begins with it; empty is all.
	Only string
}

// A Level is how much a rule weighs.
type Level string

// The levels, as RFC 2119 has them.
const (
	Must   Level = "must"
	Should Level = "should"
)

// A Verdict is how a check ended.
type Verdict string

// The verdicts. A check is skipped when the Config lacks what it needs.
const (
	Pass Verdict = "pass"
	Fail Verdict = "fail"
	Skip Verdict = "skip"
)

// A Result is what one check found.
type Result struct {
	Name    string  `json:"name"`
	Section string  `json:"section"` // of docs/hbone.md
	Level   Level   `json:"level"`
	Verdict Verdict `json:"verdict"`
	// Detail says why a check failed or was skipped.
	Detail string `json:"detail,omitempty"`
	// Millis is how long it took.
	Millis int64 `json:"ms"`
}

// check is one rule of the specification and how to see whether it is kept.
type check struct {
	name, section string
	level         Level
	run           func(*suite) error
}

// basic reports whether nothing more can be learned of a server that fails k: a
// handshake with whom we want, and SETTINGS, come before everything else.
func (k check) basic() bool { return k.name == "tls.identity" || k.name == "h2.settings.ack" }

// suite is one run.
type suite struct {
	Config
	ctx context.Context
}

// skipError ends a check that cannot be made.
type skipError struct{ why string }

// Error returns what the check would need.
func (e skipError) Error() string { return e.why }

// checks returns all checks in the order of the specification.
func checks() []check {
	var all []check
	for _, group := range [][]check{tlsChecks(), connectionChecks(), errorChecks(), connectChecks(), dataChecks(), flowChecks(), floodChecks()} {
		all = append(all, group...)
	}
	return all
}

// Run makes every check, one after the other, and tells each result to report,
// which may be nil. The error says that no check could be made at all: a
// failed check is a result. A server that does not get as far as SETTINGS is
// not asked for more: the rest is skipped. A check that ctx cuts short is
// missing.
func Run(ctx context.Context, cfg Config, report func(Result)) ([]Result, error) {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.Foreign == "" {
		cfg.Foreign = "192.0.2.1:80"
	}
	if cfg.Certificate == nil {
		return nil, errors.New("test conformance: a certificate is needed, servers take nobody without one")
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: cfg.Timeout}).DialContext
	}
	c, err := cfg.Dial(ctx, "tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("test conformance: the server cannot be reached: %w", err)
	}
	_ = c.Close() // it was only knocked at
	s := &suite{Config: cfg, ctx: ctx}
	var results []Result
	var broken string // the basic check that failed
	for _, k := range checks() {
		if !strings.HasPrefix(k.name, cfg.Only) {
			continue
		}
		r := Result{Name: k.name, Section: k.section, Level: k.level, Verdict: Skip, Detail: "not tried, because " + broken + " failed"}
		if broken == "" {
			r = s.judge(k)
		}
		if ctx.Err() != nil {
			return results, context.Cause(ctx)
		}
		if k.basic() && r.Verdict == Fail {
			broken = k.name
		}
		results = append(results, r)
		if report != nil {
			report(r)
		}
	}
	return results, nil
}

// judge makes one check.
func (s *suite) judge(k check) Result {
	r := Result{Name: k.name, Section: k.section, Level: k.level, Verdict: Pass}
	start := time.Now()
	err := k.run(s)
	r.Millis = time.Since(start).Milliseconds()
	var skip skipError
	switch {
	case errors.As(err, &skip):
		r.Verdict, r.Detail = Skip, skip.why
	case err != nil:
		r.Verdict, r.Detail = Fail, err.Error()
	}
	return r
}

// Failed reports whether any rule of the level must was broken, or with strict
// any rule.
func Failed(rs []Result, strict bool) bool {
	for _, r := range rs {
		if r.Verdict == Fail && (strict || r.Level == Must) {
			return true
		}
	}
	return false
}

// target returns the authority of the echoing application.
func (s *suite) target() (string, error) {
	if s.Target == "" {
		return "", skipError{"no --target: the authority of an application that echoes"}
	}
	return s.Target, nil
}
