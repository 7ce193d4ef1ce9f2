#!/bin/bash
# guest.sh [GO-TEST-ARGUMENTS] -- run.sh inside the emulated machine of ../vm.sh, which goes
# away with all that is changed here.
set -eu
. "$(dirname "$0")/env.sh"
# overlayfs of the containers does not work on the overlay that is the root here
mkfs.ext4 -q /dev/vda
mkdir "$(dirname "$RUN")"
mount /dev/vda "$(dirname "$RUN")"
# A directory instead of a link that leads out of it: a container that has /lib/modules
# mounted, and nothing else of this machine, loads modules from it.
modules=/lib/modules/$(uname -r)
from=$(realpath "$modules")
rm "$modules"
mkdir "$modules"
mount --bind "$from" "$modules"
export GOGC=400 # there is more memory than processor
echo "test-kube: Linux $(uname -r), emulated"
exec "$HERE/../run.sh" "$@"
