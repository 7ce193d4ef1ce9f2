#!/bin/bash
# orphans.sh -- runs inside a guest of uml-run.sh or vm-run.sh, or on a host: `ashlar
# devices` and `ashlar detach` when the daemon is gone.
#
#   orphans.sh BINARY VIA
#
# BINARY is ashlar, VIA one of ublk, nbd and fuse.
binary=$1 via=$2 work=/run/ashlar-orphans
. "${0%/*}/lib.sh"
ashlar() { timeout 120 "$binary" "$@"; } # nothing may hang
says() { # says TEXT COMMAND...: it does it and says TEXT
  local want=$1 said; shift
  said=$("$@" 2>&1) || fail "failed ($?): $*: $said"
  grep -q -- "$want" <<<"$said" || fail "$*: said '$said', not '$want'"
}
clean() { # on a host nothing may be left behind, whatever failed
  umount -l $work/mnt 2>/dev/null
  [ -z "$daemon" ] || kill -9 $daemon 2>/dev/null
  wait 2>/dev/null
  if [ -n "${d:-}" ]; then ashlar detach --force $d >&2; fi
}
trap clean EXIT
gone() { # gone DEVICE: it, its names, and its mount; others of the host are not ours
  ashlar devices 2>/dev/null | grep "^$1 .*default/orphan-" && fail "$1 is still there"
  local name
  for name in orphan-data orphan-other; do [ -L /dev/ashlar/default/$name ] && fail "a name is left: $name"; done
  grep -q " $work/node/fuse" /proc/self/mountinfo && fail "a mount is left: $(grep $work/node/fuse /proc/self/mountinfo)"
  case $1 in
    /dev/ublkb*) [ -e $1 ] && fail "$1 is left" ;;
    *) [ "$(cat /sys/block/${1##*/}/loop/backing_file /sys/block/${1##*/}/pid 2>/dev/null)" = "" ] || fail "$1 is attached" ;;
  esac
}

start
try ashlar volume create orphan-data --size 64MiB >/dev/null
try ashlar volume create orphan-other --size 64MiB >/dev/null
d=$(ashlar attach orphan-data --via $via) || fail attach
try dd if=/dev/urandom of=$d bs=1M count=8 oflag=direct status=none

# Another daemon than the one that is asked lives: what it serves is its own.
none="--server unix://$work/none.sock"
says "another daemon serves it" ashlar devices $none
refuse "served by a daemon" ashlar detach $none $d
refuse "served by a daemon" ashlar detach $none --force $d
try cmp -n 4096 $d $d

# Killed: the list has it, without a server, by its name.
die
says "waiting: no server" ashlar devices
says "default/orphan-data" ashlar devices
says "no daemon at unix://$work/node/control.sock" ashlar devices --support
refuse "no device nothing of Ashlar" ashlar detach nothing
refuse "no device /dev/null of Ashlar" ashlar detach /dev/null
refuse "CAP_SYS_ADMIN" setpriv --bounding-set -sys_admin --inh-caps -sys_admin "$binary" detach $d
says "is detached" ashlar detach $d
gone $d

# By the volume's name, after a daemon that was not the first.
start
d=$(ashlar attach orphan-data --via $via) || fail attach
die
start
says "another daemon serves it" ashlar devices $none
refuse "served by a daemon" ashlar detach $none orphan-data
die
says "is detached" ashlar detach orphan-data
gone $d

# Mounted: refused, forced or not, and named; also in a mount namespace of somebody's.
# The file system goes on with the next daemon.
start
d=$(ashlar attach orphan-data --via $via) || fail attach
try mkfs.ext4 -q -F $d
try mount $d $work/mnt
try touch $work/mnt/kept
try sync -f $work/mnt
die
refuse "mounted on $work/mnt" ashlar detach $d
refuse "mounted on $work/mnt" ashlar detach --force orphan-data
start
try ls $work/mnt/kept >/dev/null
unshare --mount --propagation private sleep 600 & elsewhere=$!
sleep 1
try umount $work/mnt
die
refuse "of process" ashlar detach --force $d
start # what unmounts a file system waits for its device
kill $elsewhere
wait $elsewhere 2>/dev/null
for i in $(seq 100); do ashlar detach $d >/dev/null 2>&1 && break; sleep 0.1; done
gone $d

# Requests that wait: they end with an error, if that is asked for, and nothing hangs.
d=$(ashlar attach orphan-other --via $via) || fail attach
exec 9>$d # the first who opens a device may have the kernel look for partitions
die
dd if=/dev/zero of=$d bs=4k count=1 oflag=direct status=none 2>$work/dd 9>&- & writer=$!
for i in $(seq 100); do # until it waits for the device
  grep -q '^State:.*D' /proc/$writer/status && break
  sleep 0.1
done
for i in $(seq 100); do
  said=$(ashlar detach $d 2>&1) && fail "detached with a writer: $said"
  grep -q "one request waits" <<<"$said" && break
  [ -d /sys/kernel/debug/block ] || break # where they are counted
  sleep 0.1
done
grep -q "open for writing in dd (process $writer)\|, dd (process $writer)" <<<"$said" || fail "the writer goes unnamed: $said"
[ ! -d /sys/kernel/debug/block ] || grep -q "one request waits" <<<"$said" || fail "the waiting request goes unnamed: $said"
grep -q -- "--force" <<<"$said" || fail "no remedy: $said"
echo "refused: $said"
exec 9>&-
says "ended with an error" ashlar detach --force $d
wait $writer && fail "the writer saw no error"
grep -q "Input/output error" $work/dd || fail "the writer saw $(cat $work/dd)"
gone $d

# What is left works: the volume, and the driver.
start
d=$(ashlar attach orphan-data --via $via) || fail attach
try dd if=$d of=/dev/null bs=1M count=1 iflag=direct status=none
try ashlar detach orphan-data >/dev/null
stop
gone $d
if [ $via = fuse ]; then
  # The keeper is gone too: what is left of the device is dead, and taken away.
  start
  d=$(ashlar attach orphan-data --via fuse) || fail attach
  keeper=$(pgrep -f "fuse-keeper --socket $work/node/keeper.sock") || fail "no keeper"
  die
  kill -9 $keeper
  says "no server" ashlar devices
  says "is detached" ashlar detach orphan-data
  gone $d
fi
d=
umount $work
echo "PASS orphans $via"
