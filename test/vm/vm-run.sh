#!/bin/bash
# vm-run.sh -- run one command as root in a real Linux 6.12 kernel (Debian backports, with
# nbd, ublk, eBPF, kprobes, BTF), or with -r in a newer one, under qemu's TCG emulation; no
# KVM needed.  The guest's
# root file system is a throw-away overlay over this host's root (virtiofs, read-only), so
# every binary of the host is there.
#
#   vm-run.sh [options] [--] COMMAND [ARG...]
#   vm-run.sh [options] -c 'SHELL TEXT'
#
#   -r RELEASE  the kernel of the backports of this Debian release: bookworm (Linux 6.12), the
#               default, or trixie (the newest one of kernel.org, 7.3 in November 2026); also
#               $VM_RELEASE
#   -t SECONDS  limit for boot + command, default 300; exit code 124 when it is hit
#   -m SIZE     guest memory, default 2G (taken from /dev/shm while it runs)
#   -j N        virtual CPUs, default 2
#   -w DIR      host directory the guest may really write to (virtiofs, repeatable); writes
#               anywhere else land in a copy-on-write layer in guest memory, discarded
#   -M "a b"    modules to modprobe first (default "nbd ublk_drv"; "nbd:nbds_max=4" passes
#               parameters; "" for none)
#   -N          user-mode network: from the guest, 10.0.2.2 (name "host") port P is the
#               host's 127.0.0.1:P; nothing else of the host can be reached
#   -u PORT=SOCKET  10.0.2.100:PORT (name "relay") in the guest is the host's unix socket
#               SOCKET; implies -N; needs socat (repeatable)
#   -K N[:SIZE] add N virtio disks /dev/vda.. of SIZE, default 1G, each (sparse files in /tmp,
#               discarded at the end)
#   -a "TEXT"   more kernel command line (e.g. "panic_on_warn=1 slub_debug=FZ")
#   -e NAME     environment variable to pass on (repeatable; PATH and HOME always are)
#   -k          print the guest kernel's messages on stderr at the end
#
# stdin is /dev/null; stdout and stderr stay apart and are streamed; the current
# directory is kept.  Exit code: the command's; 124 time limit; 125 no boot/guest died.
#
# Slow: about 12 s to boot, and some thousand I/O a second on two CPUs.
#
# Must be root.  Installs what is missing from Debian (make test-vm does so before):
# qemu-system-x86, busybox-static, kmod, cpio, xz-utils, zstd, python3.  The kernel package
# (106 MB; of trixie four packages) is downloaded once with apt from RELEASE-backports of
# $VM_MIRROR (default http://deb.debian.org/debian), signed by debian-archive-keyring
# (VM_KEYRING; where that is too old for the release, by the one that bookworm has), with
# package lists of its own; it is kept unpacked in $VM_CACHE (default /var/cache/vm-run),
# other releases than bookworm in a directory there, until that is removed.
# VM_KERNEL_DEB='/path/linux-image-*.deb ...' uses those files instead.  Nothing else is left.
set -u
me=${0##*/} here=$(cd "$(dirname "$0")" && pwd)
die() { echo "$me: $*" >&2; exit 125; }
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit "${1:-0}"; }

release=${VM_RELEASE:-bookworm} limit=300 mem=2G cpus=2 mods='nbd ublk_drv' net= disks=0 disksize=1G append= kmsg= text= have_text=
rw=() relay=() envs=(PATH HOME)
while getopts 'r:t:m:j:w:M:Nu:K:a:e:kc:h' o; do
  case $o in
    r) release=$OPTARG ;;
    t) limit=$OPTARG ;;
    m) mem=$OPTARG ;;
    j) cpus=$OPTARG ;;
    w) d=$(realpath -e -- "$OPTARG") || die "-w $OPTARG: no such directory"; rw+=("$d") ;;
    M) mods=$OPTARG ;;
    N) net=1 ;;
    u) relay+=("$OPTARG"); net=1 ;;
    K) disks=${OPTARG%%:*}; case $OPTARG in *:*) disksize=${OPTARG#*:} ;; esac ;;
    a) append=$OPTARG ;;
    e) envs+=("$OPTARG") ;;
    k) kmsg=1 ;;
    c) text=$OPTARG have_text=1 ;;
    h) usage ;;
    *) usage 125 >&2 ;;
  esac
done
shift $((OPTIND - 1))
[ -n "$have_text" ] || [ $# -gt 0 ] || usage 125 >&2
case $release in bookworm | trixie) ;; *) die "-r $release: bookworm or trixie" ;; esac
[ "$(id -u)" = 0 ] || die "must be root"

need() { # need BINARY PACKAGE
  command -v "$1" >/dev/null && return
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 \
    --no-install-recommends install "$2" >&2 </dev/null || die "cannot install $2"
}
PATH=$PATH:/usr/lib/qemu
need qemu-system-x86_64 qemu-system-x86
need busybox busybox-static
need depmod kmod; need cpio cpio; need xz xz-utils; need zstd zstd; need python3 python3
command -v virtiofsd >/dev/null || need virtiofsd virtiofsd   # its own package since Debian 13
[ ${#relay[@]} = 0 ] || need socat socat

# ---- the kernel, unpacked once ---------------------------------------------------
C=${VM_CACHE:-/var/cache/vm-run}
[ "$release" = bookworm ] || C=$C/$release
mkdir -p "$C" || die "cannot make $C"
exec 9>"$C/.lock"; flock 9
# with sources and lists of our own: the host's may not have backports, and stay as they are
apt=(-qq -o Acquire::Retries=3 -o APT::Sandbox::User=root -o Dir::Etc::SourceList="$C/new/apt/sources.list"
  -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$C/new/apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
from() { # from SUITE KEYRING: the packages to be had
  rm -rf "$C/new/apt"; mkdir -p "$C/new/apt/lists/partial"
  echo "deb [signed-by=$2] ${VM_MIRROR:-http://deb.debian.org/debian} $1 main" >"$C/new/apt/sources.list"
  apt-get "${apt[@]}" update >&2 </dev/null
}
depends() { # depends PACKAGE PATTERN: what it depends on that matches, one name a line
  apt-cache "${apt[@]:1}" depends "$1" 2>/dev/null | sed -n "s/^ *Depends: \($2\)\$/\1/p"
}
if [ ! -e "$C/ready" ]; then
  rm -rf "$C/new"; mkdir "$C/new"
  if [ -z "${VM_KERNEL_DEB:-}" ]; then
    key=${VM_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}
    [ -e "$key" ] || die "no $key (Debian package debian-archive-keyring)"
    if ! from "$release-backports" "$key"; then
      [ "$release" != bookworm ] || die "cannot read bookworm-backports"
      # perhaps for want of a key: bookworm's keyring got those of trixie in its life
      from bookworm "$key" && (cd "$C/new" && apt-get "${apt[@]}" download debian-archive-keyring) >&2 &&
        dpkg-deb -x "$C"/new/debian-archive-keyring_*.deb "$C/new/keys" || die "cannot read $release-backports, nor a newer debian-archive-keyring"
      rm "$C"/new/debian-archive-keyring_*.deb
      from "$release-backports" "$C/new/keys/usr/share/keyrings/debian-archive-keyring.gpg" || die "cannot read $release-backports"
    fi
    p=$(depends "linux-image-amd64/$release-backports" 'linux-image-[0-9][^ ]*' | head -n 1)
    [ -n "$p" ] || die "$release-backports has no linux-image-amd64"
    # since 7.x the kernel, its modules and what describes them are packages of their own
    p="$p $(depends "$p" 'linux-\(base\|binary\|modules\)-[0-9][^ ]*' | tr '\n' ' ')"
    (cd "$C/new" && apt-get "${apt[@]}" download $p) >&2 || die "cannot download $p"
    VM_KERNEL_DEB=$(ls "$C"/new/*.deb)
  fi
  for p in $VM_KERNEL_DEB; do
    dpkg-deb -x "$p" "$C/new/x" || die "cannot unpack $p"
  done
  [ -e "$C/new/x/lib" ] || ln -s usr/lib "$C/new/x/lib"
  r=$(ls "$C/new/x/lib/modules")
  # likely modules uncompressed: xz is slow under emulation
  (cd "$C/new/x/lib/modules/$r/kernel" && find drivers/block drivers/md drivers/net/virtio_net.ko* net/core \
    fs/ext4 fs/jbd2 fs/mbcache.ko* fs/xfs fs/btrfs fs/overlayfs lib crypto arch -name '*.ko.xz' -print0 2>/dev/null |
    xargs -0 -r xz -d)
  depmod -b "$C/new/x" "$r" || die depmod
  # initramfs: busybox and the modules that reach the root file system
  i=$C/new/initrd; mkdir -p "$i"/{bin,dev,proc,sys,mod,new,lower,cow}
  cp "$(command -v busybox)" "$i/bin/busybox"
  for m in virtio_pci virtiofs overlay; do
    modprobe -d "$C/new/x" -S "$r" --show-depends "$m"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r f; do
    b=$(basename "$f" .xz)
    case $f in *.xz) xz -dc "$f" >"$i/mod/$b" ;; *) cp "$f" "$i/mod/$b" ;; esac
    echo "$b"
  done >"$i/mod/order"
  cat >"$i/init" <<'EARLY'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t devtmpfs dev /dev
for m in $($B cat /mod/order); do $B insmod /mod/$m || echo "insmod $m failed"; done
$B mount -t virtiofs -o ro root /lower && $B mount -t tmpfs -o mode=755,size=75% tmpfs /cow &&
$B mkdir /cow/up /cow/wk && $B mount -t overlay -o lowerdir=/lower,upperdir=/cow/up,workdir=/cow/wk overlay /new || $B poweroff -f
W=$($B sed 's/.*vmrun=\([^ ]*\).*/\1/' /proc/cmdline)
$B umount /proc
$B mount -t virtiofs vmrun /new$W || $B poweroff -f
exec $B switch_root /new $W/init
EARLY
  chmod +x "$i/init"
  (cd "$i" && find . | cpio -o -H newc -R 0:0 --quiet) >"$C/new/initrd.img" || die initrd
  # an uncompressed kernel spares the guest the (emulated) decompression
  mkdir -p "$C/new/x/boot"
  [ -e "$C/new/x/boot/vmlinuz-$r" ] || ln -s "../lib/modules/$r/vmlinuz" "$C/new/x/boot/vmlinuz-$r"
  python3 - "$C/new/x/boot/vmlinuz-$r" "$C/new/vmlinux.zst" <<'PY' &&
import struct, sys
d = open(sys.argv[1], 'rb').read()          # bzImage, Documentation/arch/x86/boot.rst
start = (d[0x1f1] + 1) * 512 + struct.unpack_from('<I', d, 0x248)[0]
n = struct.unpack_from('<I', d, 0x24c)[0]
open(sys.argv[2], 'wb').write(d[start:start + n - 4])
PY
    zstd -dqf "$C/new/vmlinux.zst" -o "$C/new/vmlinux" || rm -f "$C/new/vmlinux"
  rm -rf "$C/new/vmlinux.zst" "$i" "$C"/new/*.deb "$C/new/apt" "$C/new/keys"
  rm -rf "$C/x" "$C/initrd.img" "$C/vmlinux"
  mv "$C"/new/* "$C"/ && rmdir "$C/new" && echo "$r" >"$C/ready"
fi
flock -u 9; exec 9>&-
r=$(cat "$C/ready")
kernel=$C/vmlinux; [ -s "$kernel" ] || kernel=$C/x/boot/vmlinuz-$r

W=$(mktemp -d /tmp/vm-run.XXXXXX) || die mktemp
nspid=
cleanup() {
  # timeout and what it started are one process group; --kill-child takes the rest along
  [ -z "$nspid" ] || kill -KILL -- "-$nspid" "$nspid" 2>/dev/null
  rm -rf "$W"
}
trap cleanup EXIT
trap 'exit 130' INT; trap 'exit 143' TERM HUP

# ---- what the guest runs -----------------------------------------------------------
mkdir "$W/s"
{
  for v in "${envs[@]}"; do [ -n "${!v+x}" ] && printf 'export %s=%q\n' "$v" "${!v}"; done
  printf 'cd %q || exit 125\n' "$PWD"
  if [ -n "$have_text" ]; then printf '%s\n' "$text"; else printf 'exec'; printf ' %q' "$@"; echo; fi
} >"$W/s/cmd"
cp "$here/guest.sh" "$W/s/guest.sh" || die "guest.sh is missing beside this script"
{
  printf 'W=%q MODS=%q NET=%q DISKS=%q KDIR=%q\n' "$W/s" "$mods" "$net" "$disks" "$C/x/lib/modules/$r"
  printf 'rwdirs() {\n:\n'; n=0
  for d in ${rw[@]+"${rw[@]}"}; do printf 'mount -t virtiofs rw%d %q\n' $n "$d"; n=$((n + 1)); done; echo '}'
} >"$W/s/conf"

cat >"$W/s/init" <<'INIT'
#!/bin/bash
# pid 1 of the guest, in the overlay
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. "${0%/*}/conf"
off() { sync; echo o >/proc/sysrq-trigger; sleep 60; }
: >"$W/booted"
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/lock
mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug; mount -t bpf bpf /sys/fs/bpf
ln -snf /proc/self/fd /dev/fd; ln -snf fd/0 /dev/stdin; ln -snf fd/1 /dev/stdout; ln -snf fd/2 /dev/stderr
rwdirs
mkdir -p /lib/modules; ln -sfn "$KDIR" "/lib/modules/$(uname -r)"
ip link set lo up; hostname vm
if [ -n "$NET" ]; then
  modprobe virtio_net && ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2
  cp /etc/hosts /run/hosts 2>/dev/null; printf '10.0.2.2 host\n10.0.2.100 relay\n' >>/run/hosts
  mount --bind /run/hosts /etc/hosts
fi
. "$W/guest.sh"
load_modules vm-run "$MODS"
[ "$DISKS" = 0 ] || modprobe virtio_blk
run_command
off
INIT
chmod +x "$W/s/init"

# ---- the host side, in a pid and mount namespace of its own -------------------------
cat >"$W/host" <<'HOST'
W=$1 mem=$2 cpus=$3 net=$4 disks=$5 disksize=$6 kernel=$7 initrd=$8 append=$9; shift 9
mount -t proc proc /proc
PATH=$PATH:/usr/lib/qemu
dev=() n=0
fs() { # fs TAG DIR OPTIONS
  virtiofsd --socket-path="$W/v$n" -o source="$2" -o cache=$3 -o sandbox=chroot -o xattr -f >>"$W/virtiofsd.log" 2>&1 </dev/null &
  for ((k = 0; k < 200; k++)); do [ -S "$W/v$n" ] && break; sleep 0.01; done
  dev+=(-chardev "socket,id=v$n,path=$W/v$n" -device "vhost-user-fs-pci,chardev=v$n,tag=$1"); n=$((n + 1))
}
fs root / always
fs vmrun "$W/s" none
i=0
while [ "${1:-}" != -- ]; do fs rw$i "$1" auto; i=$((i + 1)); shift; done; shift
if [ -n "$net" ]; then
  nd="user,id=n0,restrict=off,ipv6=off"
  for r; do nd+=",guestfwd=tcp:10.0.2.100:${r%%=*}-cmd:socat - UNIX-CONNECT:${r#*=}"; done
  dev+=(-netdev "$nd" -device virtio-net-pci,netdev=n0,romfile=)
else
  dev+=(-nic none)
fi
for ((i = 0; i < disks; i++)); do
  truncate -s "$disksize" "$W/disk$i"
  dev+=(-drive "if=virtio,format=raw,discard=unmap,cache=unsafe,file=$W/disk$i")
done
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -M q35,usb=off,sata=off,hpet=off -m "$mem" -smp "$cpus" \
  -object "memory-backend-memfd,id=m,size=$mem,share=on" -numa node,memdev=m \
  -nodefaults -no-user-config -display none -no-reboot -serial "file:$W/console" \
  -device virtio-rng-pci \
  -kernel "$kernel" -initrd "$initrd" "${dev[@]}" \
  -append "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic no_timer_check tsc=reliable mitigations=off nokaslr rdinit=/init vmrun=$W/s $append" \
  </dev/null >"$W/qemu.log" 2>&1
HOST

: >"$W/s/out"; : >"$W/s/err"
end=$((SECONDS + limit))
# a guest that died before its init started (seen: emulation timing on a busy host) gets a second go
for try in 1 2; do
  rm -f "$W"/v* "$W"/disk*
  timeout -s KILL $((end - SECONDS)) unshare --pid --fork --kill-child=KILL --mount \
    bash "$W/host" "$W" "$mem" "$cpus" "$net" "$disks" "$disksize" "$kernel" "$C/initrd.img" "$append" \
    ${rw[@]+"${rw[@]}"} -- ${relay[@]+"${relay[@]}"} &
  nspid=$!
  tail -q -s 0.02 --pid=$nspid -c +1 -f "$W/s/out" & out=$!
  tail -q -s 0.02 --pid=$nspid -c +1 -f "$W/s/err" >&2 & err=$!
  wait "$nspid" 2>/dev/null; hrc=$?
  nspid=
  wait "$out" "$err" 2>/dev/null
  [ ! -e "$W/s/booted" ] && [ $((end - SECONDS)) -gt 0 ] && [ "$hrc" != 137 ] || break
  [ $try = 2 ] || { echo "$me: the guest did not boot, once more:" >&2; tail -n 30 "$W/console" | tr -d '\r' | sed 's/^/guest: /' >&2; }
done

[ -z "$kmsg" ] || cat "$W/s/dmesg" >&2 2>/dev/null
if [ -s "$W/s/rc" ]; then exit "$(cat "$W/s/rc")"; fi
if [ "$hrc" = 124 ] || [ "$hrc" = 137 ]; then
  echo "$me: time limit of $limit s" >&2; rc=124
else
  echo "$me: the guest ended without a result (host side rc $hrc)" >&2; rc=125
fi
cat "$W/qemu.log" >&2 2>/dev/null
tail -n 40 "$W/console" 2>/dev/null | tr -d '\r' | sed 's/^/guest: /' >&2
exit $rc
