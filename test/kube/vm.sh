#!/bin/bash
# vm.sh [GO-TEST-ARGUMENTS] -- run.sh with one node in the emulated machine of
# test/vm/vm-run.sh, whose kernel has dm-crypt, ublk and nbd, for machines whose kernel has
# none of them. It takes twenty minutes, 90 at most, and leaves nothing but
# $KUBE_CACHE and what vm-run.sh keeps.
#
# Without arguments: the steps deploy, encrypted and nothing-left. With -run, the
# pattern must have deploy too.
#
#   KUBE_CACHE=DIR      as in run.sh
#   VM_RELEASE=trixie   the newest kernel that Debian has, instead of Linux 6.12
#
# bin/ashlar-image.tar must have been built (make image).
set -eu
cd "$(dirname "$0")"
. cluster/env.sh
KUBE_VM=1 cluster/needs.sh
[ -e "$ROOT/bin/ashlar-image.tar" ] || die "bin/ashlar-image.tar is missing; run make image"
[ $# -gt 0 ] || set -- -run 'TestKubernetes/^(deploy|encrypted|nothing-left)$'
begin=$SECONDS
cluster/build.sh
mkdir -p "$ROOT/.make"
CGO_ENABLED=0 go test -c -o "$ROOT/.make/kube.test" .
images=$(mktemp -d "$CACHE/vm.XXXXXX")
trap 'rm -rf "$images"' EXIT
trap 'exit 130' INT TERM
cluster/unpack.sh "$images/containerd" "$CACHE/images.tar" "$ROOT/bin/ashlar-image.tar"
printf 'test-kube: %-36s %4d s\n' "downloaded and built (kept)" $((SECONDS - begin))
# Emulation is ten to twenty times slower than the machine: waits may be longer.
export KUBE_CACHE=$CACHE KUBE_IMAGES=$images/containerd KUBE_RUN=/kube/run KUBE_NODES=1 KUBE_SLOW=6 KUBE_TEST=$ROOT/.make/kube.test
../vm/vm-run.sh -t 5400 -m 6G -K 1:16G -M '' -e ASHLAR_TARGET \
  -e KUBE_CACHE -e KUBE_IMAGES -e KUBE_RUN -e KUBE_NODES -e KUBE_SLOW -e KUBE_TEST -- cluster/guest.sh "$@"
