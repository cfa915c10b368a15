package obs

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// ScopeKey is the attribute that names the part of the program a line is
// about. The text format writes its value in a column of its own.
const ScopeKey = "scope"

// LevelTrace is one step more talkative than slog.LevelDebug.
const LevelTrace = slog.LevelDebug - 4

// timeLayout is RFC 3339 in UTC with microseconds, always of the same width.
const timeLayout = "2006-01-02T15:04:05.000000Z"

// NewLogger returns a logger that writes whole lines to w. The format "json"
// writes JSON objects. Every other format is text:
//
//	2026-11-21T07:42:19.123456Z<tab>info<tab>scope<tab>message key=value
//
// where the scope column is there only if the logger has a ScopeKey. Whatever
// could be taken for the end of a line or of a value is quoted, so a name
// chosen by a stranger cannot forge a log line. Level may be changed at any
// time; nil is info.
func NewLogger(w io.Writer, format string, level *slog.LevelVar) *slog.Logger {
	if level == nil {
		level = new(slog.LevelVar)
	}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: jsonAttr}))
	}
	return slog.New(&textHandler{out: &output{w: w}, level: level})
}

// A Quoted is a value that the text format always writes in quotes.
type Quoted string

// jsonAttr gives the JSON format the time and level of the text format.
func jsonAttr(groups []string, a slog.Attr) slog.Attr {
	if len(groups) > 0 {
		return a
	}
	switch v := a.Value.Any().(type) {
	case time.Time:
		if a.Key == slog.TimeKey {
			return slog.String(a.Key, v.UTC().Format(timeLayout))
		}
	case slog.Level:
		if a.Key == slog.LevelKey {
			return slog.String(a.Key, LevelName(v))
		}
	}
	return a
}

// LevelName returns the name of a level: trace, debug, info, warn or error.
// A level between two is named after the quieter one below it.
func LevelName(l slog.Level) string {
	switch {
	case l < slog.LevelDebug:
		return "trace"
	case l < slog.LevelInfo:
		return "debug"
	case l < slog.LevelWarn:
		return "info"
	case l < slog.LevelError:
		return "warn"
	}
	return "error"
}

// ParseLevel is the inverse of LevelName; it takes "warning" too, in any case.
func ParseLevel(s string) (slog.Level, error) {
	switch strings.ToLower(s) {
	case "trace":
		return LevelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("parse log level %q: want trace, debug, info, warn or error", s)
}

// output serialises the lines of all loggers made from one.
type output struct {
	mu sync.Mutex
	w  io.Writer
}

// textHandler is the slog.Handler of the text format. It is immutable.
type textHandler struct {
	out    *output
	level  slog.Leveler
	scope  string
	prefix string // of keys: the open groups, each with a dot
	attrs  string // already written, each with a space before it
}

// Enabled implements slog.Handler.
func (h *textHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

// WithGroup implements slog.Handler.
func (h *textHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.prefix += name + "."
	return &c
}

// WithAttrs implements slog.Handler.
func (h *textHandler) WithAttrs(as []slog.Attr) slog.Handler {
	c := *h
	b := []byte(h.attrs)
	for _, a := range as {
		b = c.attr(b, c.prefix, a)
	}
	c.attrs = string(b)
	return &c
}

// Handle implements slog.Handler.
func (h *textHandler) Handle(_ context.Context, r slog.Record) error {
	line := *h // a record may carry a scope of its own
	attrs := []byte(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		attrs = line.attr(attrs, line.prefix, a)
		return true
	})
	b := make([]byte, 0, 64+len(r.Message)+len(attrs))
	if !r.Time.IsZero() {
		b = r.Time.UTC().AppendFormat(b, timeLayout)
		b = append(b, '\t')
	}
	b = append(append(b, LevelName(r.Level)...), '\t')
	if line.scope != "" {
		b = append(plain(b, line.scope), '\t')
	}
	b = plain(b, r.Message)
	b = append(b, attrs...)
	b = append(b, '\n')
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err := h.out.w.Write(b)
	return err
}

// attr appends " key=value" to b, or takes a into the scope column.
func (h *textHandler) attr(b []byte, prefix string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, m := range v.Group() {
			b = h.attr(b, prefix, m)
		}
		return b
	}
	if a.Equal(slog.Attr{}) {
		return b
	}
	if a.Key == ScopeKey && prefix == "" {
		h.scope = v.String()
		return b
	}
	b = value(append(b, ' '), prefix+a.Key)
	b = append(b, '=')
	switch x := v.Any().(type) {
	case Quoted:
		return strconv.AppendQuote(b, string(x))
	case time.Time:
		return x.UTC().AppendFormat(b, timeLayout)
	}
	return value(b, v.String())
}

// value appends s, in quotes if a reader could not tell where it ends.
func value(b []byte, s string) []byte {
	unsafe := func(r rune) bool {
		return r == ' ' || r == '"' || r == '=' || r == utf8.RuneError || !unicode.IsPrint(r)
	}
	if s == "" || strings.ContainsFunc(s, unsafe) {
		return strconv.AppendQuote(b, s)
	}
	return append(b, s...)
}

// plain appends a message; control characters in it are escaped.
func plain(b []byte, s string) []byte {
	unsafe := func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }
	if !strings.ContainsFunc(s, unsafe) {
		return append(b, s...)
	}
	q := strconv.Quote(s)
	return append(b, strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)...)
}
