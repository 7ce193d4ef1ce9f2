#!/bin/bash
# down.sh -- undo up.sh: processes whose ids it wrote down, their namespaces, loop devices,
# cgroups, and $KUBE_RUN. What build.sh made stays. It may be run at any time, repeatedly.
set -u
. "$(dirname "$0")/env.sh"
[ -d "$RUN" ] || exit 0
# Loop devices on files of the nodes: on FUSE mounts that are no mounts of this host's, or
# in $RUN. Their names are known as long as the mounts are.
loops=()
while read -r name file device; do
  case $file in
    /var/lib/ashlar/*) awk -v d="$device" '$3 == d {found = 1} END {exit !found}' /proc/self/mountinfo || loops+=("$name") ;;
    "$RUN"/*) loops+=("$name") ;;
  esac
done < <(losetup -ln -O NAME,BACK-FILE,BACK-MAJ:MIN 2>/dev/null)
# A node's processes and mounts go with its first process (unshare --kill-child).
for f in "$RUN"/*.pid; do [ -e "$f" ] && kill -9 "$(cat "$f")" 2>/dev/null; done
for f in "$RUN"/*.pid; do # until they are gone, so that nothing is in use below
  [ -e "$f" ] && for _ in $(seq 100); do kill -0 "$(cat "$f")" 2>/dev/null || break; sleep 0.1; done
done
for name in "${loops[@]}"; do losetup -d "$name" 2>/dev/null; done
for n in /run/netns/$NS-*; do [ -e "$n" ] && ip netns del "$(basename "$n")"; done
for _ in 1 2 3 4 5; do
  "$HERE/cgroup.sh" remove
  [ -z "$(find /sys/fs/cgroup -maxdepth 2 -name $NS -print -quit)" ] && break
  sleep 0.5
done
[ -e "$RUN/made" ] && while read -r d; do rmdir "$d" 2>/dev/null; done <"$RUN/made"
rm -rf --one-file-system "$RUN"
