// Package failed finds in the output of tests what has failed, so that it can be
// said once more at the end, where a reader looks.
package failed

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// Bounds of what is kept: a failure is named, the whole of it is in the output.
const (
	maxLines = 40   // of one test, its first and its last
	maxLine  = 1000 // bytes of a line
	maxTests = 30
	ending   = 12 // lines of the output's end
)

// A Log reads the output of `go test`, with or without -v, of compilers, of
// linters and of make, and remembers what has failed. The zero value is ready.
// It is not safe for use by several goroutines at once.
type Log struct {
	part []byte // of a line

	name   string              // of the test that speaks
	indent int                 // of its log line, whose further lines stand deeper; 0: none
	panics bool                // what follows belongs to a panic
	said   map[string][]string // by test of this package
	failed []string            // tests of this package

	reports []string // of packages, compilers and steps, as they will be printed
	end     []string // the last lines
}

var (
	speaker   = regexp.MustCompile(`^\s*(?:=== (?:RUN|NAME|CONT|PAUSE)|--- (FAIL|PASS|SKIP):)\s+(\S+)`)
	logLine   = regexp.MustCompile(`^( +)\S+\.go:\d+: `)
	complaint = regexp.MustCompile(`^\S+\.go(:\d+:\d+: .*)?$`)
	pkgResult = regexp.MustCompile(`^(ok  |FAIL|\?   )\t`)
	step      = regexp.MustCompile(`^make.*: \*\*\* \[`)
)

// Write takes a part of the output. It never fails.
func (l *Log) Write(p []byte) (int, error) {
	n := len(p)
	for {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			break
		}
		l.line(string(append(l.part, p[:i]...)))
		l.part, p = l.part[:0], p[i+1:]
	}
	l.part = append(l.part, p...)
	return n, nil
}

func (l *Log) line(s string) {
	if len(s) > maxLine {
		s = s[:maxLine] + " ..."
	}
	l.end = last(append(l.end, s), ending)
	if l.said == nil {
		l.said = map[string][]string{}
	}
	if m := speaker.FindStringSubmatch(s); m != nil {
		l.name, l.indent, l.panics = m[2], 0, false
		if m[1] == "FAIL" && !slices.Contains(l.failed, l.name) {
			l.failed = append(l.failed, l.name)
		}
		return
	}
	switch m := logLine.FindStringSubmatch(s); {
	case strings.HasPrefix(s, "panic: "), strings.HasPrefix(s, "fatal error: "):
		l.name, l.panics = "panic", true
		l.failed = append(l.failed, l.name)
		l.say(s)
	case l.panics && strings.HasPrefix(s, "\t"):
		l.say(strings.TrimSpace(s))
	case m != nil:
		l.indent, l.panics = len(m[1]), false
		l.say(s[l.indent:])
	case l.indent > 0 && strings.HasPrefix(s, strings.Repeat(" ", l.indent+1)):
		l.say(s[l.indent:])
	default:
		l.indent, l.panics = 0, false
		l.other(s)
	}
}

// other reads a line that no test has logged.
func (l *Log) other(s string) {
	switch {
	case pkgResult.MatchString(s):
		if strings.HasPrefix(s, "FAIL") {
			l.reports = append(append(l.reports, strings.Join(strings.Fields(s)[1:], " ")), l.tests()...)
		}
		l.said, l.failed, l.name = nil, nil, ""
	case complaint.MatchString(s):
		l.reports = append(l.reports, s)
	case step.MatchString(s):
		if len(l.reports) == 0 && len(l.failed) == 0 {
			l.reports = append([]string{"the last lines:"}, l.end...)
		} else {
			l.reports = append(l.reports, s)
		}
	}
}

func (l *Log) say(s string) {
	lines := append(l.said[l.name], s)
	if len(lines) > maxLines {
		lines = slices.Delete(lines, maxLines/2, maxLines/2+1)
		lines[maxLines/2] = "..."
	}
	l.said[l.name] = lines
}

// tests tells of the failed tests of the package that is being read.
func (l *Log) tests() []string {
	var out []string
	for i, name := range l.failed {
		if i == maxTests {
			return append(out, fmt.Sprintf("and %d more", len(l.failed)-i))
		}
		out = append(out, name)
		for _, s := range l.said[name] {
			out = append(out, "    "+s)
		}
	}
	return out
}

// Report writes what has failed, in the order of the output, under a title;
// nothing if nothing has. A Log that reads a Report takes nothing from it.
func (l *Log) Report(w io.Writer, title string) error {
	lines := append(slices.Clone(l.reports), l.tests()...)
	if len(lines) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, "%s\n  | %s\n", title, strings.Join(lines, "\n  | "))
	return err
}

func last(lines []string, n int) []string { return lines[max(0, len(lines)-n):] }
