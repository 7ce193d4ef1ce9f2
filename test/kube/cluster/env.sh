# Paths, addresses and names that the scripts here have in common.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../../.." && pwd)
CACHE=${KUBE_CACHE:-/var/cache/ashlar-kube}  # what build.sh makes; kept
RUN=${KUBE_RUN:-/var/tmp/ashlar-kube}        # state of a running cluster; down.sh removes it
NODES=${KUBE_NODES:-3}
SLOW=${KUBE_SLOW:-1}    # how many times longer than usual to wait: an emulated machine is slow
PAUSE=0.3               # seconds between two looks, each of which may start a kubectl
[ "$SLOW" = 1 ] || PAUSE=$SLOW

BIN=$CACHE/bin          # Kubernetes and sidecars
DEB=$CACHE/deb          # unpacked Debian packages: etcd, containerd, runc, CNI plugins
NS=ashlar-kube          # network namespaces $NS-cp, $NS-n1 ..., cgroup $NS
LINK=ak                 # network devices in $NS-cp: $LINK1 ...; at most 15 characters
NET=10.99.0             # nodes; it exists only inside the namespaces
CP=$NET.1               # the control plane
SERVICES=10.98.0        # service addresses; .1 is the API server
PODS=10.97              # pods of node N have 10.97.N.0/24
ADMIN=$RUN/admin.conf
K="nsenter --net=/run/netns/$NS-cp $BIN/kubectl --kubeconfig=$ADMIN"

log() { printf '%s %s\n' "$(date +%T.%1N)" "$*"; }
die() { echo "test-kube: $*" >&2; exit 1; }
# until_ok SECONDS COMMAND...: repeat a command until it succeeds
until_ok() {
  local end=$((SECONDS + $1 * SLOW)); shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { log "gave up waiting for: $*"; return 1; }
    sleep $PAUSE
  done
}
