#!/bin/bash
# devices.sh -- runs inside a guest of uml-run.sh or vm-run.sh: `ashlar attach` as
# a user uses it.
#
#   devices.sh BINARY VIA TEST [COUNT]
#
# BINARY is ashlar, VIA one of ublk, nbd and fuse. FSSTRESS in the environment is the
# program of test/fsstress, for the tests that name it. TEST:
#   life     attach, detach, refusals, growing, discard, names, files, snapshots
#   kill     COUNT (default 3) kills of the daemon with -9 under a verifying writer on
#            a mounted file system, each on ext4, xfs and btrfs; then fsck
#   reload   COUNT hand-overs to a new binary by SIGHUP under the same load, on ext4 and
#            xfs: none pauses longer than 20 s
#   many     COUNT (default 250) attached volumes: attaching does not slow down, and a
#            volume takes at most 1 MiB of memory
#   btrfs    a btrfs: verified writing, a snapshot of the volume while it is mounted and
#            written, a kill, fstrim, growing, btrfs check of both
#   stress   fsstress on an ext4, an xfs, a btrfs and the bare device at once, with COUNT
#            (default 3) kills meanwhile
#   cases    what blktests asks of a driver, asked of our devices, with COUNT (default 20)
#            times of attaching and detaching, fewer cases below 10; see cases.sh
#
# What is measured is printed as "FIGURE NAME NUMBER": pause, of one hand-over, in seconds;
# memory, of one idle volume, in MiB; and time, what attaching one of the last volumes takes
# beside one of the first.
binary=$1 via=$2 test=$3 count=${4:-}
. "${0%/*}/lib.sh"

# On a host other daemons may have names there, which are not these tests'.
[ $via != fuse ] || { mkdir -p /dev/ashlar && mount -t tmpfs tmpfs /dev/ashlar; }
no_names() { [ -z "$(find /dev/ashlar -mindepth 1 2>/dev/null)" ] || fail "names are left: $(find /dev/ashlar)"; }

# On a host nothing may be left behind, whatever failed.
clean() {
  touch $work/stop
  umount -l $work/mnt $work/mnt.* 2>/dev/null
  if [ -n "$daemon" ] && kill -0 $daemon 2>/dev/null; then
    for d in $(ashlar devices --output json 2>/dev/null | sed -n 's/.*"path": "\(.*\)",/\1/p'); do ashlar detach --force $d >&2; done
    kill -TERM $daemon
    wait $daemon
  fi
  [ $via != fuse ] || { umount /dev/ashlar; rmdir /dev/ashlar; } 2>/dev/null # unless it is others', too
}
trap clean EXIT
now() { date +%s%3N; }
figure() { echo "FIGURE $1 $2"; } # figure NAME NUMBER
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; } # of numbers, one a line
listed() { # listed DEVICE BYTES RO: so lsblk has it; the drivers know no serial number
  is "$(lsblk -bndo NAME,SIZE,RO,SERIAL $1 | xargs)" "${1##*/} $2 $3" "name, size, read-only and serial of lsblk"
}

life() {
  start
  ashlar devices --support
  try ashlar volume create data --size 320MiB >/dev/null
  d=$(ashlar attach data --via $via) || fail attach
  [ -b "$d" ] || fail "$d is no block device"
  is "$(ashlar attach data --via $via)" "$d" "attached twice"
  is "$(readlink /dev/ashlar/default/data)" "$d" "the name"
  is "$(blockdev --getsize64 $d)" $((320 << 20)) size
  listed $d $((320 << 20)) 0
  is "$(lsblk -ndo NAME /dev/ashlar/default/data | xargs)" ${d##*/} "the device of the name, by lsblk"
  refuse "attached as $d" ashlar attach data --read-only
  refuse "not found" ashlar attach nothing
  refuse "must be one of" ashlar attach data --via floppy
  refuse "no such file" ashlar attach /nowhere/disk.img
  refuse "in use" ashlar volume delete data --yes
  refuse "has volumes attached" ashlar pool close default
  refuse "is in use by process" "$binary" serve --data-dir $work/node --socket $work/other.sock
  # Growing a mounted ext4 takes CAP_SYS_RESOURCE, which not every host gives.
  local grow="resize2fs $d"
  if [ $via = fuse ]; then
    try mkfs.xfs -q -f $d
    grow="xfs_growfs $work/mnt"
  else
    try mkfs.ext4 -q -E nodiscard $d
  fi
  try mount $d $work/mnt
  ashlar devices
  is "$(lsblk -ndo MOUNTPOINT $d | xargs)" $work/mnt "the mount, by lsblk"
  refuse "mounted on $work/mnt" ashlar detach $d
  refuse "mounted on $work/mnt" ashlar detach data
  # Space comes, goes, and comes back to the pool.
  try dd if=/dev/urandom of=$work/mnt/big bs=1M count=48 conv=fsync status=none
  full=$(allocated data)
  try rm $work/mnt/big
  for i in $(seq 20); do # xfs frees the blocks of a file some time after the file
    try sync -f $work/mnt
    try fstrim $work/mnt
    less=$(allocated data)
    [ $((full - less)) -lt $((40 << 20)) ] || break
    sleep 0.5
  done
  [ $((full - less)) -ge $((40 << 20)) ] || fail "fstrim gave back only $((full - less)) of $full"
  # Growing.
  try ashlar volume resize data --size 400MiB >/dev/null
  if [ "$(blockdev --getsize64 $d)" = $((400 << 20)) ]; then
    try $grow >/dev/null
    [ $(df --output=size -B1M $work/mnt | tail -1) -gt 330 ] || fail "the file system has not grown"
  else
    ashlar devices | grep "has not" || fail "the device has not grown, and nobody says so"
    echo "growing in use: not with this kernel"
  fi
  try umount $work/mnt
  try blockdev --flushbufs $d
  try blkdiscard -z -o 0 -l 4096 $d
  # A snapshot is read-only; a file is no volume.
  try ashlar snapshot create data@one >/dev/null
  s=$(ashlar attach data@one --via $via) || fail "attach a snapshot"
  listed $s $((400 << 20)) 1
  truncate -s 64M $work/file
  f=$(ashlar attach $work/file --via $via) || fail "attach a file"
  try dd if=/dev/urandom of=$f bs=1M count=8 oflag=direct status=none
  cmp -n $((8 << 20)) $f $work/file || fail "the file is not what was written"
  is "$(ashlar devices --output json | grep -c '"path"')" 3 "three devices"
  # The daemon goes, and comes: everything is still there, known by its source.
  before=$(ashlar devices --output json | grep -E '"(path|source|attached)"')
  stop
  ashlar devices 2>/dev/null | grep "^$d " | grep -q "waiting: no server" || fail "without a daemon: $(ashlar devices 2>&1)"
  [ -b $d ] || fail "the device went with the daemon"
  start
  after=$(ashlar devices --output json | grep -E '"(path|source|attached)"')
  is "$after" "$before" "after a restart"
  try cmp -n $((8 << 20)) $f $work/file
  # A closed pool: its devices wait, and go on when it is opened.
  try ashlar detach $s >/dev/null
  try ashlar detach $work/file >/dev/null
  try ashlar detach data >/dev/null
  is "$(ashlar devices --output json | grep -c '"path"')" 0 "nothing attached"
  no_names
  try ashlar snapshot delete data@one --yes --wait >/dev/null
  try ashlar volume delete data --yes >/dev/null
  stop
}

load() { # load DIR: a writer that verifies, until $work/stop
  local round=0
  while [ ! -e $work/stop ]; do
    round=$((round + 1))
    # Through the page cache and around it.
    fio --directory=$1 --rw=randwrite --bs=4k --size=16M --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 \
      --randseed=$round --fallocate=none --minimal --name=cached --ioengine=psync --fsync=32 \
      --name=direct --ioengine=libaio --direct=1 --iodepth=16 >$work/fio 2>&1 ||
      { echo "fio, round $round: $(cat $work/fio)" >>$work/broken; return; }
  done
  echo $round >$work/rounds
}

has_fs() { # has_fs FS: this kernel has it, or says by name that it does not
  grep -qw $1 /proc/filesystems || modprobe -q $1 || { echo "SKIP $1: Linux $(uname -r) has no $1"; return 1; }
}

make_fs() { # make_fs FS DEVICE
  case $1 in
    ext4) try mkfs.ext4 -q -F $2 ;;
    *) mkfs.$1 -q -f $2 >$work/mkfs 2>&1 || fail "mkfs.$1: $(cat $work/mkfs)" ;; # mkfs.btrfs is not quiet
  esac
}

check_fs() { # check_fs FS DEVICE: without repairing it
  case $1 in
    ext4) e2fsck -fn $2 ;;
    xfs) xfs_repair -n $2 ;;
    btrfs) btrfs check --readonly $2 ;;
  esac >$work/check 2>&1 || { cat $work/check >&2; fail "$1 on $2 is damaged"; }
}

under_load() { # under_load FS ACT: ACT count times under a writer on a mounted FS
  local fs=$1 act=$2 i d
  try ashlar volume create $fs --size 320MiB >/dev/null
  d=$(ashlar attach $fs --via $via) || fail attach
  make_fs $fs $d
  try mount $d $work/mnt
  rm -f $work/stop $work/broken $work/rounds
  load $work/mnt & writer=$!
  for i in $(seq $count); do
    sleep 1.$((RANDOM % 10))
    $act
    [ -e $work/broken ] && fail "after $i times: $(cat $work/broken)"
    grep -q " $work/mnt .*[ ,]rw[, ]" /proc/mounts || fail "read-only after $i times"
  done
  touch $work/stop
  wait $writer
  [ -e $work/broken ] && fail "at the end: $(cat $work/broken)"
  echo "$fs: $count times, $(cat $work/rounds) rounds of writing and verifying"
  try umount $work/mnt
  check_fs $fs $d
  try ashlar detach $d >/dev/null
  try ashlar volume delete $fs --yes >/dev/null
}

kills() {
  count=${count:-3}
  start
  under_load ext4 crash
  under_load xfs crash
  if has_fs btrfs; then under_load btrfs crash; fi
  stop
}

allocated() { ashlar volume show $1 --output json | sed -n 's/.*"allocated_bytes": *"\{0,1\}\([0-9]*\).*/\1/p'; }

btrfs_life() {
  local d s writer less
  has_fs btrfs || return 0
  start
  try ashlar volume create tree --size 320MiB >/dev/null
  d=$(ashlar attach tree --via $via) || fail attach
  make_fs btrfs $d
  try mount $d $work/mnt
  for i in $(seq 20); do head -c $((i * 40000 + 1)) /dev/urandom >$work/mnt/keep$i; done
  (cd $work/mnt && sha256sum keep*) >$work/sums
  try sync -f $work/mnt
  # A snapshot under writing; then a kill.
  mkdir $work/mnt/load
  rm -f $work/stop $work/broken
  load $work/mnt/load & writer=$!
  sleep 1
  try ashlar snapshot create tree@mounted >/dev/null
  crash
  sleep 1
  touch $work/stop
  wait $writer
  [ ! -e $work/broken ] || fail "$(cat $work/broken)"
  grep -q " $work/mnt .*[ ,]rw[, ]" /proc/mounts || fail "read-only after a kill"
  # Space comes back; btrfs keeps the extents of a transaction until the next.
  try dd if=/dev/urandom of=$work/mnt/big bs=1M count=32 conv=fsync status=none
  local full=$(allocated tree)
  try rm $work/mnt/big
  for i in $(seq 20); do
    try sync -f $work/mnt
    try fstrim $work/mnt
    less=$(allocated tree)
    [ $((full - less)) -lt $((24 << 20)) ] || break
    sleep 0.5
  done
  [ $((full - less)) -ge $((24 << 20)) ] || fail "fstrim gave back only $((full - less)) of $full"
  try ashlar volume resize tree --size 400MiB >/dev/null
  if [ "$(blockdev --getsize64 $d)" = $((400 << 20)) ]; then
    try btrfs filesystem resize max $work/mnt >/dev/null
    [ $(df --output=size -B1M $work/mnt | tail -1) -gt 330 ] || fail "the file system has not grown"
  else
    echo "growing in use: not with this kernel"
  fi
  try umount $work/mnt
  check_fs btrfs $d
  try mount $d $work/mnt
  (cd $work/mnt && sha256sum --quiet -c $work/sums) || fail "files differ after a remount"
  try umount $work/mnt
  # The snapshot has the same identity, so the kernel must forget the volume first. It
  # is as after a power failure, and cannot be written: the log stays unread.
  try ashlar detach $d >/dev/null
  try btrfs device scan --forget
  s=$(ashlar attach tree@mounted --via $via) || fail "attach the snapshot"
  check_fs btrfs $s
  try mount -o ro,rescue=nologreplay $s $work/mnt
  (cd $work/mnt && sha256sum --quiet -c $work/sums) || fail "files of the snapshot differ"
  try umount $work/mnt
  try btrfs device scan --forget
  try ashlar detach $s >/dev/null
  try ashlar snapshot delete tree@mounted --yes --wait >/dev/null 2>&1
  try ashlar volume delete tree --yes >/dev/null
  stop
}

stress() {
  count=${count:-3}
  local fs d path i list=
  declare -A device runs
  rm -f $work/stop
  start
  for fs in ext4 xfs btrfs bare; do
    [ $fs = bare ] || has_fs $fs || continue
    list+=" $fs"
    try ashlar volume create s-$fs --size 320MiB >/dev/null
    d=$(ashlar attach s-$fs --via $via) || fail attach
    device[$fs]=$d path=$d
    if [ $fs != bare ]; then
      make_fs $fs $d
      mkdir -p $work/mnt.$fs
      try mount $d $work/mnt.$fs
      path=$work/mnt.$fs/file
    fi
    "$FSSTRESS" --until $work/stop --steps 300 --size $((8 << 20)) $path >$work/stress.$fs 2>&1 &
    runs[$fs]=$!
  done
  for i in $(seq $count); do
    sleep 1.$((RANDOM % 10))
    crash
    for fs in $list; do kill -0 ${runs[$fs]} 2>/dev/null || fail "$fs, after $i kills: $(cat $work/stress.$fs)"; done
  done
  touch $work/stop
  for fs in $list; do
    wait ${runs[$fs]} || fail "$fs: $(cat $work/stress.$fs)"
    echo "$fs: $(tail -n 1 $work/stress.$fs)"
    if [ $fs != bare ]; then
      try umount $work/mnt.$fs
      check_fs $fs ${device[$fs]}
    fi
    try ashlar detach ${device[$fs]} >/dev/null
    try ashlar volume delete s-$fs --yes >/dev/null
  done
  stop
}

reload() { # a hand-over to a binary that was put in the place of the running one
  local pid=$daemon before
  try cp "$binary" $program.new
  try mv $program.new $program
  before=$(grep -c '"serving"\|msg=serving ' $work/log)
  kill -HUP $daemon
  local i
  for i in $(seq 600); do
    [ $(grep -c '"serving"\|msg=serving ' $work/log) -gt $before ] && break
    kill -0 $pid 2>/dev/null || fail "the daemon ended instead of handing over"
    sleep 0.05
  done
  [ $i = 600 ] && fail "no hand-over in 30 s"
  wait_ready
}

# pauses prints, in seconds, how long nobody served at each hand-over, as the daemon says it: 1m2.5s.
pauses() {
  sed -n 's/.*msg="handed over".* pause=\([^ ]*\).*/\1/p' $work/log | awk '
    /[0-9]m[0-9]/ { split($1, part, "m"); print part[1] * 60 + part[2]; next }
    /[0-9]s$/ { print $1 + 0; next }
    /[0-9]ms$/ { print $1 / 1000; next }
    { print 0 } # micro- and nanoseconds'
}

pause_max=20 # seconds; an emulated machine with little time of its own was seen to need 6

reloads() {
  count=${count:-3}
  program=$work/ashlar
  try cp "$binary" $program
  start
  under_load ext4 reload
  under_load xfs reload
  stop
  pauses >$work/pauses
  is $(wc -l <$work/pauses) $((2 * count)) "the number of hand-overs in the log"
  for pause in $(cat $work/pauses); do figure pause $pause; done
  awk -v max=$pause_max '$1 > max { exit 1 }' $work/pauses || fail "a hand-over paused for more than $pause_max s: $(xargs <$work/pauses)"
}

many() {
  count=${count:-250}
  local pool=1GiB i begin tenth=$((count / 10)) first last half=$((count / 2)) halfway after each
  [ $tenth -ge 5 ] || tenth=5
  [ $count -ge $((2 * tenth)) ] || fail "many takes at least 10 volumes"
  start
  for i in $(seq $count); do try ashlar volume create v$i --size 1GiB >/dev/null; done
  rss() { awk '/^VmRSS/ {print $2}' /proc/$daemon/status; }
  for i in $(seq $count); do
    begin=$(now)
    try ashlar attach v$i --via $via >/dev/null
    echo $(($(now) - begin)) >>$work/times
    [ $i != $half ] || halfway=$(rss)
  done
  after=$(rss)
  # The first half has grown what does not grow with the volumes.
  each=$(((after - halfway) / (count - half)))
  first=$(head -n $tenth $work/times | median) last=$(tail -n $tenth $work/times | median)
  echo "$count devices through $via: $each KiB of memory each; the first $tenth were attached in $first ms, the last $tenth in $last ms (medians)"
  figure memory $(awk "BEGIN { print $each / 1024 }")
  figure time $(awk "BEGIN { print $last / $first }")
  [ $each -le 1024 ] || fail "more than 1 MiB a device"
  # A machine with other work may be slow at the end; a time that grows with the devices is more than that.
  [ $last -le $((4 * first)) ] || fail "attaching slows down: $(xargs <$work/times)"
  is "$(ashlar devices --output json | grep -c '"online"\|DEVICE_STATE_ONLINE')" $count online
  crash
  is "$(ashlar devices --output json | grep -c '"online"\|DEVICE_STATE_ONLINE')" $count "online after a kill"
  for i in 1 $((count / 2)) $count; do try dd if=/dev/ashlar/default/v$i of=/dev/null bs=4k count=4 iflag=direct status=none; done
  begin=$(now)
  for i in $(seq $count); do try ashlar detach v$i >/dev/null; done
  echo "detach: $((($(now) - begin) / count)) ms each"
  stop
}

case $test in
  life) life ;;
  kill) kills ;;
  reload) reloads ;;
  many) many ;;
  btrfs) btrfs_life ;;
  stress) stress ;;
  cases) . "${0%/*}/cases.sh"; cases ;;
  *) fail "no test $test" ;;
esac
no_names
echo "PASS $test $via"
