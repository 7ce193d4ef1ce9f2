#!/bin/bash
# reload.sh ARCHIVE -- import a newly built image of Ashlar into the nodes of the running
# cluster, and replace the pods of the driver and the daemon; those of the keeper stay.
set -eu
. "$(dirname "$0")/env.sh"
archive=$(realpath "${1:?usage: reload.sh ARCHIVE-OF-THE-ASHLAR-IMAGE}")
for n in $(seq "$NODES"); do
  # the node's first process is the child of the unshare whose id up.sh wrote down
  pid=$(pgrep -P "$(cat "$RUN/node$n.pid")" | head -n 1)
  nsenter --target "$pid" --mount --pid -- "$DEB/usr/bin/ctr" -n k8s.io images import "$archive" >/dev/null
done
$K --namespace ashlar-system delete pod --selector 'app.kubernetes.io/component in (csi, daemon)' --wait >/dev/null
log "reloaded"
