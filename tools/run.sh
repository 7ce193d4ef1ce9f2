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
# Ctrl-C stops it at any time: devices are detached, the node drains, and its directory
# is removed, with all volumes in it. While a device of it is mounted, nothing of that
# happens: the node goes on, and run.sh says how to end it later:
#
#   tools/run.sh --end DIRECTORY
set -u
cd "$(dirname "$0")/.." || exit 1
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' tools/run.sh
  exit 0
fi

die() { echo "run: $*" >&2; exit 1; }
say() { printf '\n== %s\n' "$*"; }

# ask is bin/ashlar in a session of its own: Ctrl-C is for run.sh only, and does not cut
# short what changes something.
ask() { setsid bin/ashlar "$@"; }

# served are the paths in a list of devices that the node serves; others wait for another daemon.
served() {
  sed -n 's/^ *"\(path\|attached\)": "\(.*\)",*$/\1 \2/p' | awk '$1 == "path" { path = $2 } $1 == "attached" { print path }'
}

# left says whether devices of a node that has ended wait for another daemon: those of FUSE
# are mounts below its directory; of the other ways any is counted, after a crash.
left() {
  grep -qF " $dir/" /proc/self/mountinfo || { [ -s "$dir/ashlar.pid" ] && ask devices 2>/dev/null | grep -q ^/; }
}

# node is the process of the daemon; nothing when it has ended.
node() {
  local id
  id=$(cat "$dir/ashlar.pid" 2>/dev/null) && grep -qzxF "$dir/control.sock" "/proc/$id/cmdline" 2>/dev/null && echo "$id"
}

# kept says why the directory stays, and what to do first.
kept() {
  printf '\n== not ended: %s\n' "$1" >&2
  printf '  %s stays, so that nothing hangs or is lost. To end it:\n' "$dir" >&2
  printf '    %s\n' "${@:2}" "tools/run.sh --end $dir" >&2
}

# finish detaches, stops the node and removes the directory; or leaves it all, and says so.
finish() {
  local id list path text refused='' remedies=()
  export ASHLAR_SERVER=unix://$dir/control.sock
  if id=$(node); then
    list=$(ask devices --output json 2>/dev/null) || { kept "the node does not answer" "kill $id"; return 1; }
    for path in $(served <<<"$list"); do # a device outlives its daemon; these are not to
      if text=$(ask detach "$path" 2>&1); then
        echo "$text"
      else
        text=${text#ashlar: }
        refused+=${refused:+, }${text%%; *}
        text=${text#*; }
        remedies+=("${text% first}")
      fi
    done
    [ -z "$refused" ] || { kept "$refused" "${remedies[@]}"; return 1; }
    echo "stopping ashlar (SIGTERM: requests in flight are served first)"
    kill -TERM "$id"
    while [ -n "$(node)" ]; do sleep 0.1; done
  fi
  if left; then
    kept "ashlar serve has ended, and devices wait for it; bin/ashlar devices lists them" \
      "bin/ashlar serve --data-dir $dir/node --socket $dir/control.sock --nbd-socket $dir/nbd.sock --pid-file $dir/ashlar.pid &"
    return 1
  fi
  # The keeper of FUSE devices holds none now, and would end by itself in a minute.
  for id in $(grep -lzxF -f - /proc/[0-9]*/cmdline 2>/dev/null <<<"$dir/node/keeper.sock" | cut -d/ -f3); do kill -TERM "$id" 2>/dev/null; done
  rm -rf "$dir"
}

if [ "${1:-}" = --end ]; then
  dir=${2:-}
  [ $# = 2 ] && [ -d "$dir" ] && [[ $dir == /*/ashlar-run.* ]] || die "--end: want the directory of a node that run.sh has left, /var/tmp/ashlar-run.*"
  trap '' INT TERM HUP
  finish
  exit
fi
[ $# = 0 ] || die "no arguments are wanted; see tools/run.sh --help"

seconds=${RUN_SECONDS:-15} size=${RUN_SIZE:-1G} pool=${RUN_POOL:-4G}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "RUN_SECONDS=$seconds: want a whole number of seconds"
[ -x bin/ashlar ] || die "bin/ashlar is missing; run: make build"
command -v fio >/dev/null || die "fio is missing (Debian package fio); make run installs it as root"

dir=$(mktemp -d "$(realpath "${RUN_DIR:-/var/tmp}")/ashlar-run.XXXXXX") || die "cannot make a directory in ${RUN_DIR:-/var/tmp}"
server='' early=''
cleanup() {
  local status=$? job
  trap '' INT TERM HUP
  for job in $(jobs -p); do
    [ "$job" = "$server" ] || { kill -KILL "$job"; wait "$job"; } 2>/dev/null # fio holds nothing of value
  done
  finish || exit $((status ? status : 1))
}
trap cleanup EXIT
signals() {
  trap 'echo; exit 130' INT
  trap 'exit 143' TERM HUP
}
signals

socket=$dir/nbd.sock uri="nbd+unix:///demo?socket=$dir/nbd.sock"
export ASHLAR_SERVER=unix://$dir/control.sock

say "bin/ashlar serve --data-dir $dir/node --default-pool $pool --socket $dir/control.sock --nbd-socket $socket ${RUN_ARGS:-}"
# In a session of its own, as ask, and with a log of its own: it may outlive run.sh. A
# signal is heeded once it can be ended in order.
trap 'early=130' INT
trap 'early=143' TERM HUP
# shellcheck disable=SC2086 # RUN_ARGS is a list of words
setsid bin/ashlar serve --data-dir "$dir/node" --default-pool "$pool" --socket "$dir/control.sock" --nbd-socket "$socket" \
  --pid-file "$dir/ashlar.pid" --log-level warn ${RUN_ARGS:-} >"$dir/ashlar.log" 2>&1 &
server=$!
for ((i = 0; i < 100; i++)); do
  [ ! -s "$dir/ashlar.pid" ] || break
  kill -0 "$server" 2>/dev/null || { wait "$server"; status=$?; cat "$dir/ashlar.log" >&2; die "ashlar serve ended with status $status before it was ready"; }
  sleep 0.1
done
[ -s "$dir/ashlar.pid" ] || { kill -KILL "$server"; wait "$server"; cat "$dir/ashlar.log" >&2; die "ashlar serve was not ready after 10 s"; }
signals
[ -z "$early" ] || { echo; exit "$early"; }

say "bin/ashlar volume create demo --size $size"
ask volume create demo --size "$size" || die "the volume could not be made"

if command -v nbdinfo >/dev/null; then
  say "nbdinfo '$uri'"
  nbdinfo "$uri" || die "nbdinfo failed"
fi

if [ "$(id -u)" = 0 ]; then
  say "bin/ashlar attach demo"
  if ask attach demo; then
    bin/ashlar devices
  else
    echo "no block device here; NBD clients need none"
  fi
fi

say "use it from another terminal while it runs"
cat <<TXT
  cd $PWD
  export ASHLAR_SERVER=$ASHLAR_SERVER
  bin/ashlar top                              (what it does, live)
  bin/ashlar volume create mine --size 1GiB   (demo is fio's: it is overwritten; all volumes go when this ends)
  mkfs.ext4 \$(bin/ashlar attach mine)        (root; as a block device)
  mount /dev/ashlar/default/mine /mnt         (root; umount /mnt before this ends)
  nbd-client -unix $socket -N mine /dev/nbd0  (root; modprobe nbd first; nbd-client -d /dev/nbd0 before this ends)
  nbdsh -u '$uri' -c 'print(h.get_size())'
  qemu-img info '$uri'
  fio --name=look --ioengine=nbd --uri='$uri' --rw=randread --bs=4k --iodepth=32
  bin/ashlar snapshot create demo@now; bin/ashlar volume map demo; bin/ashlar pool status
TXT

say "filling it: 128 KiB writes from one end to the other"
fio --name=fill --thread --ioengine=nbd --uri="$uri" --rw=write --bs=128k --iodepth=16 --size="$size" --end_fsync=1 --output-format=terse >/dev/null &
wait $!
status=$?
[ "$status" = 0 ] || die "fio ended with status $status"

say "fio, $seconds s: 4 KiB random, 70 % reads, 32 requests in flight, one connection"
fio --name=mixed --thread --ioengine=nbd --uri="$uri" --rw=randrw --rwmixread=70 --bs=4k --iodepth=32 --size="$size" \
  --time_based --runtime="$seconds" --norandommap --randrepeat=0 --percentile_list=50:99:99.9 \
  --eta=always --eta-newline=2 --output="$dir/fio.out" --output-format=terse --terse-version=3 &
wait $!
status=$?
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

if [ -s "$dir/ashlar.log" ]; then
  say "what the daemon had to say"
  cat "$dir/ashlar.log"
fi

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
  die "ashlar serve ended with status $status"
fi
echo
