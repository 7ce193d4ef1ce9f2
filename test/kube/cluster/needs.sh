#!/bin/bash
# needs.sh -- say what this machine lacks for the test cluster, all at once; status 1 if
# anything does. It changes nothing. KUBE_VM=1: the cluster will be in an emulated machine
# (../vm.sh), whose kernel is asked there.
set -u
. "$(dirname "$0")/env.sh"
missing=()
[ "$(id -u)" = 0 ] || missing+=("root: run sudo make test-kube")
[ "$(uname -m)" = x86_64 ] || missing+=("an x86-64 machine: the images are built for it")
need() { command -v "$1" >/dev/null || missing+=("the command $1 (Debian package $2)"); }
need go "none: https://go.dev/dl"
need apt-get apt; need dpkg-deb dpkg; need openssl openssl; need ip iproute2; need nsenter util-linux
need unshare util-linux; need losetup mount; need fio fio; need mount mount
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=("the Debian package debian-archive-keyring")
kernel() {
  [ -e /dev/fuse ] || modprobe -q fuse || missing+=("/dev/fuse (modprobe fuse)")
  [ -e /dev/loop-control ] || modprobe -q loop || missing+=("/dev/loop-control (modprobe loop)")
  for fs in ext4 xfs overlay; do
    grep -qw "$fs" /proc/filesystems || modprobe -q "$fs" || missing+=("the file system $fs of the kernel (modprobe $fs)")
  done
  [ -e /proc/self/ns/net ] || missing+=("network namespaces of the kernel (CONFIG_NET_NS)")
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    for c in cpu memory pids; do grep -qw $c /sys/fs/cgroup/cgroup.controllers || missing+=("the cgroup controller $c"); done
  elif [ ! -d /sys/fs/cgroup/memory ]; then
    missing+=("cgroups, version 2 or 1, in /sys/fs/cgroup")
  fi
}
[ "${KUBE_VM-}" ] || kernel
free=$(df --output=avail -k "$(dirname "$RUN")" | tail -1)
[ "$free" -gt 12000000 ] || missing+=("12 GB free in $(dirname "$RUN")")
mkdir -p "$(dirname "$CACHE")"
[ -e "$CACHE/images.of" ] || { free=$(df --output=avail -k "$(dirname "$CACHE")" | tail -1); [ "$free" -gt 8000000 ] || missing+=("8 GB free in $(dirname "$CACHE") for a first build"); }
memory=$(awk '/^MemAvailable/{print $2}' /proc/meminfo)
gigabytes=5; [ -z "${KUBE_VM-}" ] || gigabytes=8
[ "$memory" -gt ${gigabytes}000000 ] || missing+=("$gigabytes GB of free memory")
[ ${#missing[@]} = 0 ] && exit 0
echo "test-kube: this machine lacks" >&2
printf '  %s\n' "${missing[@]}" >&2
exit 1
