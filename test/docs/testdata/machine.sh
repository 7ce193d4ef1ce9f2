#!/bin/bash
# machine.sh SCRATCH COMMAND... -- runs COMMAND in a machine for a page: it is started in
# mount, pid and network namespaces of its own, and everything it makes goes with them.
# COMMAND is ended when the standard input is. Loop devices are of no namespace: those that
# are left are taken away at the end, after what served them was killed, so that nothing
# waits for it.
set -euo pipefail
scratch=$1
shift
mount --make-rprivate /
mount -t proc proc /proc
ip link set lo up
ip address add 10.0.0.5/32 dev lo
# As large as a real disk for whoever asks; what is written is memory.
for dir in /run /var/lib; do mount -t tmpfs -o size=1T tmpfs "$dir"; done
mkdir "$scratch/dev"
mount -t tmpfs -o size=1T tmpfs "$scratch/dev"
for node in null zero full random urandom tty fuse loop-control; do
  [ -e "/dev/$node" ] || continue
  touch "$scratch/dev/$node"
  mount --bind "/dev/$node" "$scratch/dev/$node"
done
mkdir "$scratch/dev/shm"
ln -s /proc/self/fd "$scratch/dev/fd"
for n in 0 1 2; do ln -s "/proc/self/fd/$n" "$scratch/dev/$(echo stdin stdout stderr | cut -d' ' -f$((n + 1)))"; done
truncate -s 8G "$scratch/dev/vdb" "$scratch/dev/vdc"
mount --move "$scratch/dev" /dev
mkdir -p /dev/shm "$scratch/work"
mkdir "$scratch/over"
mount -t tmpfs tmpfs "$scratch/over"
mkdir "$scratch/over/etc" "$scratch/over/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$scratch/over/etc,workdir=$scratch/over/work" overlay /etc
echo '127.0.0.2 host storage' >>/etc/hosts
cp -r "$scratch/etc/ashlar" /etc
cd "$scratch/work"
truncate -s 1G disk.img
cp /etc/ashlar/*.pem /etc/ashlar/*.key .

"$@" </dev/null &
command=$!
exec 4<&0
{ read -r <&4 || kill -KILL "$command"; } 2>/dev/null &
disown
exec 4<&-
status=0
wait "$command" || status=$?

kill -KILL -1 2>/dev/null || true # all in this pid namespace but this process
connections=$(awk '{ for (i = 7; $i != "-"; i++); if ($(i + 1) ~ /^fuse/) print $3 }' /proc/self/mountinfo)
losetup --list --noheadings --output NAME,BACK-MAJ:MIN | while read -r device connection; do
  grep -qxF "$connection" <<<"$connections" || continue
  findmnt --raw --noheadings --output TARGET --source "$device" | tac | xargs --no-run-if-empty umount 2>/dev/null || true
  losetup --detach "$device"
done
exit "$status"
