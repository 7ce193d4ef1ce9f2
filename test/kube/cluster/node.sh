#!/bin/bash
# node.sh N -- one node of the test cluster: the first process of its own PID, mount, IPC
# and UTS namespaces, in a network namespace that up.sh made. When it dies the kernel ends
# every process and every mount of the node.
set -eu
. "$(dirname "$0")/env.sh"
n=$1 D=$RUN/n$1
hostname "n$n"
# The paths that manifests, kubelet and containerd have become private to this node.
# Shared propagation inside the namespace is what the mounts of a CSI driver rely on.
mount --make-rprivate /
mkdir -p "$D"/{kubelet,containerd,ashlar,log,cni,libexec}
for p in kubelet:/var/lib/kubelet containerd:/var/lib/containerd ashlar:/var/lib/ashlar log:/var/log; do
  mount --bind "$D/${p%%:*}" "${p#*:}"
done
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/netns
# The kubelet insists on tunables that belong to the whole host. It is shown files that
# hold the wanted values already, so nothing is changed.
for t in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  f=$D/sys.$(basename "${t%=*}")
  echo "${t#*=}" >"$f"
  mount --bind "$f" "/proc/sys/${t%=*}"
done
mount --make-rshared /
export PATH=$DEB/usr/bin:$DEB/usr/sbin:$PATH
cat >"$D/cni/10-pods.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$D/cni-state",
            "ranges": [[{"subnet": "$PODS.$n.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
cat >"$D/containerd.toml" <<TOML
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "test.local/pause:1"
  disable_apparmor = true
  # Without CAP_SYS_RESOURCE, as in some virtual machines, nobody may lower an OOM score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    # /dev of a privileged container has a copy of each device; there are many loop devices.
    default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "$D/cni"
    bin_dir = "$DEB/usr/lib/cni"
TOML
if [ "${KUBE_IMAGES-}" ]; then
  cp -a "$KUBE_IMAGES/." /var/lib/containerd/
fi
containerd -c "$D/containerd.toml" >>"$D/containerd.log" 2>&1 &
until_ok 60 ctr version
if [ -z "${KUBE_IMAGES-}" ]; then
  for archive in "$CACHE/images.tar" "$RUN/ashlar-image.tar"; do
    ctr -n k8s.io images import "$archive" >>"$D/images.log" 2>&1
  done
fi
cat >"$D/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$NS/n$n
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
makeIPTablesUtilChains: false
failSwapOn: false
syncFrequency: 10s  # how soon a grown volume is noticed; the default minute makes tests slow
protectKernelDefaults: true
resolvConf: ""
clusterDNS: [10.98.0.10] # nobody listens there; the pods look nothing up
volumePluginDir: $D/libexec
nodeStatusUpdateFrequency: $((4 * SLOW))s
nodeLeaseDurationSeconds: $((40 * SLOW))
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: 100Mi}
systemReserved: {cpu: 100m, memory: 256Mi}
YAML
"$BIN/kubelet" --config="$D/kubelet.yaml" --kubeconfig="$RUN/n$n.conf" --hostname-override="n$n" \
  --node-ip=$NET.$((10 + n)) --root-dir=/var/lib/kubelet --v=2 >>"$D/kubelet.log" 2>&1 &
wait
