#!/bin/bash
# zerocopy.sh -- runs inside a guest of vm-run.sh -r trixie -K 2 -M ublk_drv: `ashlar
# attach` of a disk and of a file, whose bytes do not pass through the daemon, and of what
# is copied, under kills of the daemon with -9.
#
#   zerocopy.sh BINARY [KILLS]
binary=$1 via=ublk kills=${2:-3} pool=300MiB
. "${0%/*}/lib.sh"
mkdir -p $work/disk
attach() { # attach SOURCE TEXT: prints the device, of which the daemon says TEXT
  local said
  said=$(ashlar attach "$1" --via ublk --output json) || fail "attach $1"
  grep -q "\"why\": \".*$2" <<<"$said" || fail "$1: $said does not say '$2'"
  sed -n 's/.*"path": "\(.*\)",*$/\1/p' <<<"$said"
}

start
ashlar devices --support | grep 'without a copy' || fail "$(ashlar devices --support)"
try mkfs.ext4 -q -F /dev/vdb
try mount /dev/vdb $work/disk
try truncate -s 256M $work/disk/disk.img $work/memory.img
try ashlar volume create data --size 64MiB >/dev/null
disk=$(attach /dev/vda 'without a copy') || exit 1
file=$(attach $work/disk/disk.img 'without a copy') || exit 1
attach data 'CRC' || exit 1
attach $work/memory.img 'past the page cache' || exit 1
try mkfs.ext4 -q $file
try mount $file $work/mnt
fio --name=v --filename=$disk --direct=1 --ioengine=libaio --rw=randrw --bsrange=4k-64k --iodepth=16 --size=64m \
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=31 --output-format=terse >$work/fio 2>&1 &
fio=$!
for i in $(seq $kills); do
  sleep 1
  dd if=/dev/urandom of=$work/random bs=1M count=4 status=none
  try cp $work/random $work/mnt/file$i
  crash
  try sync -f $work/mnt
  md5sum <$work/random >>$work/sums
  ps -p $fio >/dev/null && echo "killed under fio"
done
wait $fio || fail "fio: $(cat $work/fio)"
ashlar devices
attach /dev/vda 'without a copy' >/dev/null || exit 1
try umount $work/mnt
try fsck.ext4 -f -n $file >/dev/null
try mount $file $work/mnt
for i in $(seq $kills); do md5sum <$work/mnt/file$i; done | cmp - $work/sums || fail "files came back changed"
try umount $work/mnt
grep -c 'zero_copy=true' $work/log
for d in $disk $file data $work/memory.img; do try ashlar detach $d >/dev/null; done
try umount $work/disk
stop
echo PASS zerocopy
