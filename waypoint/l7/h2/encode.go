package h2

import (
	"strconv"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// encode makes the block of a head. The mutex is held.
func (c *Conn) encode(h *msg.Head) {
	e := &c.enc
	b := e.begin(c.block[:0])
	if h.Status != 0 {
		var text [3]byte
		b = e.status(b, strconv.AppendInt(text[:0], int64(h.Status), 10))
	} else {
		b = e.method(b, h.Method)
		if string(h.Method) != "CONNECT" {
			b = e.scheme(b, h.Scheme)
			b = e.field(b, []byte(":path"), h.Path, false)
		}
		if len(h.Authority) > 0 {
			b = e.field(b, []byte(":authority"), h.Authority, false)
		}
	}
	c.block = b
	c.encodeFields(h)
	if h.Length >= 0 && h.Status/100 != 1 && h.Status != 204 {
		var text [20]byte
		c.block = e.field(c.block, []byte("content-length"), strconv.AppendInt(text[:0], h.Length, 10), false)
	}
}

// encodeTrailers makes the block of trailers. The mutex is held.
func (c *Conn) encodeTrailers(h *msg.Head) {
	c.block = c.enc.begin(c.block[:0])
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
		c.block = c.enc.field(c.block, name, value, sensitive)
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
