package compile

import (
	"fmt"
	"strings"
)

// Severity says how much a Finding matters. The zero Severity is an error.
type Severity string

// The severities.
const (
	SeverityError   Severity = ""        // part of the object means nothing and is not enforced as written
	SeverityWarning Severity = "warning" // the object is valid and does not do all that it seems to
)

// A Finding is something that its author should know about one object.
type Finding struct {
	Severity Severity `json:"severity,omitempty"`
	// Path is the field, as "spec.http[0].timeout". Empty is the whole object.
	Path string `json:"path,omitempty"`
	// Message goes on where the path ends: "is 700, want 200 to 599".
	Message string `json:"message"`
}

// String returns the path and the message, as one sentence.
func (f Finding) String() string { return strings.TrimSpace(f.Path + " " + f.Message) }

// findings gathers what is found in one object.
type findings []Finding

// bad notes an error at a field.
func (f *findings) bad(path, format string, args ...any) {
	*f = append(*f, Finding{SeverityError, path, fmt.Sprintf(format, args...)})
}

// warn notes a warning at a field.
func (f *findings) warn(path, format string, args ...any) {
	*f = append(*f, Finding{SeverityWarning, path, fmt.Sprintf(format, args...)})
}

// of returns what was found of one severity, as sentences.
func (f findings) of(s Severity) []string {
	var out []string
	for _, x := range f {
		if x.Severity == s {
			out = append(out, x.String())
		}
	}
	return out
}
