#!/bin/bash
# lib.sh -- sourced by devices.sh, orphans.sh and zerocopy.sh: a daemon, how it is started,
# killed and ended, and how a script fails. The script has set binary and via; it may set
# work, its folder, pool, the size of the daemon's pool, and program, what the daemon is
# started from.
set -u -o pipefail
work=${work:-/run/ashlar} program=${program:-$binary}
mkdir -p $work
mount -t tmpfs -o size=80% tmpfs $work
mkdir -p $work/mnt $work/node
export ASHLAR_SERVER=unix://$work/node/control.sock
ashlar() { "$binary" "$@"; }
fail() {
  echo "${0##*/}: $*" >&2
  tail -n 20 $work/log | sed 's/^/daemon: /' >&2
  dmesg 2>/dev/null | tail -n 15 >&2
  exit 1
}
try() { "$@" || fail "failed ($?): $*"; }
refuse() { # refuse TEXT COMMAND...: it fails and says TEXT
  local want=$1 said; shift
  said=$("$@" 2>&1) && fail "was not refused: $*: $said"
  grep -q -- "$want" <<<"$said" || fail "$*: said '$said', not '$want'"
}
is() { [ "$1" = "$2" ] || fail "'$1' is not '$2': $3"; }

# An emulated machine with two CPUs dies now and then in an instruction that the kernel
# patches for a tracepoint, which a daemon that observes has it do at each start and end.
observe=
[ $via != ublk ] || observe='--observe none'
daemon=
start() {
  "$program" serve --data-dir $work/node --socket $work/node/control.sock --default-pool ${pool:-600MiB} \
    --nbd-socket $work/node/nbd.sock --log-level info $observe >>$work/log 2>&1 &
  daemon=$!
  wait_ready
}
wait_ready() {
  local i
  for i in $(seq 600); do
    ashlar pool list >/dev/null 2>&1 && return
    kill -0 $daemon 2>/dev/null || fail "the daemon ended"
    sleep 0.1
  done
  fail "the daemon does not answer"
}
die() { kill -9 $daemon; wait $daemon 2>/dev/null; daemon=; }
crash() { die; start; }
stop() { kill -TERM $daemon; wait $daemon || fail "the daemon ended with $?"; daemon=; }
