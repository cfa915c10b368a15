package msg

// text is what names and values may be given as.
type text interface{ ~string | ~[]byte }

// Remove takes out all fields of that name, in lower case, and returns how many
// there were.
func (h *Head) Remove(name string) int {
	id := Identify(name)
	n := 0
	for i := range h.Fields {
		if f := &h.Fields[i]; h.is(f, id, name) {
			h.take(f)
			n++
		}
	}
	return n
}

// RemoveID takes out all fields id, which is not Other.
func (h *Head) RemoveID(id ID) {
	for i := range h.Fields {
		if f := &h.Fields[i]; f.ID == id && f.State != Removed {
			h.take(f)
		}
	}
}

// RemovePrefix takes out all fields whose names begin with prefix, in lower
// case.
func (h *Head) RemovePrefix(prefix string) {
	for i := range h.Fields {
		f := &h.Fields[i]
		if f.State == Removed || int(f.NameLen) < len(prefix) {
			continue
		}
		if EqualFold(h.Name(f)[:len(prefix)], prefix) {
			h.take(f)
		}
	}
}

// take removes f. What is new is no part of Lines, so it is emptied in place.
func (h *Head) take(f *Field) { f.State = Removed }

// Set replaces all fields of that name, in lower case, by one. It changes
// nothing and returns false if the name or the value cannot be in a message.
func Set[N, V text](h *Head, name N, value V) bool {
	if !ValidName(name) || !ValidValue(value) {
		return false
	}
	h.Remove(string(name))
	return Append(h, name, value)
}

// Append adds a field after all others. It changes nothing and returns false
// if the name or the value cannot be in a message.
func Append[N, V text](h *Head, name N, value V) bool {
	if !ValidName(name) || !ValidValue(value) {
		return false
	}
	add(h, Identify(name), name, value)
	return true
}

// SetID is Set for a known field.
func SetID[V text](h *Head, id ID, value V) bool {
	if id == Other || !ValidValue(value) {
		return false
	}
	h.RemoveID(id)
	add(h, id, names[id], value)
	return true
}

// AppendID is Append for a known field.
func AppendID[V text](h *Head, id ID, value V) bool {
	if id == Other || !ValidValue(value) {
		return false
	}
	add(h, id, names[id], value)
	return true
}

// add adds a field whose name and value are valid.
func add[N, V text](h *Head, id ID, name N, value V) {
	b := h.Added
	line := uint32(len(b))
	b = append(append(b, name...), ": "...)
	start := uint32(len(b))
	b = append(b, value...)
	end := uint32(len(b))
	h.Added = append(b, "\r\n"...)
	h.Fields = append(h.Fields, Field{Line: line, NameLen: uint16(len(name)), Value: start, ValueEnd: end, End: end + 2,
		ID: id, State: New})
}

// SetPath gives the request another path (with its query), which it copies.
// Who gives it has checked that each byte may be in a target.
func SetPath[V text](h *Head, path V) { h.Path = append(h.Path[:0:0], path...) }

// SetAuthority gives the request another authority, which it copies.
func SetAuthority[V text](h *Head, authority V) {
	h.Authority = append(h.Authority[:0:0], authority...)
}

// AppendLines appends the live fields to dst, as lines that end with CRLF, and
// returns it. The head's end is not written.
func (h *Head) AppendLines(dst []byte) []byte {
	src := h.Lines      // or Added
	var from, to uint32 // a run of lines of it
	var state State     // of those
	for i := range h.Fields {
		f := &h.Fields[i]
		if f.State == Removed {
			continue
		}
		if f.Line != to || f.State != state {
			dst = append(dst, src[from:to]...)
			from, state, src = f.Line, f.State, h.text(f)
		}
		to = f.End
	}
	return append(dst, src[from:to]...)
}
