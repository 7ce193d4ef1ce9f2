#!/bin/bash
# unpack.sh DIR ARCHIVE... -- make the new directory DIR what containerd has on disk when it
# has imported the images of the archives. node.sh begins with a copy of $KUBE_IMAGES: in an
# emulated machine that takes a tenth of the time that unpacking would.
set -eu
. "$(dirname "$0")/env.sh"
if [ -z "${UNPACK-}" ]; then
  export UNPACK=1
  exec unshare --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi
dir=$1; shift
mkdir "$dir"
mount --make-rprivate /
mount -t tmpfs tmpfs /run
export PATH=$DEB/usr/bin:$DEB/usr/sbin:$PATH
cat >/run/containerd.toml <<TOML
version = 2
root = "$dir"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
TOML
containerd -c /run/containerd.toml >/run/containerd.log 2>&1 &
pid=$!
until_ok 60 ctr version || { tail -n 5 /run/containerd.log >&2; exit 1; }
for archive; do
  ctr -n k8s.io images import "$archive" >/dev/null
done
kill $pid
wait $pid || true
