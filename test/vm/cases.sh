#!/bin/bash
# cases.sh -- sourced by devices.sh: what the nbd and ublk groups of blktests ask of a
# driver, asked of the devices of `ashlar attach`. docs/internals/testing.md has the
# table of which asks what.

name() { echo "${1##*/}"; }          # of a device, as in /sys/block
partition() { echo "$(name $1)p1"; } # of a device, its first

# What the kernel complains of. An other's complaint on a host is not ours.
complaints() {
  [ $via != fuse ] || { echo 0; return; }
  dmesg | grep -c -E "BUG:|WARNING:|Oops|general protection|blocked for more than|cannot create duplicate|couldn't allocate config|refcount_t"
}
quiet() { # quiet BEFORE WHAT
  is "$(complaints)" "$1" "complaints of the kernel after $2"
}

gone() { # gone DEVICE: it serves no more
  local i
  for i in $(seq 100); do
    [ -b $1 ] && [ "$(blockdev --getsize64 $1 2>/dev/null || echo 0)" != 0 ] || return 0
    sleep 0.1
  done
  fail "$1 is still there"
}

wait_for() { # wait_for SECONDS COMMAND...
  local i limit=$(($1 * 10)); shift
  for ((i = 0; i < limit; i++)); do
    "$@" >/dev/null 2>&1 && return
    sleep 0.1
  done
  fail "not in time: $*"
}

# A table of one partition: 64 MiB from 1 MiB on. The entry: not active, type 0x83, first block,
# number of blocks, both little-endian.
write_table() {
  local block=$(blockdev --getss $1)
  little() { # little NUMBER: as four escaped bytes
    printf '\\x%02x\\x%02x\\x%02x\\x%02x' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24))
  }
  printf "\0\0\0\0\203\0\0\0$(little $(((1 << 20) / block)))$(little $(((64 << 20) / block)))" | dd of=$1 bs=1 seek=446 conv=notrunc,fsync status=none &&
    printf '\125\252' | dd of=$1 bs=1 seek=510 conv=notrunc,fsync status=none
}

partitions() {
  local d p node plain
  try ashlar volume create table --size 96MiB >/dev/null
  try ashlar volume create plain --size 96MiB >/dev/null
  d=$(ashlar attach table --via $via) || fail attach
  [ ! -e /sys/block/$(name $d)/$(partition $d) ] || fail "a partition of an empty device"
  try write_table $d
  try ashlar detach $d >/dev/null
  gone $d
  [ ! -e /sys/block/$(name $d)/$(partition $d) ] || fail "the partition outlived the device"
  d=$(ashlar attach table --via $via) || fail attach
  [ $via != fuse ] || [ -e /sys/block/$(name $d)/$(partition $d) ] || try partx --add $d
  p=/sys/block/$(name $d)/$(partition $d)
  blockdev --getsize64 $d >/dev/null # the nbd driver scans when somebody opens it, as udev does
  wait_for 10 test -e $p
  is "$(cat $p/start) $(cat $p/size)" "2048 131072" "start and size of the partition"
  # What is written to the partition lies behind its start; a node of our own, as hosts
  # differ in who makes them.
  node=$work/$(partition $d)
  try mknod $node b $(tr : ' ' <$p/dev)
  try dd if=/dev/urandom of=$node bs=64k count=16 oflag=direct status=none
  cmp -n 1048576 -i 0:1048576 $node $d || fail "the partition is elsewhere"
  # The partition outlives the daemon, and keeps the device.
  crash
  [ -e $p ] || fail "the partition went with the daemon"
  cmp -n 1048576 -i 0:1048576 $node $d || fail "the partition is elsewhere after a kill"
  make_fs ext4 $node
  try mount $node $work/mnt
  refuse "mounted on $work/mnt" ashlar detach $d
  try umount $work/mnt
  check_fs ext4 $node
  try ashlar detach $d >/dev/null
  gone $d
  [ ! -e $p ] || fail "the partition outlived the device"
  rm $node
  # The next device in its place has none of it.
  plain=$(ashlar attach plain --via $via) || fail attach
  [ ! -e /sys/block/$(name $plain)/$(partition $plain) ] || fail "$plain has the partition of another volume"
  try ashlar detach $plain >/dev/null
  try ashlar volume delete table --yes >/dev/null
  try ashlar volume delete plain --yes >/dev/null
}

# events DIR: the kernel's own messages on block devices, one file a message, until $1/stop
events() {
  /usr/bin/python3 - $1 <<'PY'
import os, socket, sys
s = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)  # NETLINK_KOBJECT_UEVENT
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
s.bind((0, 1))
s.settimeout(0.2)
open(sys.argv[1] + '/ready', 'w')
out = open(sys.argv[1] + '/seen', 'w', buffering=1)
while not os.path.exists(sys.argv[1] + '/stop'):
    try:
        m = s.recv(65536).decode(errors='replace').rstrip('\0').split('\0')
    except socket.timeout:
        continue
    if 'SUBSYSTEM=block' in m:
        out.write(' '.join(m) + '\n')
PY
}

sizes() {
  local d n bytes
  rm -rf $work/events
  mkdir $work/events
  events $work/events & listener=$!
  wait_for 20 test -e $work/events/ready
  try ashlar volume create size --size 64MiB >/dev/null
  d=$(ashlar attach size --via $via) || fail attach
  n=$(name $d)
  wait_for 10 grep -q "^\(add\|change\)@.*/$n " $work/events/seen
  same() { # same BYTES: everybody says that it is so large
    is "$(blockdev --getsize64 $d) $(($(cat /sys/block/$n/size) * 512)) $(lsblk -bdno SIZE $d | tr -d ' ')" "$1 $1 $1" "the size by ioctl, sysfs and lsblk"
  }
  same $((64 << 20))
  # While somebody has it open.
  exec 7<$d
  : >$work/events/seen
  try ashlar volume resize size --size 128MiB >/dev/null
  if [ $(blockdev --getsize64 $d) = $((128 << 20)) ]; then
    same $((128 << 20))
    wait_for 10 grep -q "^change@.*/$n .*RESIZE=1" $work/events/seen
    try dd if=/dev/urandom of=$d bs=1M seek=127 count=1 oflag=direct status=none
    exec 7<&-
  else
    exec 7<&-
    echo "growing in use: not with this kernel"
    try ashlar detach $d >/dev/null
    d=$(ashlar attach size --via $via) || fail attach
    n=$(name $d)
    same $((128 << 20))
  fi
  refuse . ashlar volume resize size --size 32MiB
  same $((128 << 20))
  : >$work/events/seen
  try ashlar detach $d >/dev/null
  gone $d
  wait_for 10 grep -q "^\(remove\|change\)@.*/$n " $work/events/seen
  touch $work/events/stop
  wait $listener
  try ashlar volume delete size --yes >/dev/null
}

loops() { # attach and detach, many times
  local i d before after
  for i in 1 2; do
    try ashlar volume create loop$i --size 32MiB >/dev/null
    d=$(ashlar attach loop$i --via $via) || fail attach
    try dd if=/dev/urandom of=$work/loop$i bs=64k count=1 status=none
    try dd if=$work/loop$i of=$d bs=64k oflag=direct status=none
    try ashlar detach $d >/dev/null
  done
  before=$(ls /proc/$daemon/fd | wc -l)
  for i in $(seq $count); do
    d=$(ashlar attach loop$((1 + i % 2)) --via $via) || fail "attach $i"
    cmp -n 65536 $d $work/loop$((1 + i % 2)) || fail "after $i times"
    try ashlar detach $d >/dev/null
  done
  after=$(ls /proc/$daemon/fd | wc -l)
  [ $after -le $((before + 2)) ] || fail "$before open files of the daemon became $after"
  for i in 1 2; do try ashlar volume delete loop$i --yes >/dev/null; done
}

mounts() { # mount and detach at the same time: nobody loses
  local d path=/dev/ashlar/default/race mounted=0 detached=0 refused=0
  try ashlar volume create race --size 96MiB >/dev/null
  d=$(ashlar attach race --via $via) || fail attach
  make_fs ext4 $d
  rm -f $work/stop $work/mounts
  (
    while [ ! -e $work/stop ]; do
      mount $path $work/mnt 2>/dev/null || continue
      echo x >>$work/mounts
      # What was mounted stays, whatever detach tries.
      { head -c 10000 /dev/urandom >$work/mnt/file && sync -f $work/mnt && ls $work/mnt >/dev/null; } 2>>$work/lost || echo lost >>$work/lost
      umount $work/mnt 2>>$work/lost || echo "not unmounted" >>$work/lost
    done
  ) & racer=$!
  local end=$((SECONDS + 2 + count / 10))
  while [ $SECONDS -lt $end ]; do
    if said=$(ashlar detach race 2>&1); then
      detached=$((detached + 1))
      try ashlar attach race --via $via >/dev/null
    else
      grep -q "mounted on\|in use" <<<"$said" || fail "detach: $said"
      refused=$((refused + 1))
    fi
  done
  touch $work/stop
  wait $racer
  [ ! -s $work/lost ] || fail "a mount was lost: $(cat $work/lost)"
  mounted=$(wc -l <$work/mounts)
  echo "$mounted mounts, $detached detaches, $refused refused"
  d=$(ashlar attach race --via $via) || fail attach
  check_fs ext4 $d
  try ashlar detach $d >/dev/null
  try ashlar volume delete race --yes >/dev/null
}

users() { # users DEVICE: a program that reads and writes it until it cannot, in a cgroup of its own
  rm -f $work/user
  [ $via = fuse ] || mkdir -p /sys/fs/cgroup/ashlar-case 2>/dev/null
  (
    [ $via = fuse ] || echo $BASHPID >/sys/fs/cgroup/ashlar-case/cgroup.procs 2>/dev/null
    exec fio --name=user --filename=$1 --direct=1 --rw=randrw --bs=4k --ioengine=libaio --iodepth=16 --time_based --runtime=60 >$work/user 2>&1
  ) & user=$!
  sleep 1
  kill -0 $user 2>/dev/null || fail "no load: $(cat $work/user)"
}
no_users() { # it ends, and its cgroup can go
  kill -TERM $user 2>/dev/null
  ended() { ! kill -0 $user 2>/dev/null; }
  wait_for 30 ended
  wait $user 2>/dev/null
  [ $via = fuse ] || [ ! -d /sys/fs/cgroup/ashlar-case ] || wait_for 10 rmdir /sys/fs/cgroup/ashlar-case
}
# remove DEVICE: detach while a program has it open, not for itself alone. The device is taken
# away, as a disk that is pulled; but the loop driver lets go when the program does, and
# detach says so. Either way it is gone when the program is.
remove() {
  local said
  if [ $via != fuse ]; then
    try timeout 60 "$binary" detach $1 >/dev/null
  else
    said=$(timeout 60 "$binary" detach $1 2>&1) && fail "detached from under a program"
    grep -q "in use" <<<"$said" || fail "detach: $said"
    kill -0 $user 2>/dev/null || fail "a refused detach ended the program: $(cat $work/user)"
  fi
  no_users
  if [ $via = fuse ]; then try ashlar detach $1 >/dev/null; fi
  gone $1
}

removal() { # removal under I/O: of a device that serves, and of one whose daemon was killed
  local d
  try ashlar volume create busy --size 64MiB >/dev/null
  local deaths list='0 2 soon'
  # A loop device is given ten seconds for a program that only looks at it.
  [ $via != fuse ] || list=1
  [ $via != nbd ] || [ $count -ge 10 ] || list=2
  for deaths in $list; do
    d=$(ashlar attach busy --via $via) || fail "attach before $deaths"
    users $d
    case $deaths in
      0) ;;
      soon) # as soon as there is a daemon that can be asked
        crash
        ;;
      *)
        for i in $(seq $deaths); do
          die
          sleep 1 # requests wait, and nobody fails them
          kill -0 $user 2>/dev/null || fail "the program ended with the daemon: $(cat $work/user)"
          start
        done
        wait_for 20 online $d
        ;;
    esac
    remove $d
  done
  try ashlar volume delete busy --yes >/dev/null
}
online() { ashlar devices | grep "^$1 " | grep -q online; }

driver() { # the module comes and goes
  local d module=nbd said end
  [ $via = fuse ] && { echo "driver: not here, loop and FUSE are not loaded by Ashlar"; return; }
  [ $via = nbd ] || module=ublk_drv
  try ashlar volume create driver --size 32MiB >/dev/null
  d=$(ashlar attach driver --via $via) || fail attach
  modprobe -r $module 2>/dev/null && fail "$module went away under $d"
  try dd if=$d of=/dev/null bs=64k count=1 iflag=direct status=none
  try ashlar detach $d >/dev/null
  # Nothing of the device may hold the module.
  stop
  wait_for 20 modprobe -r $module
  start
  if said=$(ashlar attach driver --via $via 2>&1); then
    try ashlar detach driver >/dev/null
  else
    grep -q "modprobe $module" <<<"$said" || fail "without $module: $said"
    echo "without $module: ${said##*ashlar: }"
  fi
  # Loading, unloading, attaching and detaching at once.
  rm -f $work/stop
  (while [ ! -e $work/stop ]; do modprobe $module; modprobe -r $module; done 2>/dev/null) & racer=$!
  end=$((SECONDS + 2 + count / 10)) good=0 bad=0
  while [ $SECONDS -lt $end ]; do
    if said=$(timeout 60 "$binary" attach driver --via $via 2>&1); then
      good=$((good + 1))
      cmp -n 4096 /dev/ashlar/default/driver /dev/zero || fail "an attached device does not answer"
      try timeout 60 "$binary" detach driver >/dev/null
    else
      bad=$((bad + 1))
    fi
  done
  touch $work/stop
  wait $racer
  echo "$good attached, $bad refused while $module came and went"
  try modprobe $module
  d=$(ashlar attach driver --via $via) || fail "attach with $module back"
  try ashlar detach $d >/dev/null
  try ashlar volume delete driver --yes >/dev/null
}

foreign() { # another program disconnects the device, and Ashlar's is the first word on it again
  local d
  [ $via = nbd ] || return 0
  try ashlar volume create foreign --size 32MiB >/dev/null
  d=$(ashlar attach foreign --via $via) || fail attach
  try nbd-client -d $d >/dev/null
  unconnected() { ! online $d; }
  wait_for 20 unconnected
  ashlar devices | grep "^$d "
  d=$(ashlar attach foreign --via $via) || fail "attach after another program disconnected it"
  try cmp -n 65536 $d /dev/zero
  try ashlar detach $d >/dev/null
  try ashlar volume delete foreign --yes >/dev/null
}

cases() {
  local before case begin all='partitions sizes loops mounts removal foreign driver'
  count=${count:-20}
  # User Mode Linux has one slow processor; the other ways ask the rest each time.
  [ $via != nbd ] || [ $count -ge 10 ] || all='partitions mounts removal foreign driver'
  [ $via != fuse ] || [ $count -ge 10 ] || all='partitions sizes loops mounts foreign driver'
  before=$(complaints)
  start
  for case in ${CASES:-$all}; do
    begin=$(now)
    $case
    quiet $before $case
    is "$(ashlar devices --output json | grep -c '"path"')" 0 "nothing attached after $case"
    echo "$case: $(($(now) - begin)) ms"
  done
  stop
}
