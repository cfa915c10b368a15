package conformance

import (
	"fmt"

	h2 "golang.org/x/net/http2"
)

// connectChecks are about opening connections.
func connectChecks() []check {
	refused := func(name, section string, level Level, want string, fields func(*suite) []string) check {
		return check{name, section, level, with(func(s *suite, p *peer) error {
			return p.wantStatus(p.ask(false, fields(s)...), want)
		})}
	}
	malformed := func(name string, fields func(target string) []string) check {
		return check{"connect.malformed." + name, "5.1", Must, with(func(s *suite, p *peer) error {
			target := s.Target
			if target == "" {
				target = s.Foreign
			}
			st := p.ask(false, fields(target)...)
			if err := p.wantStreamError(st, h2.ErrCodeProtocol); err != nil {
				return err
			}
			if p.ended != nil || len(p.goAways) > 0 {
				return nil // allowed: RFC 9113 5.4.2
			}
			return p.alive()
		})}
	}
	one := func(a string) func(*suite) []string { return func(*suite) []string { return connectTo(a) } }
	return []check{
		{"connect.ok", "5.5", Must, with(func(s *suite, p *peer) error {
			target, err := s.target()
			if err != nil {
				return err
			}
			_, err = p.open(target)
			return err
		})},
		{"connect.headers", "5.3", Must, with(func(s *suite, p *peer) error {
			target, err := s.target()
			if err != nil {
				return err
			}
			_, err = p.open(target, `forwarded=for="203.0.113.7:4000"`, "baggage=k8s.namespace.name=shop,service.name=web",
				"traceparent=00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-forwarded-network=east",
				"x-nobody-knows=this", "te=trailers", "host="+target)
			return err
		})},
		refused("connect.foreign", "5.4", Must, "4", func(s *suite) []string { return connectTo(s.Foreign) }),
		refused("connect.foreign.status", "5.4", Should, "400", func(s *suite) []string { return connectTo(s.Foreign) }),
		refused("connect.loopback", "5.4", Must, "4", one("127.0.0.1:15000")),
		refused("connect.loopback6", "5.4", Must, "4", one("[::1]:15000")),
		refused("connect.unspecified", "5.4", Must, "4", one("0.0.0.0:15000")),
		refused("connect.mapped", "5.2", Must, "4", one("[::ffff:127.0.0.1]:15000")),
		refused("connect.authority.port", "5.2", Must, "4", one("10.0.0.1")),
		refused("connect.authority.zero", "5.2", Must, "4", one("10.0.0.1:0")),
		refused("connect.authority.range", "5.2", Must, "4", one("10.0.0.1:65616")),
		refused("connect.authority.user", "5.2", Must, "4", one("user@10.0.0.1:80")),
		refused("connect.get", "5.4", Must, "4", func(*suite) []string {
			return []string{":method=GET", ":scheme=https", ":path=/", ":authority=10.0.0.1:80"}
		}),
		{"connect.closed", "5.4", Must, with(func(s *suite, p *peer) error {
			if s.Closed == "" {
				return skipError{"no --closed: an authority behind the server where nothing listens"}
			}
			return p.wantStatus(p.ask(false, connectTo(s.Closed)...), "503")
		})},
		malformed("no-authority", func(string) []string { return []string{":method=CONNECT"} }),
		malformed("two-authorities", func(a string) []string { return connectTo(a, ":authority="+a) }),
		malformed("path", func(a string) []string { return connectTo(a, ":path=/") }),
		malformed("scheme", func(a string) []string { return connectTo(a, ":scheme=https") }),
		malformed("status", func(a string) []string { return connectTo(a, ":status=200") }),
		malformed("late-pseudo", func(a string) []string { return []string{":method=CONNECT", "baggage=x=y", ":authority=" + a} }),
		malformed("capitals", func(a string) []string { return connectTo(a, "Baggage=x=y") }),
		malformed("connection", func(a string) []string { return connectTo(a, "connection=close") }),
		malformed("transfer-encoding", func(a string) []string { return connectTo(a, "transfer-encoding=chunked") }),
		malformed("newline", func(a string) []string { return connectTo(a, "baggage=x\r\ny: z") }),
		{"connect.many", "4.4", Should, with((*suite).opensMany)},
	}
}

// wantStatus wants st refused with a status that begins with want. A reset in
// place of an answer tells a client nothing, so it is not one.
func (p *peer) wantStatus(st *stream, want string) error {
	err := p.wait("a status of "+want, func() bool { return st.status != "" || st.reset })
	switch {
	case err != nil:
		return err
	case st.status == "":
		return fmt.Errorf("want status %s, got RST_STREAM %v", want, st.code)
	case len(st.status) < len(want) || st.status[:len(want)] != want:
		return fmt.Errorf("want status %s, got %s", want, st.status)
	}
	if err := p.wait("END_STREAM after the refusal", func() bool { return st.ended || st.reset }); err != nil {
		return err
	}
	return p.alive()
}

// opensMany opens as many streams as a client of HBONE does, and uses each.
func (s *suite) opensMany(p *peer) error {
	target, err := s.target()
	if err != nil {
		return err
	}
	n := 100
	if most, ok := p.theirs[h2.SettingMaxConcurrentStreams]; ok {
		n = min(n, int(most))
	}
	var open []*stream
	for range n {
		open = append(open, p.ask(false, connectTo(target)...))
	}
	for i, st := range open {
		if err := p.wait(fmt.Sprintf("answer %d of %d", i+1, n), func() bool { return st.status != "" || st.reset }); err != nil {
			return err
		}
		if st.status != "200" {
			return fmt.Errorf("stream %d of %d: want 200, got %q", i+1, n, st.status)
		}
	}
	for i, st := range open {
		if err := p.echo(st, pattern(1000+i), 16<<10); err != nil {
			return fmt.Errorf("stream %d of %d: %w", i+1, n, err)
		}
	}
	return nil
}
