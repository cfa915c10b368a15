package h2

import (
	"strconv"

	"golang.org/x/net/http2/hpack"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// A blockBuffer takes an encoded header block.
type blockBuffer []byte

// Write appends. It never fails.
func (b *blockBuffer) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}

// An interner turns bytes into strings that were made before: most names and
// many values are the same in all messages of a connection, and the encoder
// keeps them.
type interner map[string]string

const (
	internEntries = 512
	internLen     = 256
)

func (t *interner) text(b []byte) string {
	if s, ok := (*t)[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(b) <= internLen {
		if *t == nil || len(*t) >= internEntries {
			*t = make(interner, 64)
		}
		(*t)[s] = s
	}
	return s
}

// field encodes one field. The name is put in lower case.
func (c *Conn) field(name string, value []byte, sensitive bool) {
	_ = c.enc.WriteField(hpack.HeaderField{Name: name, Value: c.names.text(value), Sensitive: sensitive}) // a blockBuffer never fails
}

// encode makes the block of a head. The mutex is held.
func (c *Conn) encode(h *msg.Head) {
	c.block = c.block[:0]
	if h.Status != 0 {
		var b [3]byte
		c.field(":status", strconv.AppendInt(b[:0], int64(h.Status), 10), false)
	} else {
		c.field(":method", h.Method, false)
		if string(h.Method) != "CONNECT" {
			c.field(":scheme", h.Scheme, false)
			c.field(":path", h.Path, false)
		}
		if len(h.Authority) > 0 {
			c.field(":authority", h.Authority, false)
		}
	}
	c.encodeFields(h)
	if h.Length >= 0 && h.Status/100 != 1 && h.Status != 204 {
		var b [20]byte
		c.field("content-length", strconv.AppendInt(b[:0], h.Length, 10), false)
	}
}

// encodeTrailers makes the block of trailers. The mutex is held.
func (c *Conn) encodeTrailers(h *msg.Head) {
	c.block = c.block[:0]
	c.encodeFields(h)
}

// encodeFields encodes the fields, but for those that belong to connections of
// HTTP/1 (RFC 9113 8.2.2) or are said otherwise.
func (c *Conn) encodeFields(h *msg.Head) {
	var lower [64]byte
	for i := range h.Fields {
		f := &h.Fields[i]
		if !f.Live() {
			continue
		}
		value := h.Value(f)
		sensitive := false
		switch f.ID {
		case msg.Connection, msg.KeepAlive, msg.ProxyConnection, msg.TransferEncoding, msg.Upgrade, msg.HTTP2Settings,
			msg.Host, msg.ContentLength:
			continue
		case msg.TE:
			if !hasTrailers(value) {
				continue
			}
			value = []byte("trailers")
		case msg.Authorization, msg.ProxyAuthorization, msg.Cookie, msg.SetCookie:
			// Requests of several clients share the table: whether a guess of
			// one is in it must not show (RFC 7541 7.1.3).
			sensitive = true
		}
		name := append(lower[:0], h.Name(f)...)
		for k, b := range name {
			name[k] = msg.Lower(b)
		}
		c.field(c.names.text(name), value, sensitive)
	}
}

// hasTrailers reports whether a value of te has the member "trailers".
func hasTrailers(v []byte) bool {
	for len(v) > 0 {
		i := 0
		for i < len(v) && v[i] != ',' {
			i++
		}
		member := v[:i]
		v = v[min(i+1, len(v)):]
		for len(member) > 0 && (member[0] == ' ' || member[0] == '\t') {
			member = member[1:]
		}
		for len(member) > 0 && (member[len(member)-1] == ' ' || member[len(member)-1] == '\t') {
			member = member[:len(member)-1]
		}
		if msg.EqualFold(member, "trailers") {
			return true
		}
	}
	return false
}
