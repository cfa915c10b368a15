# Weft. `make demo` and `make test` are the two commands a newcomer needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# One set of build flags for everything: what is compiled once is shared.
export CGO_ENABLED ?= 0
export GOFLAGS := -trimpath $(filter-out -trimpath,$(GOFLAGS))

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
PROGRAMS := weft weft-control weft-node weft-cni ztunnel waypoint

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## a real two-node Kubernetes, Weft in it, and traffic that turns into mutual TLS
	@cd e2e && go run ./cmd/demo

.PHONY: demo-down
demo-down: ## remove the demo's cluster and all its state
	@cd e2e && go run ./cmd/weft-cluster --id demo down

.PHONY: test
test: ## every test: lint, unit, kernel, fuzz, cluster; and what they prove about reliability
	@start=$$SECONDS; .ci/deps; rm -rf out/reliability out/reliability.json; mkdir -p out; \
	export WEFT_SCORE_RUN=$$(date +%s%N); failed=; \
	$(MAKE) --no-print-directory lint unit fuzz e2e 2>&1 | tee out/test.log || failed=-partial; \
	(cd e2e && go run ./cmd/score $$failed) || failed=yes; \
	[ -z "$$failed" ] || { (cd e2e && go run ./cmd/failed ../out/test.log) || :; echo "make test: FAILED after $$((SECONDS-start)) s"; exit 1; } >&2; \
	echo "make test: everything passed in $$((SECONDS-start)) s"

.PHONY: score
score: ## the table of reliability, of what was tested last
	@cd e2e && go run ./cmd/score -partial

.PHONY: lint
lint: ## vet and staticcheck, both modules
	@echo "== lint"; test -z "$$(gofmt -l $$(git ls-files '*.go') | tee /dev/stderr)"
	@go vet ./... && go tool staticcheck ./...
	@cd e2e && go vet ./... && go tool -modfile=../go.mod staticcheck ./...

.PHONY: unit
unit: ## unit, integration and kernel tests under the race detector (root for the kernel tests)
	@echo "== unit, integration and kernel tests"; CGO_ENABLED=1 go test -race -timeout 20m ./...

.PHONY: fuzz
fuzz: ## each fuzz target, some seconds each
	@echo "== fuzz"; .ci/fuzz

.PHONY: e2e
e2e: ## tests on a real two-node cluster
	@echo "== real cluster"; cd e2e && go test -v -count=1 -p 1 -timeout 90m ./...

.PHONY: conformance
conformance: ## the Gateway API's mesh tests on a real cluster, without Weft and with it; into docs/conformance (root)
	@.ci/deps; cd e2e && go run ./cmd/conformance

.PHONY: bench
bench: ## capture and the tunnel against others: CPU time, interleaved; into out/bench.json (root)
	@.ci/deps; .ci/deps-bench; mkdir -p out; WEFT_BENCH=$(CURDIR)/out/bench.json go test -v -count=1 -p 1 -timeout 40m -run '^TestBenchmark' ./node/capture ./cmd/ztunnel/blackbox ./cmd/waypoint/blackbox

.PHONY: soak
soak: ## 15,000 idle and 200 active connections for ten minutes (root)
	@WEFT_SOAK=10m go test -v -count=1 -timeout 30m -run '^TestSoak$$' ./cmd/ztunnel/blackbox

.PHONY: bench-go
bench-go: ## Go benchmarks of single packages
	@go test -run '^$$' -bench . -benchmem ./...

.PHONY: build
build: ## the programs, into bin/
	@mkdir -p bin; for p in $(PROGRAMS); do go build -ldflags '$(LDFLAGS)' -o bin/$$p ./cmd/$$p; done

.PHONY: images
images: ## the release images as archives, into out/images
	@go run ./deploy/images -tag $(VERSION) -o out/images

.PHONY: generate
generate: ## eBPF objects and protobuf code (needs clang-14, libbpf-dev, protoc)
	@go generate ./bpf ./api/...

.PHONY: fmt
fmt: ## format all Go files
	@gofmt -w $$(git ls-files '*.go')

.PHONY: clean
clean: ## remove what was built
	@rm -rf bin out
