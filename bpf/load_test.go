package bpf

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
)

func TestKernelAcceptsPrograms(t *testing.T) {
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"capture": LoadCapture, "lookup": LoadLookup, "sockets": LoadSockets} {
		t.Run(name, func(t *testing.T) {
			spec, err := load()
			if err != nil {
				t.Fatal(err)
			}
			c, err := ebpf.NewCollection(spec)
			var ve *ebpf.VerifierError
			if errors.As(err, &ve) {
				t.Fatalf("%+v", ve)
			}
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		})
	}
}
