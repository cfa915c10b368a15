package msg

// BodyKind says how the body of a message is delimited. The zero value is no
// body.
type BodyKind uint8

// The kinds of bodies.
const (
	NoBody   BodyKind = iota
	Sized             // Length bytes, and no trailers unless it came over HTTP/2
	Streamed          // until its sender says that it has ended; trailers may follow
)

// A Head is the head of a request or of a response: what its first line or its
// pseudo fields say, and its fields in their order, as lines of text
// "name: value\r\n" in one buffer.
//
// Lifetime: Lines belongs to the connection that the message came from, and so
// does everything that is a view into it. A request's head lives until the
// exchange ends, a response's until its body does. Who keeps bytes for longer
// (a filter that hands them to another goroutine, a cache) copies them.
//
// Edits take effect at once for who reads the Head afterwards; they cost no
// copy of what is not edited, for a serialiser writes unedited neighbours in
// one piece. A Head is not for concurrent use. Its zero value is empty.
type Head struct {
	// Of a request. Method is as it was sent. Scheme is "http" or "https".
	// Authority is the host and port, "" only in HTTP/1.0. Path begins with a
	// slash and holds the query, or is "*" (OPTIONS), or is empty (CONNECT).
	Method, Scheme, Authority, Path []byte
	// Protocol is what the client wants to upgrade to ("websocket"), or in a
	// response with status 101 has been upgraded to. Empty if nothing.
	Protocol []byte

	// Status of a response, 100 to 599; 0 in a request.
	Status int

	// Body and Length are the framing, which fields never say: a codec takes
	// Content-Length and Transfer-Encoding out of the fields and makes them
	// anew. Length is the declared length, or -1; it may be set without a body
	// (an answer to HEAD, a 304).
	Body   BodyKind
	Length int64

	Lines  []byte  // what the fields of the wire point into
	Added  []byte  // what added fields point into
	Fields []Field // read it with Live, Name and Value

	room [64]Field // of Fields, in the usual case
}

// A Field is one field of a Head: where its line is. Its ID says which of the
// known ones it is, so that most questions need no comparison of names.
type Field struct {
	Line     uint32 // the line begins here, with the name
	Value    uint32
	ValueEnd uint32 // without trailing white space
	End      uint32 // of the line, after CRLF
	NameLen  uint16
	ID       ID
	State    State
}

// State says what became of a field.
type State uint8

// The states.
const (
	Kept    State = iota // as it came
	New                  // added, and in Added instead of Lines
	Removed              // not there any more
)

// Reset empties the Head for the next message. It keeps the memory.
func (h *Head) Reset() {
	if h.Fields == nil {
		h.Fields = h.room[:]
	}
	h.Method, h.Scheme, h.Authority, h.Path, h.Protocol = nil, nil, nil, nil, nil
	h.Status, h.Body, h.Length = 0, NoBody, -1
	h.Lines, h.Added, h.Fields = nil, h.Added[:0], h.Fields[:0]
}

// Live reports whether the field is still part of the message.
func (f *Field) Live() bool { return f.State != Removed }

// text returns what f points into.
func (h *Head) text(f *Field) []byte {
	if f.State == New {
		return h.Added
	}
	return h.Lines
}

// Name returns the name of f, in the case that it was sent in.
func (h *Head) Name(f *Field) []byte {
	return h.text(f)[f.Line : f.Line+uint32(f.NameLen)]
}

// Value returns the value of f without surrounding white space.
func (h *Head) Value(f *Field) []byte { return h.text(f)[f.Value:f.ValueEnd] }

// Get returns the value of the first live field id, or nil if there is none.
// A field without a value gives an empty, non-nil slice. It may not be asked
// for Other.
func (h *Head) Get(id ID) []byte {
	for i := range h.Fields {
		if f := &h.Fields[i]; f.ID == id && f.State != Removed {
			return h.Value(f)
		}
	}
	return nil
}

// Has reports whether there is a live field id.
func (h *Head) Has(id ID) bool {
	for i := range h.Fields {
		if f := &h.Fields[i]; f.ID == id && f.State != Removed {
			return true
		}
	}
	return false
}

// Lookup returns the value of the first live field of that name, which is in
// lower case, or nil.
func (h *Head) Lookup(name string) []byte {
	id := Identify(name)
	if id != Other {
		return h.Get(id)
	}
	for i := range h.Fields {
		if f := &h.Fields[i]; h.is(f, id, name) {
			return h.Value(f)
		}
	}
	return nil
}

// is reports whether the live field f has a name, in lower case, whose ID is
// id.
func (h *Head) is(f *Field, id ID, name string) bool {
	return f.ID == id && f.State != Removed && (id != Other || EqualFold(h.Name(f), name))
}

// Joined returns all values of the fields of that name, in lower case, joined
// with commas, and false if there is none. If there is one it is not copied;
// else scratch is appended to.
func (h *Head) Joined(name string, scratch []byte) ([]byte, bool) {
	id := Identify(name)
	var first []byte
	n := 0
	for i := range h.Fields {
		f := &h.Fields[i]
		if !h.is(f, id, name) {
			continue
		}
		switch n++; n {
		case 1:
			first = h.Value(f)
		case 2:
			scratch = append(append(append(scratch[:0], first...), ','), h.Value(f)...)
		default:
			scratch = append(append(scratch, ','), h.Value(f)...)
		}
	}
	if n > 1 {
		return scratch, true
	}
	return first, n == 1
}

// All calls yield with the name and value of each live field, until it returns
// false. It is made to be ranged over.
func (h *Head) All(yield func(name, value []byte) bool) {
	for i := range h.Fields {
		if f := &h.Fields[i]; f.State != Removed && !yield(h.Name(f), h.Value(f)) {
			return
		}
	}
}
