#!/bin/bash
# cgroup.sh make NODE | remove -- the cgroups under which the kubelet of a node works, in
# either version. The kubelet wants its root to exist already.
set -eu
. "$(dirname "$0")/env.sh"
top=/sys/fs/cgroup
case $1 in
  make)
    if [ -e $top/cgroup.controllers ]; then
      mkdir -p "$top/$NS/$2"
      for dir in $top $top/$NS; do # a controller is handed down level by level
        for c in cpu cpuset io memory pids hugetlb; do echo "+$c" 2>/dev/null >$dir/cgroup.subtree_control || true; done
      done
      exit 0
    fi
    for dir in $top/*/; do case $dir in */unified/) ;; *) mkdir -p "$dir$NS/$2" ;; esac; done
    for level in "" "/$2"; do # an empty cpuset cannot hold tasks
      for f in cpuset.cpus cpuset.mems; do cat $top/cpuset/$f >"$top/cpuset/$NS$level/$f"; done
    done ;;
  remove) # from the leaves up; they are empty by now
    find $top/$NS $top/*/$NS -depth -type d -exec rmdir {} + 2>/dev/null || true ;;
esac
