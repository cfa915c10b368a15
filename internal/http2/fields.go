package http2

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// ErrListTooLarge is returned for a header list over the limit. The HPACK
// state is still good, so only the stream is lost.
var ErrListTooLarge = errors.New("header list is too large")

// A MalformedError is a header list that RFC 9113 8 forbids. Only the stream
// is lost.
type MalformedError struct{ Reason string }

// Error says what is wrong with the list.
func (e *MalformedError) Error() string { return "malformed header list: " + e.Reason }

func malformed(format string, args ...any) error {
	return &MalformedError{Reason: fmt.Sprintf(format, args...)}
}

// A Field is one header field; the name is in lower case.
type Field struct{ Name, Value string }

// IsPseudo reports whether the field is a pseudo-header field.
func (f Field) IsPseudo() bool { return strings.HasPrefix(f.Name, ":") }

// A FieldReader decodes the header blocks of one connection, in order. Its
// zero value is not usable; use NewFieldReader.
type FieldReader struct {
	dec     *hpack.Decoder
	table   table // of dec
	maxList int
	fields  []Field
	size    int
	err     error
	regular bool // a regular field has come, so no pseudo field may
}

// NewFieldReader returns a FieldReader that takes header lists of up to
// maxList bytes by the measure of RFC 9113 6.5.2. What one block may grow to
// is bounded by ParserConfig.MaxBlock as well.
func NewFieldReader(maxList int) *FieldReader {
	r := &FieldReader{maxList: maxList, table: table{max: DefaultTableLen}}
	r.dec = hpack.NewDecoder(DefaultTableLen, r.take)
	return r
}

// Read decodes a whole header block. The fields are valid until the next call.
// The error is a *ConnError when the HPACK state is lost, or ErrListTooLarge
// or a *MalformedError when only the stream is.
//
// Read checks what holds for every message (RFC 9113 8.2 and 8.3): names in
// lower case, no field of HTTP/1 connections, pseudo fields first and once
// each. Which pseudo fields a message must have is the caller's to check.
func (r *FieldReader) Read(block []byte) ([]Field, error) {
	r.fields, r.size, r.err, r.regular = r.fields[:0], 0, nil, false
	r.table.block = block
	if _, err := r.dec.Write(block); err != nil {
		return nil, connError(CompressionError, "%v", err)
	}
	if err := r.dec.Close(); err != nil {
		return nil, connError(CompressionError, "%v", err)
	}
	r.table.finish()
	return r.fields, r.err
}

// take is called for each decoded field.
func (r *FieldReader) take(hf hpack.HeaderField) {
	r.table.decoded(hf)
	if r.err != nil {
		return
	}
	r.size += int(hf.Size())
	if r.size > r.maxList {
		// The rest is decoded for the sake of the table, and not looked at.
		r.err = ErrListTooLarge
		return
	}
	f := Field{Name: hf.Name, Value: hf.Value}
	if r.err = r.check(f); r.err == nil {
		r.fields = append(r.fields, f)
	}
}

func (r *FieldReader) check(f Field) error {
	if !ValidValue(f.Value) {
		return malformed("value of %q", f.Name)
	}
	if f.IsPseudo() {
		if r.regular {
			return malformed("%q after a regular field", f.Name)
		}
		for _, g := range r.fields {
			if g.Name == f.Name {
				return malformed("%q twice", f.Name)
			}
		}
		return nil
	}
	r.regular = true
	if !validName(f.Name) {
		return malformed("name %q", f.Name)
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return malformed("%q belongs to HTTP/1", f.Name) // 8.2.2
	case "te":
		if f.Value != "trailers" {
			return malformed("te is %q", f.Value)
		}
	}
	return nil
}

// validName reports whether s is a token (RFC 9110 5.1) without capitals
// (RFC 9113 8.2.1).
func validName(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// ValidValue reports whether s may be a field value. RFC 9113 8.2.1 forbids
// NUL, CR, LF and outer white space; other control characters are refused with
// them, as RFC 9110 5.5 allows.
func ValidValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return s == "" || !blank(s[0]) && !blank(s[len(s)-1])
}

func blank(c byte) bool { return c == ' ' || c == '\t' }
