#!/bin/bash
# kernel-attach.sh -- runs inside the guest of uml-run.sh: one test of package nbd/attach,
# or nbd, that needs the kernel's nbd driver.
#
#   kernel-attach.sh BINARY TESTS NAME
#
# BINARY is ashlar, TESTS the test binary of the package, NAME the test. A test that is
# skipped is a failure here.
set -eu -o pipefail
binary=$1 tests=$2 name=$3
work=/run/ashlar

mkdir -p $work
mount -t tmpfs -o size=80% tmpfs $work
export ASHLAR_GUEST_BINARY=$binary ASHLAR_GUEST_DIR=$work
"$tests" -test.v -test.run "^$name\$" -test.timeout 14m 2>&1 | tee $work/log
grep -q -- "^--- PASS: $name " $work/log || { echo "kernel-attach: $name did not run" >&2; exit 1; }
