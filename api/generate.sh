#!/bin/sh
# Generates the Go of the .proto files in a directory of api. Needs protoc;
# everything else, the plugin and the well-known types, comes from the module's
# dependencies.
set -eu
dir=api/$1
cd "$(git rev-parse --show-toplevel)"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
protoc -I . -I "$(go list -m -f '{{.Dir}}' istio.io/api)/common-protos" \
  --plugin="$bin/protoc-gen-go" --go_out=. --go_opt=paths=source_relative \
  "$dir"/*.proto
# The version of protoc is no part of what it means.
sed -i '/^\/\/ \tprotoc  *v/d' "$dir"/*.pb.go
