package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weft-mesh/weft/hbone/conformance"
)

// hboneFlags are what the user said.
type hboneFlags struct {
	out                      output
	cert, key, roots         string
	peer                     string
	target, closed, foreign  string
	only                     string
	timeout                  time.Duration
	slow, strict, skipVerify bool
}

func hboneConformanceCommand() *cobra.Command {
	var f hboneFlags
	c := &cobra.Command{
		Use:   "hbone-conformance ADDRESS",
		Short: "Test whether a server speaks HBONE as docs/hbone.md specifies it",
		Long: `Test whether a server speaks HBONE as docs/hbone.md specifies it.

ADDRESS is the host:port of any implementation: a ztunnel, a waypoint, one of
your own. The client's certificate must be one that the server takes. Some of
the checks are attacks: do not point it at what others depend on.

  weft hbone-conformance 10.244.1.7:15008 --cert cert.pem --key key.pem \
    --roots root-cert.pem --target 10.244.1.7:8080

The certificate is one of a workload whose connections the policies of the
target let in, signed by the mesh's CA; docs/hbone.md says how to make one.

A server that does not get as far as HTTP/2 with this client is asked for
nothing more, and the checks that are left are skipped. Checks that need
--target or --closed are skipped without it. The exit code is 1 when a rule of
the level must is broken, or nothing could be tested.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.out.check(); err != nil {
				return err
			}
			cfg, err := f.config(args[0])
			if err != nil {
				return err
			}
			return f.run(cmd.Context(), cmd.OutOrStdout(), cfg)
		},
	}
	f.out.flag(c)
	fl := c.Flags()
	fl.StringVar(&f.cert, "cert", "", "file with the client's certificate chain, PEM (required)")
	fl.StringVar(&f.key, "key", "", "file with the client's private key, PEM (required)")
	fl.StringVar(&f.roots, "roots", "", "file with the roots that the server's certificate is verified by, PEM (required, or --insecure-skip-roots)")
	fl.BoolVar(&f.skipVerify, "insecure-skip-roots", false, "test a server whose roots you do not have: anybody could answer in its place")
	fl.StringVar(&f.peer, "peer", "", "SPIFFE ID that the server must prove; empty is any that the roots vouch for")
	fl.StringVar(&f.target, "target", "", "ip:port of an application behind the server that echoes; without it the checks that carry data are skipped")
	fl.StringVar(&f.closed, "closed", "", "ip:port behind the server where nothing listens")
	fl.StringVar(&f.foreign, "foreign", "", "ip:port that the server must refuse (default 192.0.2.1:80)")
	fl.StringVar(&f.only, "only", "", "make only the checks whose name begins with this, for example flow.")
	fl.DurationVar(&f.timeout, "timeout", 5*time.Second, "how long one answer may take")
	fl.BoolVar(&f.slow, "slow", false, "add the checks that take up to a minute")
	fl.BoolVar(&f.strict, "strict", false, "fail also when a rule of the level should is broken")
	return c
}

// config reads the files.
func (f *hboneFlags) config(address string) (conformance.Config, error) {
	var errs []error
	if _, _, err := net.SplitHostPort(address); err != nil {
		errs = append(errs, fmt.Errorf("address is %q: want host:port", address))
	}
	for _, t := range []struct{ name, value string }{{"target", f.target}, {"closed", f.closed}, {"foreign", f.foreign}} {
		if _, _, err := net.SplitHostPort(t.value); t.value != "" && err != nil {
			errs = append(errs, fmt.Errorf("--%s is %q: want ip:port", t.name, t.value))
		}
	}
	if f.peer != "" && !strings.HasPrefix(f.peer, "spiffe://") {
		errs = append(errs, fmt.Errorf("--peer is %q: want spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT", f.peer))
	}
	if f.timeout <= 0 {
		errs = append(errs, fmt.Errorf("--timeout is %v: want more than nothing", f.timeout))
	}
	if f.roots == "" && !f.skipVerify {
		errs = append(errs, errors.New("--roots is missing: whose server is it?"))
	}
	if f.cert == "" || f.key == "" {
		errs = append(errs, errors.New("--cert and --key are missing: servers of the mesh take nobody without a certificate"))
	}
	if err := errors.Join(errs...); err != nil {
		return conformance.Config{}, err
	}
	cert, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return conformance.Config{}, fmt.Errorf("read the client's certificate: %w", err)
	}
	cfg := conformance.Config{
		Address: address, Certificate: &cert, Peer: f.peer, Target: f.target, Closed: f.closed,
		Foreign: f.foreign, Only: f.only, Slow: f.slow, Timeout: f.timeout,
	}
	if f.roots != "" {
		pem, err := os.ReadFile(f.roots)
		if err != nil {
			return conformance.Config{}, fmt.Errorf("read roots: %w", err)
		}
		cfg.Roots = x509.NewCertPool()
		if !cfg.Roots.AppendCertsFromPEM(pem) {
			return conformance.Config{}, fmt.Errorf("read roots: %s has no certificate", f.roots)
		}
	}
	return cfg, nil
}

// run makes the checks and prints them, for people as they come.
func (f *hboneFlags) run(ctx context.Context, w io.Writer, cfg conformance.Config) error {
	var report func(conformance.Result)
	if f.out == "" {
		head := fmt.Sprintf("%-4s  %-6s  %-7s  %-36s  %s\n", "", "LEVEL", "SECTION", "CHECK", "DETAIL")
		report = func(r conformance.Result) {
			fmt.Fprint(w, head) // before the first: there may be none
			head = ""
			line := fmt.Sprintf("%-4s  %-6s  %-7s  %-36s  %s", r.Verdict, r.Level, r.Section, r.Name, r.Detail)
			fmt.Fprintln(w, strings.TrimRight(line, " "))
		}
	}
	rs, err := conformance.Run(ctx, cfg, report)
	if err != nil {
		return err
	}
	count := map[conformance.Verdict]int{}
	for _, r := range rs {
		count[r.Verdict]++
	}
	err = f.out.print(w, rs, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", count[conformance.Pass], count[conformance.Fail], count[conformance.Skip])
		return err
	})
	switch {
	case err != nil:
		return err
	case len(rs) == 0:
		return fmt.Errorf("no check begins with %q", f.only)
	case conformance.Failed(rs, f.strict):
		return fmt.Errorf("%s does not conform: %d checks failed", cfg.Address, count[conformance.Fail])
	}
	return nil
}
