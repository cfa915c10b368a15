package obs

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"testing/slogtest"
	"time"
)

func TestTextLine(t *testing.T) {
	at := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\t`)
	for _, tc := range []struct {
		name string
		log  func(*slog.Logger)
		want string
	}{
		{"message and attributes", func(l *slog.Logger) { l.Info("started", "port", 15008, "took", time.Second) },
			"info\tstarted port=15008 took=1s\n"},
		{"scope is a column", func(l *slog.Logger) { l.With(ScopeKey, "access").Warn("closed", "a", 1) },
			"warn\taccess\tclosed a=1\n"},
		{"scope of one line", func(l *slog.Logger) { l.Info("m", ScopeKey, "xds") }, "info\txds\tm\n"},
		{"values are quoted when they must be", func(l *slog.Logger) {
			l.Error("m", "err", errors.New("no route"), "empty", "", "eq", "a=b", "plain", "spiffe://td/ns/a/sa/b")
		}, "error\tm err=\"no route\" empty=\"\" eq=\"a=b\" plain=spiffe://td/ns/a/sa/b\n"},
		{"a value cannot forge a line", func(l *slog.Logger) { l.Info("m", "pod", "x\n2026 info\towned") },
			"info\tm pod=\"x\\n2026 info\\towned\"\n"},
		{"a message cannot forge a line", func(l *slog.Logger) { l.Info("peer \"x\"\ninfo") },
			"info\tpeer \"x\"\\ninfo\n"},
		{"a scope cannot forge a line", func(l *slog.Logger) { l.Info("m", ScopeKey, "a\nb") }, "info\ta\\nb\tm\n"},
		{"quoted always", func(l *slog.Logger) { l.Info("m", "src", Quoted("cart")) }, "info\tm src=\"cart\"\n"},
		{"groups are dotted", func(l *slog.Logger) {
			l.WithGroup("src").With("addr", "a").Info("m", slog.Group("x", "y", 1))
		}, "info\tm src.addr=a src.x.y=1\n"},
		{"below the level", func(l *slog.Logger) { l.Debug("m") }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var buf bytes.Buffer
			tc.log(NewLogger(&buf, "text", nil))
			got := buf.String()
			if tc.want == "" {
				if got != "" {
					t.Errorf("wrote %q, want nothing", got)
				}
				return
			}
			if !at.MatchString(got) {
				t.Fatalf("no time in front of %q", got)
			}
			if got := at.ReplaceAllString(got, ""); got != tc.want {
				t.Errorf("wrote %q, want %q", got, tc.want)
			}
		})
	}
}

func TestTextAttributesStayWithTheirLogger(t *testing.T) {
	var buf bytes.Buffer
	base := NewLogger(&buf, "text", nil).With("a", 1)
	base.With("b", 2, ScopeKey, "one").Info("m")
	base.With("c", 3).Info("m")
	lines := strings.Split(buf.String(), "\n")
	if !strings.HasSuffix(lines[0], "\tone\tm a=1 b=2") || !strings.HasSuffix(lines[1], "\tinfo\tm a=1 c=3") {
		t.Errorf("wrote %q", lines)
	}
}

func TestLevelChangesAtRunTime(t *testing.T) {
	var buf bytes.Buffer
	level := new(slog.LevelVar)
	log := NewLogger(&buf, "", level)
	log.Debug("one")
	level.Set(slog.LevelDebug)
	log.Debug("two")
	if s := buf.String(); strings.Contains(s, "one") || !strings.Contains(s, "\tdebug\ttwo\n") {
		t.Errorf("wrote %q", s)
	}
}

func TestJSON(t *testing.T) {
	var buf bytes.Buffer
	log := NewLogger(&buf, "json", nil)
	err := slogtest.TestHandler(log.Handler(), func() []map[string]any {
		var ms []map[string]any
		for _, line := range bytes.Split(bytes.TrimSpace(buf.Bytes()), []byte("\n")) {
			m := map[string]any{}
			if err := json.Unmarshal(line, &m); err != nil {
				t.Fatal(err)
			}
			ms = append(ms, m)
		}
		return ms
	})
	if err != nil {
		t.Error(err)
	}
	if !strings.Contains(buf.String(), `"level":"info"`) {
		t.Errorf("level is not in lower case: %s", buf.String())
	}
}

func TestLevelNames(t *testing.T) {
	for _, s := range []string{"trace", "debug", "info", "warn", "error"} {
		l, err := ParseLevel(strings.ToUpper(s))
		if err != nil || LevelName(l) != s {
			t.Errorf("%s: parsed as %v (%v), named %s", s, l, err, LevelName(l))
		}
	}
	if _, err := ParseLevel("loud"); err == nil {
		t.Error("level \"loud\" was accepted")
	}
}
