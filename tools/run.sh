#!/bin/bash
# run.sh -- show Ashlar at work: start a node with a pool in a sparse file, make a
# volume in it, export that over NBD, load it with fio, print what it did.  `make
# run` builds the binary first and then calls this.
#
# Environment:
#   RUN_SECONDS  length of the fio run, default 15
#   RUN_SIZE     size of the volume, default 1G
#   RUN_POOL     size of the pool's file, default 4G; it takes only what is written
#   RUN_DIR      where its directory goes, default /var/tmp (a disk; /dev/shm is memory)
#   RUN_ARGS     more arguments for ashlar serve, e.g. "--reactors 2"
#   RUN_KEEP=1   keep serving after the result, until Ctrl-C
#
# Ctrl-C stops it at any time; the node drains and its directory is removed.
set -u
cd "$(dirname "$0")/.." || exit 1
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' tools/run.sh
  exit 0
fi

seconds=${RUN_SECONDS:-15} size=${RUN_SIZE:-1G} pool=${RUN_POOL:-4G}
die() { echo "run: $*" >&2; exit 1; }
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "RUN_SECONDS=$seconds: want a whole number of seconds"
[ -x bin/ashlar ] || die "bin/ashlar is missing; run: make build"
command -v fio >/dev/null || die "fio is missing (Debian package fio); make run installs it as root"

dir=$(mktemp -d "${RUN_DIR:-/var/tmp}/ashlar-run.XXXXXX") || die "cannot make a directory in ${RUN_DIR:-/var/tmp}"
server='' load='' device=''
cleanup() {
  trap '' INT TERM
  [ -z "$load" ] || { kill -KILL "$load"; wait "$load"; } 2>/dev/null # it holds nothing of value
  # A device outlives its daemon; this one is not to.
  [ -z "$device" ] || bin/ashlar detach "$device"
  if [ -n "$server" ] && kill -TERM "$server" 2>/dev/null; then
    echo "stopping ashlar (SIGTERM: requests in flight are served first)"
  fi
  [ -z "$server" ] || wait "$server"
  rm -rf "$dir"
}
trap cleanup EXIT
trap 'echo; exit 130' INT
trap 'exit 143' TERM HUP

socket=$dir/nbd.sock uri="nbd+unix:///demo?socket=$dir/nbd.sock"
export ASHLAR_SERVER=unix://$dir/control.sock

say() { printf '\n== %s\n' "$*"; }
say "bin/ashlar serve --data-dir $dir/node --default-pool $pool --socket $dir/control.sock --nbd-socket $socket ${RUN_ARGS:-}"
# shellcheck disable=SC2086 # RUN_ARGS is a list of words
# In a session of its own, so that Ctrl-C reaches this script only, which then stops it in order.
setsid bin/ashlar serve --data-dir "$dir/node" --default-pool "$pool" --socket "$dir/control.sock" --nbd-socket "$socket" \
  --pid-file "$dir/ashlar.pid" --log-level warn ${RUN_ARGS:-} &
server=$!
for ((i = 0; i < 100; i++)); do
  [ ! -s "$dir/ashlar.pid" ] || break
  kill -0 "$server" 2>/dev/null || { wait "$server"; status=$?; server=''; die "ashlar serve ended with status $status before it was ready"; }
  sleep 0.1
done
[ -s "$dir/ashlar.pid" ] || die "ashlar serve was not ready after 10 s"

say "bin/ashlar volume create demo --size $size"
bin/ashlar volume create demo --size "$size" || die "the volume could not be made"

if command -v nbdinfo >/dev/null; then
  say "nbdinfo '$uri'"
  nbdinfo "$uri" || die "nbdinfo failed"
fi

if [ "$(id -u)" = 0 ]; then
  say "bin/ashlar attach demo"
  if device=$(bin/ashlar attach demo); then
    bin/ashlar devices
  else
    device=''
    echo "no block device here; NBD clients need none"
  fi
fi

say "use it from another terminal while it runs"
cat <<TXT
  export ASHLAR_SERVER=$ASHLAR_SERVER
  bin/ashlar top                              (what it does, live)
  mkfs.ext4 \$(bin/ashlar attach demo)        (root; as a block device)
  nbd-client -unix $socket /dev/nbd0          (root; modprobe nbd first; nbd-client -d /dev/nbd0 detaches)
  nbdsh -u '$uri' -c 'print(h.get_size())'
  qemu-img info '$uri'
  fio --name=look --ioengine=nbd --uri='$uri' --rw=randread --bs=4k --iodepth=32
  bin/ashlar snapshot create demo@now; bin/ashlar volume map demo; bin/ashlar pool status
TXT

say "filling it: 128 KiB writes from one end to the other"
fio --name=fill --thread --ioengine=nbd --uri="$uri" --rw=write --bs=128k --iodepth=16 --size="$size" --end_fsync=1 --output-format=terse >/dev/null &
load=$!
wait "$load"
status=$?
load=''
[ "$status" = 0 ] || die "fio ended with status $status"

say "fio, $seconds s: 4 KiB random, 70 % reads, 32 requests in flight, one connection"
fio --name=mixed --thread --ioengine=nbd --uri="$uri" --rw=randrw --rwmixread=70 --bs=4k --iodepth=32 --size="$size" \
  --time_based --runtime="$seconds" --norandommap --randrepeat=0 --percentile_list=50:99:99.9 \
  --eta=always --eta-newline=2 --output="$dir/fio.out" --output-format=terse --terse-version=3 &
load=$!
wait "$load"
status=$?
load=''
[ "$status" = 0 ] || { cat "$dir/fio.out" >&2; die "fio ended with status $status"; }

say "result"
awk -F';' '/^3;/ {
    side = 0
    for (i = 1; i <= NF; i++) if ($i ~ /%=/) {
      split($i, p, "%=")
      if (p[1] == "50.000000") side++
      us[side, p[1] + 0] = p[2]
    }
    printf "%-6s %10s %9s %9s %9s %9s\n", "", "IOPS", "MB/s", "p50 us", "p99 us", "p99.9 us"
    row("read", 8, 7, 1); row("write", 49, 48, 2)
    exit ($5 != 0)
  }
  function row(name, iops, kib, side) {
    printf "%-6s %10d %9.1f %9d %9d %9d\n", name, $iops, $kib * 1.024 / 1000, us[side, 50], us[side, 99], us[side, 99.9]
  }' "$dir/fio.out" || die "cannot read fio's result: $(cat "$dir/fio.out")"

say "bin/ashlar why demo --since-start"
bin/ashlar why demo --since-start

say "bin/ashlar pool status"
bin/ashlar pool status

say "how to go on"
cat <<TXT
  RUN_KEEP=1 make run                         keep this node until Ctrl-C
  bin/ashlar doctor                           what this machine lacks, and how to get it
  bin/ashlar serve --help                     a node of your own; deploy/systemd has a unit, docs/kubernetes.md PVCs
TXT

if [ "${RUN_KEEP:-}" = 1 ]; then
  say "serving $uri until Ctrl-C"
  wait "$server"
  status=$?
  server=''
  die "ashlar serve ended with status $status"
fi
echo
