#!/bin/bash
# kernel-nbd.sh -- runs inside the guest of uml-run.sh: the kernel's nbd client on
# bin/ashlar, with a file system on top that is filled, trimmed, checked and
# compared.
#
#   kernel-nbd.sh BINARY FSSTRESS ext4|xfs|btrfs [EXPORT ARGUMENT...]
#
# BINARY is ashlar; FSSTRESS the program of test/fsstress, which drives one file
# through random operations.  The first failure ends it with a non-zero status.
set -eu -o pipefail
binary=$1 fsstress=$2 fs=$3
shift 3
connections=4 device=/dev/nbd0 work=/run/ashlar mnt=/run/ashlar/mnt
server=''

step() { printf '%6.1f s  %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*"; }
fail() { echo "kernel-nbd: $*" >&2; exit 1; }
ended() {
  status=$?
  if [ $status != 0 ]; then
    echo '--- the server'; cat $work/server.log || true
    echo '--- the kernel'; dmesg | tail -n 30
  fi
  exit $status
}
trap ended EXIT

serve() { # serve ARGUMENT...: start the server, wait until it is ready
  rm -f $work/pid
  "$binary" export --socket $work/socket --pid-file $work/pid --verbose "$@" >>$work/server.log 2>&1 &
  server=$!
  for ((i = 0; i < 300; i++)); do
    [ ! -s $work/pid ] || return 0
    kill -0 $server 2>/dev/null || fail "the server ended at once"
    sleep 0.1
  done
  fail "the server was not ready within 30 s"
}

stop() { # SIGTERM, and the exit status must be 0
  kill -TERM $server
  wait $server || fail "the server ended with status $? after SIGTERM"
  server=''
}

attach() { # attach ARGUMENT...
  nbd-client -unix $work/socket $device -connections $connections "$@"
  for ((i = 0; i < 100; i++)); do
    [ "$(blockdev --getsize64 $device)" = 0 ] || return 0
    sleep 0.1
  done
  fail "$device has no size"
}

detach() {
  nbd-client -d $device
  for ((i = 0; i < 100; i++)); do
    [ -e /sys/block/nbd0/pid ] || return 0
    sleep 0.1
  done
  fail "$device is still connected"
}

check() { # check PATH: the file system on a device or in a file, without repairing it
  case $fs in
    ext4) e2fsck -fn "$1" ;;
    btrfs) btrfs check --readonly "$1" ;;
    xfs) if [ -f "$1" ]; then xfs_repair -n -f "$1"; else xfs_repair -n "$1"; fi ;;
  esac >$work/check.log 2>&1 || { cat $work/check.log; fail "$fs on $1 is damaged"; }
}

mkdir -p $work
mount -t tmpfs -o size=80% tmpfs $work
mkdir $mnt
truncate -s 512M $work/disk

serve "$@" $work/disk
attach
step "attached: $(blockdev --getsize64 $device) bytes"
step "discard $(cat /sys/block/nbd0/queue/discard_max_bytes), write zeroes $(cat /sys/block/nbd0/queue/write_zeroes_max_bytes), cache $(cat /sys/block/nbd0/queue/write_cache)"
[ "$(cat /sys/block/nbd0/queue/discard_max_bytes)" != 0 ] || fail "the kernel sees no trim"
[ "$(cat /sys/block/nbd0/queue/write_cache)" = 'write back' ] || fail "the kernel sees no flush"

case $fs in
  ext4) mkfs.ext4 -q -F -E nodiscard $device ;;
  xfs) mkfs.xfs -q -f $device ;;
  btrfs)
    modprobe btrfs || fail "Linux $(uname -r) has no btrfs"
    mkfs.btrfs -q -f $device >/dev/null 2>&1 || fail "mkfs.btrfs" # 6.2 says what changed in 5.15 all the same
    ;;
  *) fail "no file system $fs" ;;
esac
mount $device $mnt
step "$fs made and mounted"

fio --name=verify --directory=$mnt --size=48M --rw=randwrite --bsrange=512-64k --ioengine=libaio --iodepth=16 --fsync=64 \
  --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --eta=never --output=$work/fio.log || { cat $work/fio.log; fail "fio"; }
fio --name=direct --directory=$mnt --size=48M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32 \
  --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --eta=never --output=$work/fio.log || { cat $work/fio.log; fail "fio with O_DIRECT"; }
step "fio verified"

"$fsstress" --steps 2000 $mnt/file >$work/fsstress.log 2>&1 || { cat $work/fsstress.log; fail "fsstress"; }
step "$(tail -n 1 $work/fsstress.log)"

mkdir $mnt/keep
for ((i = 0; i < 40; i++)); do
  head -c $((i * 40000 + 1)) /dev/urandom >$mnt/keep/$i
done
rm $mnt/verify.* $mnt/direct.*
(cd $mnt && sha256sum keep/*) >$work/sums
sync
fstrim $mnt
step "trimmed: $(du -m $work/disk | cut -f1) MiB of the file are in use"
umount $mnt
check $device
step "$fs is clean"

mount $device $mnt
(cd $mnt && sha256sum --quiet -c $work/sums) || fail "files differ after a remount"
umount $mnt
detach
stop
check $work/disk
step "server stopped; the file itself is clean"

serve "$@" --read-only $work/disk
attach
[ "$(blockdev --getro $device)" = 1 ] || fail "a read-only export gave a writable device"
mount -o ro $device $mnt
(cd $mnt && sha256sum --quiet -c $work/sums) || fail "files differ through a second server"
umount $mnt
step "same files through a read-only export"
detach
kill -KILL $server
wait $server || true # 137
serve "$@" $work/disk
stop
step "started again at once after a stop and after a kill"
! dmesg | grep -iE 'I/O error|nbd0: .*(error|timed out)|corrupt' || fail "the kernel complained"
step "the kernel has no complaint"
