#!/bin/bash
set -eu
cd "$(dirname "$0")"
. cluster/env.sh
if [ -z "${KUBE_GUEST-}" ]; then
  (cd "$ROOT" && CGO_ENABLED=0 go test -c -o .make/kube.test ./test/kube)
  export KUBE_GUEST=1 KUBE_CACHE=$CACHE KUBE_NODES=1 KUBE_SLOW=4 KUBE_TEST=$ROOT/.make/kube.test KUBE_RUN=/kube/run
  exec ../vm/vm-run.sh -t 2700 -m 6G -K 1:16G -M '' -e KUBE_GUEST -e KUBE_CACHE -e KUBE_NODES -e KUBE_RUN -e KUBE_TEST -e KUBE_SLOW -- ./vm.sh "$@"
fi
mkfs.ext4 -q /dev/vda; mkdir /kube; mount /dev/vda /kube
modules=$(readlink -f "/lib/modules/$(uname -r)")
rm "/lib/modules/$(uname -r)"; mkdir "/lib/modules/$(uname -r)"
mount --bind "$modules" "/lib/modules/$(uname -r)"
modprobe -a veth bridge loop fuse
uname -a
if [ -e /tmp/kubecrypt-guest.sh ]; then . /tmp/kubecrypt-guest.sh; fi
exec ./run.sh "$@"
