#!/bin/bash
# run.sh [GO-TEST-ARGUMENTS] -- bring the test cluster up, run the tests of this directory
# on it, and take it down. It prints how long each part took.
#
#   KUBE_KEEP=1     leave the cluster running; test/kube/cluster/kubectl talks to it, and
#                   test/kube/cluster/down.sh takes it down
#   KUBE_CACHE=DIR  what is downloaded and built, kept: default /var/cache/ashlar-kube
#   KUBE_RUN=DIR    state of the cluster: default /var/tmp/ashlar-kube
#   KUBE_NODES=N    nodes, default 3
#   KUBE_SLOW=N     wait N times as long as usual for things to happen
#   KUBE_TEST=FILE  these tests, compiled, instead of `go test`; all else must be built
#   KUBE_BENCH=1    run benchmarks/kube after the tests, with the options $BENCHFLAGS
#
# bin/ashlar-image.tar must have been built (make image).
set -eu
cd "$(dirname "$0")"
. cluster/env.sh
begin=$SECONDS
lap() { printf 'test-kube: %-36s %4d s\n' "$1" $((SECONDS - begin)); begin=$SECONDS; }
cluster/needs.sh
[ -e "$ROOT/bin/ashlar-image.tar" ] || die "bin/ashlar-image.tar is missing; run make image"
if [ -z "${KUBE_TEST-}" ]; then
  cluster/build.sh
  lap "downloaded and built (kept)"
fi
finish() {
  status=$?
  begin=$SECONDS
  if [ "${KUBE_KEEP-}" ]; then
    echo "test-kube: the cluster runs on; test/kube/cluster/down.sh takes it down"
  else
    cluster/down.sh
    lap "cluster down"
  fi
  exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM
cluster/up.sh "$ROOT/bin/ashlar-image.tar"
lap "cluster up"
export HELM=$BIN/helm ASHLAR_KUBE=1
if [ "${KUBE_TEST-}" ]; then
  "$KUBE_TEST" -test.timeout 60m -test.v "${@/#-/-test.}"
else
  CGO_ENABLED=0 go test -count=1 -timeout 60m -v "$@" .
fi
lap "tests"
if [ "${KUBE_BENCH-}" ]; then
  (cd "$ROOT" && go run ./benchmarks/kube --kubectl test/kube/cluster/kubectl --output benchmarks/results ${BENCHFLAGS-})
  lap "benchmark"
fi
