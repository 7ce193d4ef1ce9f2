#!/bin/bash
# foreign-root.sh -- the NBD programs of a newer Debian, to be run on this one: libnbd (nbdinfo,
# nbdcopy, nbdsh, python3 with its binding) and qemu (qemu-img, qemu-io, qemu-nbd).  Nothing is
# installed; no root needed.
#
#   foreign-root.sh [-r RELEASE]                       print the folder of the programs, for PATH
#   foreign-root.sh [-r RELEASE] [--] COMMAND [ARG...] run one of them
#
#   -r RELEASE  of Debian, default trixie (libnbd 1.22, qemu 10: the first with extended
#               headers); also $FOREIGN_RELEASE
#   -h          this text
#
# The programs and all that they depend on, libc too, are downloaded with apt (25 MB) from
# RELEASE of $FOREIGN_MIRROR (default http://deb.debian.org/debian), signed by
# debian-archive-keyring, with package lists and a package status of its own: apt's of this
# host are neither read nor changed.  They are kept unpacked (120 MB) in $FOREIGN_CACHE (default
# /var/cache/foreign-root, for others than root ~/.cache/foreign-root), each release in a
# folder there, until that is removed.
#
# In that folder's bin/ a program is a script that starts the real one by the dynamic loader and
# with the libraries of its own release.  So it sees this host's files and sockets as others do.
#
# Exit code: the command's; 69 when the mirror cannot be reached, 70 when all else fails here,
# 2 for wrong usage.
set -u
me=${0##*/} programs='nbdinfo nbdcopy nbdsh python3 qemu-img qemu-io qemu-nbd'
packages='libnbd-bin python3-libnbd qemu-utils'
die() { echo "$me: $*" >&2; exit 70; }
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit "$1"; }

release=${FOREIGN_RELEASE:-trixie}
while getopts 'r:h' o; do
  case $o in
    r) release=$OPTARG ;;
    h) usage 0 ;;
    *) usage 2 >&2 ;;
  esac
done
shift $((OPTIND - 1))
case $release in '' | *[!a-z]*) echo "$me: -r $release: the name of a Debian release" >&2; exit 2 ;; esac

mirror=${FOREIGN_MIRROR:-http://deb.debian.org/debian}
key=/usr/share/keyrings/debian-archive-keyring.gpg
cache=/var/cache
[ "$(id -u)" = 0 ] || cache=${XDG_CACHE_HOME:-$HOME/.cache}
cache=${FOREIGN_CACHE:-$cache/foreign-root}
mkdir -p "$cache" || die "cannot make $cache"
cache=$(realpath -e -- "$cache")
C=$cache/$release

# ---- from the mirror, unpacked once ------------------------------------------------------
N=$cache/new.$release # becomes $C when it is whole
apt() { # apt PROGRAM ARG...: with sources, lists, status and cache in $N, and none of this host's hooks
  local program=$1; shift
  "$program" -q -c "$N/apt/conf" "$@" </dev/null
}
fetch() {
  trap 'rm -rf "$N"' EXIT
  rm -rf "$N"
  mkdir -p "$N/apt/lists/partial" "$N/apt/archives/partial" "$N/root/usr/lib" "$N/bin" || die "cannot write to $cache"
  : >"$N/apt/status" # nothing is installed, so that everything is downloaded
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "needs apt-get and dpkg-deb, which Debian has"
  [ -e $key ] || die "no $key (Debian package debian-archive-keyring)"
  echo "deb [signed-by=$key] $mirror $release main" >"$N/apt/sources.list"
  cat >"$N/apt/conf" <<CONF
#clear APT::Update;
#clear DPkg;
Acquire { Retries "3"; Languages "none"; http::Timeout "30"; };
APT { Sandbox::User ""; Install-Recommends "false"; Install-Suggests "false"; Update::Error-Mode "any"; };
pkgCacheGen::Essential "none";
Dir::Etc { SourceParts "/dev/null"; SourceList "$N/apt/sources.list"; Preferences "/dev/null"; PreferencesParts "/dev/null"; };
Dir { State "$N/apt"; State::status "$N/apt/status"; Cache "$N/apt"; };
CONF
  if ! apt /usr/lib/apt/apt-helper download-file "$mirror/dists/$release/InRelease" "$N/apt/InRelease" >"$N/apt/log" 2>&1; then
    echo "$me: $mirror cannot be reached, or has no $release: $(sed -n 's/^  *//p' "$N/apt/log" | tail -n 1)" >&2
    exit 69
  fi
  apt apt-get update >&2 || die "cannot read the lists of $release; is the package debian-archive-keyring up to date?"
  apt apt-get install -y --download-only $packages >&2 || die "cannot download $packages of $release"
  local deb
  for deb in "$N"/apt/archives/*.deb; do
    dpkg-deb -x "$deb" "$N/root" || die "cannot unpack $deb"
  done
  rm -rf "$N/apt"

  local loader libraries python program
  loader=$(cd "$N/root" && ls -d usr/lib/*/ld-linux*.so.* | head -n 1)
  libraries=${loader%/*}
  python=$(cd "$N/root" && readlink -f usr/bin/python3) && python=${python##*/}
  [ -n "$loader" ] && [ -x "$N/root/usr/bin/$python" ] || die "$packages of $release hold no loader, or no python3"
  for program in $programs; do
    {
      echo '#!/bin/sh'
      echo "# made by $me, of $release"
      case $program in
        nbdsh) printf 'exec %q -m nbd "$@"\n' "$C/bin/python3" ;;
        python3)
          printf 'PYTHONDONTWRITEBYTECODE=1 PYTHONHOME=%q PYTHONPATH=%q \\\n' "$C/root/usr" "$C/root/usr/lib/python3/dist-packages"
          printf 'exec %q --inhibit-cache --library-path %q %q "$@"\n' "$C/root/$loader" "$C/root/$libraries" "$C/root/usr/bin/$python"
          ;;
        *) printf 'exec %q --inhibit-cache --library-path %q %q "$@"\n' "$C/root/$loader" "$C/root/$libraries" "$C/root/usr/bin/$program" ;;
      esac
    } >"$N/bin/$program" && chmod +x "$N/bin/$program" || die "cannot write $N/bin/$program"
  done
  rm -rf "$C" && mv "$N" "$C" && echo "$packages $programs" >"$C/ready" || die "cannot write to $cache"
}
exec 9>"$cache/.lock" || die "cannot write to $cache"
flock 9
[ "$(cat "$C/ready" 2>/dev/null)" = "$packages $programs" ] || fetch
flock -u 9; exec 9>&-

if [ $# = 0 ]; then
  echo "$C/bin"
  exit 0
fi
case " $programs " in *" $1 "*) ;; *) echo "$me: $1: not one of $programs" >&2; exit 2 ;; esac
program=$1; shift
exec "$C/bin/$program" "$@"
