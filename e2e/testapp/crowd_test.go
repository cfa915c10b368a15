package main

import (
	"bytes"
	"io"
	"net"
	"testing"
)

func TestCrowd(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			if i >= 3 { // those are too many
				c.Close()
				continue
			}
			go io.Copy(c, c)
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	var out bytes.Buffer
	if err := crowd(t.Context(), []string{"-addr", l.Addr().String(), "-n", "5"}, &out); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), `{"answered":3,"ended":2,`; !bytes.HasPrefix(out.Bytes(), []byte(want)) {
		t.Errorf("told %s, want %s", got, want)
	}
}
