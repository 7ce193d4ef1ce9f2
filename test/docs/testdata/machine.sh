#!/bin/bash
# machine.sh SCRATCH COMMAND... -- runs COMMAND in a machine for a page: it is started in
# mount, pid and network namespaces of its own, and everything it makes goes with them.
set -euo pipefail
scratch=$1
shift
mount --make-rprivate /
mount -t proc proc /proc
ip link set lo up
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
cd "$scratch/work"
truncate -s 1G disk.img
exec "$@"
