#!/bin/bash
# build.sh -- get what the cluster is made of, once, into $KUBE_CACHE (default
# /var/cache/ashlar-kube, about 1.2 GB):
#
#   deb/      etcd, containerd, runc and CNI plugins: Debian 12 packages, downloaded with
#             apt-get (30 MB) and unpacked, not installed, so that no service starts
#   bin/      kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kubectl, the
#             CSI sidecars and the snapshot controller: built from their Go modules at the
#             versions of tools/*/go.mod (600 MB of modules, fifteen minutes on two CPUs);
#             helm, at the version of deploy/render.sh
#   crd/      the custom resources of snapshots, out of the same modules
#   *.tar     OCI archives of the images that the pods use
#
# Go's own caches of modules and builds are used. Nothing else is left on the machine.
# A step that has been done is not done again; KUBE_CACHE removed is all of it undone.
set -eu
. "$(dirname "$0")/env.sh"
mkdir -p "$BIN" "$CACHE/crd"
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
t0=$SECONDS
step() { printf 'test-kube: %-36s %4d s\n' "$*" $((SECONDS - t0)); t0=$SECONDS; }

if [ ! -e "$DEB/done" ]; then
  rm -rf "$DEB" "$CACHE/debs"; mkdir -p "$DEB" "$CACHE/debs"
  apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 update </dev/null >/dev/null || true
  (cd "$CACHE/debs" && apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 download \
    etcd-server containerd runc containernetworking-plugins busybox-static) || die "cannot download Debian packages"
  for d in "$CACHE"/debs/*.deb; do dpkg-deb -x "$d" "$DEB"; done
  rm -rf "$CACHE/debs"
  touch "$DEB/done"
  step "Debian packages"
fi

# build MODULE-DIR PACKAGE LDFLAGS: unless the binary is of these versions
build() {
  local name=${2##*/} sum
  sum=$(cd "$HERE/tools/$1"; case $2 in ./*) cat "$2"/*.go ;; esac | cat go.mod go.sum - | sha256sum; go version)
  if [ ! -x "$BIN/$name" ] || [ "$(cat "$BIN/$name.of" 2>/dev/null)" != "$sum" ]; then
    (cd "$HERE/tools/$1" && go build -trimpath -ldflags "-s -w $3" -o "$BIN/$name" "$2")
    echo "$sum" >"$BIN/$name.of"
    step "$name"
  fi
}
# Without these the binaries would report no version, and the API server and the
# kubelet compare versions with each other.
V=$(cd "$HERE/tools/k8s" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
v=k8s.io/component-base/version
minor=${V#v1.}; minor=${minor%%.*}
for c in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do
  build k8s k8s.io/kubernetes/cmd/$c "-X $v.gitVersion=$V -X $v.gitMajor=1 -X $v.gitMinor=$minor"
done
for c in $(awk '/^tool \(/{on=1;next} /^\)/{on=0} on{print $1}' "$HERE/tools/sidecars/go.mod"); do
  build sidecars "$c" ""
done
# A module of its own: it cannot be built with the versions that the other sidecars use.
build metadata github.com/kubernetes-csi/external-snapshot-metadata/cmd/csi-snapshot-metadata ""
build metadata ./blocks ""
helm=$(sed -n 's/.*go run \(helm[^}]*\)}.*/\1/p' "$ROOT/deploy/render.sh")
if [ "$(cat "$BIN/helm.version" 2>/dev/null)" != "$helm" ]; then
  GOBIN=$BIN go install "$helm"
  echo "$helm" >"$BIN/helm.version"
  step "helm"
fi
version() { (cd "$HERE/tools/$1" && go list -m -f '{{.Version}}' "github.com/kubernetes-csi/$2"); }
crds() { # MODULE-DIR MODULE GLOB: custom resources of a module
  local dir; dir=$(cd "$HERE/tools/$1" && go list -m -f '{{.Dir}}' "github.com/kubernetes-csi/$2")
  cp -f "$dir"/config/crd/$3 "$CACHE/crd/"
}
crds sidecars external-snapshotter/client/v8 '*snapshot.storage*.yaml'
crds metadata external-snapshot-metadata/client '*.yaml'
chmod u+w "$CACHE"/crd/*

# The images have the names of the manifests, so that those need no change.
PROVISIONER=$(version sidecars external-provisioner/v6) RESIZER=$(version sidecars external-resizer/v2)
SNAPSHOTTER=$(version sidecars external-snapshotter/v8) METADATA=$(version metadata external-snapshot-metadata)
export BIN DEB PROVISIONER RESIZER SNAPSHOTTER METADATA
sum=$(cat "$BIN"/*.of "$HERE/images.yaml" "$ROOT"/tools/image/[!_]*[!t].go | sha256sum; dpkg-query -W fio)
if [ "$(cat "$CACHE/images.of" 2>/dev/null)" != "$sum" ]; then
  (cd "$ROOT" && go build -trimpath -o "$BIN/pause" ./test/kube/pause && go run ./tools/image --spec "$HERE/images.yaml" --output "$CACHE/images.tar")
  echo "$sum" >"$CACHE/images.of"
  step "images of the sidecars and test pods"
fi
