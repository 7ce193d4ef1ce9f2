# Targets print themselves: `make` or `make help`. Every target does its own
# set-up; on Debian the packages it needs are installed when make runs as root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

GO       ?= go
BINARY   := bin/ashlar
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT   := $(shell git rev-parse --short=12 HEAD 2>/dev/null)
LDFLAGS  := -X main.version=$(VERSION) -X main.commit=$(COMMIT)
FUZZTIME ?= 20s

# Debian packages, as package or package=command: an entry with a command is
# also satisfied by that command from elsewhere.
PACKAGES_RUN     := fio=fio libnbd-bin=nbdinfo
PACKAGES_TEST    := gcc=gcc libc6-dev
PACKAGES_LVM     := lvm2=lvm thin-provisioning-tools=thin_check
PACKAGES_BENCH   := fio=fio nbdkit=nbdkit qemu-utils=qemu-img nbd-server=nbd-server $(PACKAGES_LVM)
PACKAGES_INTEROP := $(PACKAGES_RUN) nbdkit=nbdkit python3 python3-libnbd qemu-utils=qemu-io nbd-client=nbd-client \
                    openssl=openssl util-linux=fstrim kmod=modprobe user-mode-linux=linux.uml \
                    e2fsprogs=mkfs.ext4 xfsprogs=mkfs.xfs btrfs-progs=mkfs.btrfs debian-archive-keyring
PACKAGES_POWERFAIL := gcc=gcc libc6-dev nbd-client=nbd-client util-linux=fstrim mount=losetup kmod=modprobe dmsetup=dmsetup \
                    user-mode-linux=linux.uml e2fsprogs=mkfs.ext4 xfsprogs=mkfs.xfs
PACKAGES_BPF     := clang=clang llvm=llvm-strip
PACKAGES_VM      := qemu-system-x86=qemu-system-x86_64 busybox-static kmod=depmod cpio=cpio xz-utils=xz zstd=zstd python3=python3 \
                    debian-archive-keyring e2fsprogs=mkfs.ext4 xfsprogs=mkfs.xfs btrfs-progs=mkfs.btrfs util-linux=fstrim fio=fio \
                    nbdkit=nbdkit qemu-utils=qemu-img $(PACKAGES_LVM)
PACKAGES_CSI     := $(PACKAGES_VM) mount=losetup xfsprogs=mkfs.xfs cryptsetup-bin=cryptsetup
PACKAGES_KUBE    := openssl=openssl iproute2=ip util-linux=nsenter mount=losetup fio=fio debian-archive-keyring

.PHONY: help
help: ## show this list
	@echo 'usage: make TARGET [VARIABLE=value ...]'
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done
	@echo 'variables: RUN_SECONDS RUN_SIZE RUN_POOL RUN_DIR RUN_ARGS RUN_KEEP=1 (run; tools/run.sh --help), FUZZTIME (fuzz),'
	@echo '  TESTFLAGS="-run NAME -v" ASHLAR_TEST_LONG=1 ASHLAR_TEST_SEED=N (test, interop, test-...), BENCHFLAGS (bench, bench-...),'
	@echo '  KUBE_KEEP=1 KUBE_CACHE KUBE_RUN KUBE_NODES KUBE_SLOW KUBE_TEST KUBE_BENCH (test-kube; head of test/kube/run.sh),'
	@echo '  IMAGE (image), HELM (manifest), DEB_ARCHS (deb), GO'

# ---- set-up ---------------------------------------------------------------------

# $(call packages,NAME,LIST) makes the stamp .make/NAME: it installs what is
# missing with apt when root, and otherwise says what to run.
define packages
.make/$(1): Makefile
	@mkdir -p .make; missing=(); \
	for entry in $(2); do \
	  package=$$$${entry%%=*}; command=$$$${entry#*=}; \
	  if [ "$$$$command" != "$$$$entry" ] && command -v "$$$$command" >/dev/null; then continue; fi; \
	  dpkg-query -W -f '$$$${db:Status-Status}\n' "$$$$package" 2>/dev/null | grep -qx installed || missing+=("$$$$package"); \
	done; \
	if [ $$$${#missing[@]} -gt 0 ]; then \
	  install="apt-get install -y --no-install-recommends $$$${missing[*]}"; \
	  if ! command -v apt-get >/dev/null; then \
	    echo "make: not Debian; install what these Debian packages hold, then repeat: $$$${missing[*]}" >&2; exit 1; \
	  elif [ "$$$$(id -u)" != 0 ]; then \
	    echo "make: packages are missing; run this, then repeat:" >&2; echo "  sudo $$$$install" >&2; exit 1; \
	  fi; \
	  echo "$$$$install"; export DEBIAN_FRONTEND=noninteractive; \
	  apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 update </dev/null >/dev/null || true; \
	  $$$${install/apt-get/apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3} </dev/null >.make/$(1).log 2>&1 || { cat .make/$(1).log >&2; exit 1; }; \
	fi; \
	touch $$@
endef
$(eval $(call packages,run,$(PACKAGES_RUN)))
$(eval $(call packages,test,$(PACKAGES_TEST)))
$(eval $(call packages,bench,$(PACKAGES_BENCH)))
$(eval $(call packages,interop,$(PACKAGES_INTEROP)))
$(eval $(call packages,csi,$(PACKAGES_CSI)))
$(eval $(call packages,vm,$(PACKAGES_VM)))
$(eval $(call packages,bpf,$(PACKAGES_BPF)))
$(eval $(call packages,powerfail,$(PACKAGES_POWERFAIL)))
$(eval $(call packages,kube,$(PACKAGES_KUBE)))

.PHONY: setup
setup: .make/run .make/test .make/interop .make/powerfail go ## install the Debian packages that the other targets use, and Go modules
	@$(GO) mod download

.PHONY: go
go:
	@command -v $(GO) >/dev/null || { echo 'make: the command "$(GO)" is missing; install Go from https://go.dev/dl/ (version in go.mod)' >&2; exit 1; }

# ---- build ----------------------------------------------------------------------

.PHONY: build
build: go ## build bin/ashlar, static
	@CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o $(BINARY) ./cmd/ashlar

# The image carries the tag that deploy/ashlar.yaml asks for: the chart's appVersion.
IMAGE ?= ghcr.io/ashlar-storage/ashlar:$(shell sed -n 's/^appVersion: *//p' deploy/helm/ashlar/Chart.yaml)

.PHONY: image
image: go ## build the container image for amd64 and arm64 into bin/ashlar-image.tar (OCI archive)
	@mkdir -p bin/image
	@for arch in amd64 arm64; do CGO_ENABLED=0 GOARCH=$$arch $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/image/ashlar.$$arch ./cmd/ashlar; done
	@IMAGE=$(IMAGE) $(GO) run ./tools/image --spec tools/image/ashlar.yaml --output bin/ashlar-image.tar
	@echo '$(IMAGE) is in bin/ashlar-image.tar; on a node: ctr -n k8s.io images import bin/ashlar-image.tar'

HELM ?= $(GO) run helm.sh/helm/v3/cmd/helm@v3.22.0

.PHONY: manifest
manifest: go ## render deploy/ashlar.yaml from the Helm chart (compiles helm the first time)
	@HELM='$(HELM)' deploy/render.sh

# ---- packages -------------------------------------------------------------------

DEB_ARCHS ?= amd64 arm64

.PHONY: deb
deb: go ## build Debian packages into bin/ (DEB_ARCHS)
	@command -v dpkg-deb >/dev/null || { echo 'make: dpkg-deb is missing; install the package dpkg' >&2; exit 1; }
	@for arch in $(DEB_ARCHS); do GO='$(GO)' LDFLAGS='$(LDFLAGS)' deploy/deb/build.sh $$arch '$(VERSION)' bin/ashlar_$$arch.deb; done

.PHONY: test-deb
test-deb: ## look at the packages; install, upgrade, remove and purge this machine's in a copy of its system (root)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-deb needs root; run: sudo make test-deb' >&2; exit 1; }
	@$(MAKE) deb
	CGO_ENABLED=0 ASHLAR_DEBS="$(foreach arch,$(DEB_ARCHS),$(CURDIR)/bin/ashlar_$(arch).deb)" ASHLAR_DEB="$(CURDIR)/bin/ashlar_$$(dpkg --print-architecture).deb" ASHLAR_TARGET='test-deb test-root' $(GO) test -count=1 -v $(TESTFLAGS) ./test/packaging

.PHONY: cross
cross: go ## compile everything for arm64, tests too, without running it
	CGO_ENABLED=0 GOARCH=arm64 $(GO) build -o /dev/null ./cmd/ashlar
	CGO_ENABLED=0 GOARCH=arm64 $(GO) vet ./...

.PHONY: generate
generate: man ## run go generate and rewrite the man pages
	@$(GO) generate ./...

.PHONY: generate-bpf
generate-bpf: .make/bpf go ## compile the eBPF programs of observe/bpf anew; generate does so only after a change, and asks for this
	@cd observe/bpf && rm -f checksums.txt && $(GO) generate .

.PHONY: man
man: build ## write docs/man from the commands themselves
	@mkdir -p docs/man && $(BINARY) man --dir docs/man

.PHONY: run
run: .make/run build ## a node, a pool, a volume, a device, and fio's result on it (RUN_SECONDS, RUN_KEEP=1)
	@tools/run.sh

# ---- tests ----------------------------------------------------------------------

.PHONY: test
test: .make/test go ## all Go tests: with the race detector, without (allocation pins), with invariants
	CGO_ENABLED=1 $(GO) test -race -timeout $(if $(ASHLAR_TEST_LONG),4h,30m) $(TESTFLAGS) ./...
	CGO_ENABLED=0 $(GO) test -timeout $(if $(ASHLAR_TEST_LONG),4h,30m) $(TESTFLAGS) ./...
	CGO_ENABLED=0 $(GO) test -timeout 30m -tags invariants $(TESTFLAGS) ./datapath/... ./nbd/...

.PHONY: test-pool-long
test-pool-long: go ## crash the pool at every event of each of 1,463 sequences of operations; 1,000 random runs against a model (ASHLAR_TEST_SEED)
	CGO_ENABLED=0 ASHLAR_TEST_LONG=1 ASHLAR_TARGET=test-pool-long $(GO) test -count=1 -v -timeout 6h -parallel 6 -run '^(TestCrashAfterEverySequence|TestRandomOperationsAgreeWithModel)$$' $(TESTFLAGS) ./engine/pool

.PHONY: test-root
test-root: go ## the Go tests as root; what needs root fails instead of skipping
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-root needs root; run: sudo make test-root' >&2; exit 1; }
	CGO_ENABLED=0 ASHLAR_TARGET=test-root $(GO) test -count=1 $(TESTFLAGS) ./...

.PHONY: interop
interop: .make/interop build ## bin/ashlar against libnbd, nbdkit, qemu, nbd-client, fio; as root also the kernel (test-uml)
	CGO_ENABLED=0 ASHLAR_INTEROP=1 ASHLAR_TARGET=interop $(GO) test -count=1 -timeout 15m $(TESTFLAGS) ./test/interop
	@if [ "$$(id -u)" = 0 ]; then $(MAKE) test-uml; else echo 'make: not root, so the kernel client was not tested; run: sudo make test-uml' >&2; fi

.PHONY: test-uml
test-uml: .make/interop build ## the kernel's nbd client and file systems on bin/ashlar, in User Mode Linux (root)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-uml needs root; run: sudo make test-uml' >&2; exit 1; }
	CGO_ENABLED=0 ASHLAR_INTEROP=1 ASHLAR_TARGET='interop test-root test-uml' $(GO) test -count=1 -timeout 60m $(TESTFLAGS) ./test/vm

.PHONY: test-vm
test-vm: .make/vm build ## ublk devices of a real Linux 6.12, and benchmarks beside LVM, in an emulated machine (root; ASHLAR_TEST_LONG=1 kills its server 50 times)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-vm needs root; run: sudo make test-vm' >&2; exit 1; }
	CGO_ENABLED=0 $(GO) test -c -tags invariants -o .make/ublk.test ./ublk
	cd ublk && ASHLAR_TARGET='test-vm test-root test-uml interop' ../test/vm/vm-run.sh -t $(if $(ASHLAR_TEST_LONG),3600,900) -M ublk_drv \
	  -e ASHLAR_TARGET -e ASHLAR_TEST_LONG -- ../.make/ublk.test -test.v -test.timeout 1h $(TESTFLAGS)
	cd ublk && ASHLAR_TARGET='test-root test-uml' ../test/vm/vm-run.sh -M '' -e ASHLAR_TARGET -- ../.make/ublk.test -test.v -test.run 'TestWithoutTheDriver'
	CGO_ENABLED=0 ASHLAR_TARGET='test-vm test-root' $(GO) test -count=1 -v -timeout $(if $(ASHLAR_TEST_LONG),5h,60m) -run 'TestDevicesThroughUblk|TestOrphansOfUblk|TestThinVolumesOfLVM' $(TESTFLAGS) ./test/vm
	CGO_ENABLED=0 $(GO) test -c -o .make/observe.test ./observe
	cd observe && ASHLAR_TARGET='test-vm test-root test-uml' ../test/vm/vm-run.sh -t 900 -j 1 -M 'nbd:nbds_max=4 loop ublk_drv' -e ASHLAR_TARGET -- ../.make/observe.test -test.v -test.timeout 14m $(TESTFLAGS)

.PHONY: test-vm-new
test-vm-new: .make/vm build ## ublk devices of the newest Linux that Debian has, with and without copies, in an emulated machine (root; ASHLAR_TEST_LONG=1)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-vm-new needs root; run: sudo make test-vm-new' >&2; exit 1; }
	CGO_ENABLED=0 $(GO) test -c -tags invariants -o .make/ublk.test ./ublk
	cd ublk && ASHLAR_TARGET='test-vm-new test-vm test-root test-uml interop' ../test/vm/vm-run.sh -r trixie -t $(if $(ASHLAR_TEST_LONG),3600,900) -K 2 -M ublk_drv \
	  -e ASHLAR_TARGET -e ASHLAR_TEST_LONG -- ../.make/ublk.test -test.v -test.timeout 1h $(TESTFLAGS)
	CGO_ENABLED=0 VM_RELEASE=trixie ASHLAR_TARGET='test-vm-new test-vm test-root' $(GO) test -count=1 -v -timeout $(if $(ASHLAR_TEST_LONG),5h,40m) -run 'TestDevicesThroughUblk|TestAttachedDiskGoesWithoutACopy' $(TESTFLAGS) ./test/vm

.PHONY: test-powerfail
test-powerfail: .make/powerfail build ## power failures under ext4 and xfs in User Mode Linux, and kill -9 of the node (root; ASHLAR_TEST_LONG=1)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-powerfail needs root; run: sudo make test-powerfail' >&2; exit 1; }
	CGO_ENABLED=0 ASHLAR_INTEROP=1 ASHLAR_TARGET='interop test-root test-uml' $(GO) test -count=1 -timeout $(if $(ASHLAR_TEST_LONG),150m,20m) -v $(TESTFLAGS) ./test/powerfail/...

.PHONY: test-docs
test-docs: .make/run build ## run the commands of README.md and docs/ that are marked for it; see test/docs/doc.go (root)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-docs needs root; run: sudo make test-docs' >&2; exit 1; }
	CGO_ENABLED=0 ASHLAR_DOCS=1 ASHLAR_TARGET='test-docs test-root' $(GO) test -count=1 -timeout 40m $(TESTFLAGS) ./test/docs

.PHONY: test-kube
test-kube: .make/kube image ## Kubernetes with three nodes on this machine, and what deploy/ashlar.yaml does there (root; KUBE_KEEP=1)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-kube needs root; run: sudo make test-kube' >&2; exit 1; }
	@test/kube/run.sh $(TESTFLAGS)

.PHONY: test-kube-vm
test-kube-vm: .make/kube .make/vm image ## an encrypted claim, in Kubernetes in an emulated Linux 6.12, which has dm-crypt and ublk: 20 minutes (root)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-kube-vm needs root; run: sudo make test-kube-vm' >&2; exit 1; }
	@ASHLAR_TARGET='test-kube-vm test-root' test/kube/vm.sh $(TESTFLAGS)

.PHONY: bench-kube
bench-kube: .make/kube build image ## fio in a pod on a volume, against the disk itself, with the profiles of kbench and dbench (root)
	@[ "$$(id -u)" = 0 ] || { echo 'make: bench-kube needs root; run: sudo make bench-kube' >&2; exit 1; }
	@KUBE_BENCH=1 BENCHFLAGS='$(BENCHFLAGS)' test/kube/run.sh -run TestKubernetes/deploy

.PHONY: test-csi
test-csi: .make/csi build ## the CSI driver: csi-sanity on a real pool with real mounts, kills, wrong input (root; ASHLAR_TEST_LONG=1)
	@[ "$$(id -u)" = 0 ] || { echo 'make: test-csi needs root; run: sudo make test-csi' >&2; exit 1; }
	CGO_ENABLED=0 ASHLAR_TARGET='test-csi test-root' $(GO) test -count=1 $(TESTFLAGS) ./csi
	CGO_ENABLED=0 ASHLAR_CSI=1 ASHLAR_TARGET='test-csi test-root' $(GO) test -count=1 -timeout $(if $(ASHLAR_TEST_LONG),60m,20m) -v $(TESTFLAGS) ./test/csi
	CGO_ENABLED=0 $(GO) test -c -o .make/csi.test ./csi
	cd csi && ASHLAR_TARGET='test-csi-luks test-root' ../test/vm/vm-run.sh -t 900 -M 'loop dm_crypt' -e ASHLAR_TARGET -- ../.make/csi.test -test.v -test.run DMCrypt

.PHONY: fuzz
fuzz: go ## run each fuzz target for FUZZTIME
	@$(GO) test -list '^Fuzz' ./... | awk '/^Fuzz/ { name[++n] = $$1 } /^ok/ { for (i = 1; i <= n; i++) print $$2, name[i]; n = 0 }' >.make/fuzz
	@[ -s .make/fuzz ] || { echo 'make: no fuzz targets found' >&2; exit 1; }
	@while read -r package name; do \
	  echo "fuzz $$package $$name"; \
	  if CGO_ENABLED=0 timeout 3600 $(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -parallel 2 "$$package" </dev/null >.make/fuzz.log 2>&1; then \
	    tail -n 3 .make/fuzz.log; \
	  elif grep -q 'context deadline exceeded' .make/fuzz.log && ! grep -q 'Failing input written' .make/fuzz.log; then \
	    echo 'ended late, which is no finding (go.dev/issue/75804)'; \
	  else \
	    cat .make/fuzz.log; exit 1; \
	  fi; \
	done <.make/fuzz
fuzz: | .make
.make:
	@mkdir -p $@

.PHONY: cover
cover: go | .make ## statement coverage of the Go tests, in .make/cover.html
	$(GO) test -coverprofile=.make/cover.out -coverpkg=./... ./...
	$(GO) tool cover -html=.make/cover.out -o .make/cover.html
	$(GO) tool cover -func=.make/cover.out | tail -n 1

.PHONY: bench
bench: .make/bench build ## measure the performance bars against peers (BENCHFLAGS)
	$(GO) run ./benchmarks/bars --ashlar $(BINARY) --tmpfs /dev/shm/ashlar-bars.img --disk /var/tmp/ashlar-bars.img $(BENCHFLAGS)

.PHONY: results
results: go ## write benchmarks/results/README.md and its charts from the results there
	$(GO) run ./benchmarks/bars --render

.PHONY: bench-pool
bench-pool: .make/bench build ## measure the bars of the pool: 10 minutes, 32 GiB of /var/tmp (BENCHFLAGS, e.g. --short)
	$(GO) run ./benchmarks/bars --ashlar $(BINARY) --pool /var/tmp $(BENCHFLAGS)

.PHONY: bench-spin
bench-spin: .make/bench build ## measure the learned spin budget against polling always and never: latency and CPU, 8 minutes (BENCHFLAGS)
	$(GO) run ./benchmarks/bars --ashlar $(BINARY) --tmpfs /dev/shm/ashlar-bars.img --disk /var/tmp/ashlar-bars.img \
	  --only spin-tmpfs-randread-4k-qd1,spin-disk-randread-4k-qd1,spin-disk-randread-4k-qd32,spin-idle $(BENCHFLAGS)

.PHONY: bench-observe
bench-observe: .make/bench build ## measure what observation costs, in the process and end to end: 4 minutes, 32 GiB of /var/tmp (BENCHFLAGS)
	$(GO) test -run '^$$' -bench Request -benchtime 2000000x -count 5 ./datapath/filter
	$(GO) run ./benchmarks/bars --ashlar $(BINARY) --pool /var/tmp --only observe-randread-4k-qd32,observe-randwrite-4k-qd32 $(BENCHFLAGS)

# ---- what must hold for every commit -----------------------------------------------

.PHONY: check
check: build lint cross generated ## build, lint, arm64 compiles, and generated files are up to date

.PHONY: lint
lint: go ## go vet, staticcheck, gofmt, and the rules of internal/lint
	$(GO) vet ./...
	$(GO) vet -tags invariants ./datapath/... ./nbd/...
	$(GO) tool staticcheck ./...
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "make: not formatted (gofmt -w):" >&2; echo "$$unformatted" >&2; exit 1; }
	$(GO) test -count=1 ./internal/lint

# The state of every file of the tree before and after; git is not needed.
FILES = find . \( -path ./.git -o -path ./bin -o -path ./.make \) -prune -o -type f -print0 | sort -z | xargs -0 cksum

.PHONY: generated
generated: build | .make
	@$(FILES) >.make/before; $(MAKE) generate; $(FILES) >.make/after; \
	diff .make/before .make/after >.make/generated || { echo 'make: generated files were out of date; they are rewritten now, look and commit them:' >&2; sed -n 's/^> [0-9]* [0-9]* /  /p' .make/generated >&2; exit 1; }

.PHONY: clean
clean: ## remove what the targets made
	rm -rf bin .make
