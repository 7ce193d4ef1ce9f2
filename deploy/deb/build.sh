#!/bin/bash
# build.sh ARCH VERSION OUTPUT -- make the Debian package for amd64 or arm64.
#
# GO is the go command, LDFLAGS those of make build. The same commit gives the same
# bytes: times in the package are the commit's. Needs dpkg-deb.
set -euo pipefail
cd "$(dirname "$0")/../.."
arch=$1 version=$2 output=$3
tree=.make/deb/$arch
rm -rf "$tree"
umask 022
mkdir -p "$tree"/{DEBIAN,usr/bin,etc/ashlar,lib/systemd/system} "$(dirname "$output")" \
  "$tree"/usr/share/{man/man1,bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d,doc/ashlar}
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 0)
export SOURCE_DATE_EPOCH
maintainer=$(sed -n 's/^Upstream-Contact: //p' deploy/deb/copyright)
install() { command install -D -m "$1" "$2" "$tree/$3"; }

# A version begins with a digit and has no hyphen: v1.2-5-gabc is 1.2+5.gabc, and what
# is no release sorts before every release.
version=${version#v}
version=${version/-/+}
version=${version//-/.}
[[ $version == [0-9]*.* ]] || version=0~$version
case $version in *[!A-Za-z0-9.+~]*) echo "build.sh: $2 cannot be made a Debian version" >&2; exit 2 ;; esac

CGO_ENABLED=0 GOARCH=$arch ${GO:-go} build -trimpath -buildvcs=false -ldflags "${LDFLAGS:-}" -o "$tree/usr/bin/ashlar" ./cmd/ashlar
# Completions come from a binary that runs here.
CGO_ENABLED=0 GOARCH='' ${GO:-go} build -trimpath -buildvcs=false -ldflags "${LDFLAGS:-}" -o .make/deb/native ./cmd/ashlar
.make/deb/native completion bash >"$tree/usr/share/bash-completion/completions/ashlar"
.make/deb/native completion zsh >"$tree/usr/share/zsh/vendor-completions/_ashlar"
.make/deb/native completion fish >"$tree/usr/share/fish/vendor_completions.d/ashlar.fish"

for page in docs/man/*.1; do gzip -9nc "$page" >"$tree/usr/share/man/man1/${page##*/}.gz"; done
gzip -9nc CHANGELOG.md >"$tree/usr/share/doc/ashlar/CHANGELOG.md.gz"
gzip -9nc >"$tree/usr/share/doc/ashlar/changelog.gz" <<END
ashlar ($version) unstable; urgency=medium

  * What changed is in CHANGELOG.md.gz beside this file.

 -- $maintainer  $(date -uRd "@$SOURCE_DATE_EPOCH")
END
install 644 deploy/deb/copyright usr/share/doc/ashlar/copyright
install 644 deploy/deb/lintian-overrides usr/share/lintian/overrides/ashlar
install 644 docs/operating.md usr/share/doc/ashlar/operating.md
install 644 deploy/deb/modules-load.conf usr/lib/modules-load.d/ashlar.conf
install 640 deploy/systemd/serve.yaml etc/ashlar/serve.yaml
# The comment at the head of a unit says how to install it by hand.
for unit in ashlar ashlar-keeper; do
  sed -e '1,/^\[Unit\]/{/^#/d}' -e 's|/usr/local/bin/ashlar|/usr/bin/ashlar|' "deploy/systemd/$unit.service" >"$tree/lib/systemd/system/$unit.service"
  grep -q '^ExecStart=/usr/bin/ashlar ' "$tree/lib/systemd/system/$unit.service"
done

for script in postinst prerm postrm; do install 755 "deploy/deb/$script" "DEBIAN/$script"; done
echo /etc/ashlar/serve.yaml >"$tree/DEBIAN/conffiles"
cat >"$tree/DEBIAN/control" <<END
Package: ashlar
Version: $version
Architecture: $arch
Maintainer: $maintainer
Section: admin
Priority: optional
Homepage: https://github.com/ashlar-storage/ashlar
Installed-Size: $(du -sk --exclude=DEBIAN "$tree" | cut -f1)
Recommends: nbd-client
Suggests: fio
Description: userspace block devices: pools, snapshots, NBD exports
 Ashlar turns raw disks or files into thin, checksummed volumes with snapshots
 and clones, and serves them from a polling core over NBD and as block devices
 of the machine. The binary is static and needs nothing else.
END

find "$tree" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group -Zxz --build "$tree" "$output" >/dev/null
rm -rf "$tree" .make/deb/native
echo "$output"
