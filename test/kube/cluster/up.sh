#!/bin/bash
# up.sh -- start Kubernetes on this machine: etcd, the API server, the controller manager,
# the scheduler, the snapshot controller, and $KUBE_NODES (3) nodes, each a containerd and a
# kubelet in namespaces of their own. Nothing listens outside those namespaces, and the
# state is in $KUBE_RUN (/var/tmp/ashlar-kube). build.sh must have run; down.sh undoes it.
#
# The nodes differ from those of a real cluster in this:
#   - they share one kernel, so /dev and the loop devices in it are those of all
#   - pods reach each other and the API server by routes; there is no kube-proxy, and the
#     address of the service "kubernetes" is the API server's own
#   - there is no registry: node.sh imports the images
set -eu
. "$(dirname "$0")/env.sh"
[ ! -e "$RUN" ] || die "$RUN exists: a cluster is running, or has not been cleaned up; run test/kube/cluster/down.sh"
IMAGE_ARCHIVE=${1:?usage: up.sh ARCHIVE-OF-THE-ASHLAR-IMAGE}
mkdir -p "$RUN"
ln -s "$(realpath "$IMAGE_ARCHIVE")" "$RUN/ashlar-image.tar"
# What down.sh may remove afterwards
for d in /var/lib/kubelet /var/lib/containerd /var/lib/ashlar /lib/modules; do
  [ -e $d ] || { mkdir -p $d; echo $d >>"$RUN/made"; }
done

in_cp() { nsenter --net=/run/netns/$NS-cp "$@"; }
ip netns add $NS-cp
in_cp sh -c "
  ip link set lo up; ip addr add $SERVICES.1/32 dev lo
  ip link add br0 type bridge; ip addr add $CP/24 dev br0; ip link set br0 up
  echo 1 >/proc/sys/net/ipv4/ip_forward" 
for n in $(seq "$NODES"); do
  ip netns add $NS-n$n
  ip link add $LINK$n netns $NS-cp type veth peer name eth0 netns $NS-n$n
  in_cp ip link set $LINK$n master br0 up
  nsenter --net=/run/netns/$NS-n$n sh -c "
    ip link set lo up; ip addr add $NET.$((10 + n))/24 dev eth0; ip link set eth0 up; ip route add default via $CP"
  in_cp ip route add $PODS.$n.0/24 via $NET.$((10 + n))
done

openssl genrsa -out "$RUN/sa.key" 2048 2>/dev/null
umask 077
conf() { # FILE USER GROUPS: a line of the token file, and a kubeconfig
  local token; token=$(openssl rand -hex 16)
  echo "$token,$2,$2,\"$3\"" >>"$RUN/tokens.csv"
  cat >"$1" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$CP:443", certificate-authority: $RUN/cert/apiserver.crt}}]
users: [{name: me, user: {token: $token}}]
contexts: [{name: test, context: {cluster: test, user: me}}]
current-context: test
YAML
}
conf "$ADMIN" admin system:masters
conf "$RUN/kcm.conf" system:kube-controller-manager system:masters
conf "$RUN/scheduler.conf" system:kube-scheduler ""
conf "$RUN/snapshot.conf" snapshot-controller system:masters
for n in $(seq "$NODES"); do conf "$RUN/n$n.conf" "system:node:n$n" system:nodes; done
umask 022

start() { # NAME COMMAND...: in the network namespace of the control plane
  local name=$1; shift
  setsid nsenter --net=/run/netns/$NS-cp "$@" >"$RUN/$name.log" 2>&1 </dev/null &
  echo $! >"$RUN/$name.pid"
}
start etcd "$DEB/usr/bin/etcd" --data-dir "$RUN/etcd" --unsafe-no-fsync \
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380
start apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 \
  --bind-address=0.0.0.0 --secure-port=443 --advertise-address=$CP --cert-dir="$RUN/cert" \
  --service-cluster-ip-range=$SERVICES.0/24 \
  --token-auth-file="$RUN/tokens.csv" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$RUN/sa.key" \
  --service-account-signing-key-file="$RUN/sa.key" --allow-privileged --kubelet-preferred-address-types=InternalIP
until_ok 120 $K get --raw /readyz
start kcm "$BIN/kube-controller-manager" --kubeconfig="$RUN/kcm.conf" --leader-elect=false --node-monitor-grace-period=$((50 * SLOW))s \
  --bind-address=127.0.0.1 --service-account-private-key-file="$RUN/sa.key" --root-ca-file="$RUN/cert/apiserver.crt"
start scheduler "$BIN/kube-scheduler" --kubeconfig="$RUN/scheduler.conf" --leader-elect=false --bind-address=127.0.0.1
log "control plane"

for n in $(seq "$NODES"); do
  mkdir -p "$RUN/n$n"
  "$HERE/cgroup.sh" make "n$n"
  setsid nsenter --net=/run/netns/$NS-n$n unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc \
    "$HERE/node.sh" "$n" >"$RUN/n$n/node.log" 2>&1 </dev/null &
  echo $! >"$RUN/node$n.pid"
done
until_ok 60 $K apply -f "$CACHE/crd" # the server gives a request up after a minute
start snapshot-controller "$BIN/snapshot-controller" --kubeconfig="$RUN/snapshot.conf" --enable-distributed-snapshotting
until_ok 180 sh -c "[ \$($K get nodes --no-headers | grep -c ' Ready ') = $NODES ]" || { tail -n 5 "$RUN"/n*/*.log >&2; exit 1; }
log "$NODES nodes Ready: $($BIN/kubelet --version)"
