package deploy

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"fmt"
	"io"
)

// The definitions are packed, because they are a megabyte of text that nobody
// reads here. TestGatewayAPI holds them against the module, and makes them.
//
//go:embed gatewayapi/standard.yaml.gz
var gatewayAPI []byte

// GatewayAPI returns the definitions of the Gateway API's standard channel, as
// YAML documents, in the version of the module sigs.k8s.io/gateway-api that Weft
// is built with. They are the work of the Kubernetes authors (Apache 2.0).
func GatewayAPI() (string, error) {
	r, err := gzip.NewReader(bytes.NewReader(gatewayAPI))
	if err != nil {
		return "", fmt.Errorf("unpack the definitions of the Gateway API: %w", err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return "", fmt.Errorf("unpack the definitions of the Gateway API: %w", err)
	}
	return string(b), nil
}
