package l7

import (
	"bytes"

	"golang.org/x/net/http2/hpack"
)

// hpackEncoder encodes what no client would say.
type hpackEncoder struct {
	buf bytes.Buffer
	enc *hpack.Encoder
}

func newHpackEncoder() *hpackEncoder {
	e := &hpackEncoder{}
	e.enc = hpack.NewEncoder(&e.buf)
	return e
}

func (e *hpackEncoder) block(fields ...string) []byte {
	e.buf.Reset()
	for i := 0; i+1 < len(fields); i += 2 {
		e.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return e.buf.Bytes()
}
