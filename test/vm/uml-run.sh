#!/bin/bash
# uml-run.sh -- run one command as root in a User Mode Linux 6.1 kernel whose root
# file system is a throw-away overlay over this host's root (so every binary of the
# host is there), with the nbd driver loaded.  About 2 s of overhead per call.
#
#   uml-run.sh [options] [--] COMMAND [ARG...]
#   uml-run.sh [options] -c 'SHELL TEXT'
#
#   -t SECONDS  limit for boot + command, default 120; exit code 124 when it is hit
#   -m SIZE     guest memory, default 1G (taken from /dev/shm while it runs)
#   -w DIR      host directory the guest may really write to (repeatable); writes
#               anywhere else land in a copy-on-write layer in guest memory, discarded
#   -M "a b"    modules to modprobe first (default "nbd"; "nbd:max_part=8,nbds_max=4"
#               passes parameters; "" for none).  dm-flakey, dm-log-writes, loop, brd...
#   -N          network: guest 10.97.0.2, host side 10.97.0.1 (name "host" in the guest),
#               in a network namespace of its own; without -N the guest has lo only
#   -H 'TEXT'   shell text run on the host side (host kernel, same namespace as the
#               10.97.0.1 end) before boot, killed at the end; implies -N.
#               Its output goes to stderr, prefixed "host: "
#   -u PORT=SOCKET  relay 10.97.0.1:PORT to a unix socket of the host, e.g. of a server
#               already running outside; implies -N; needs socat (repeatable)
#   -e NAME     environment variable to pass on (repeatable; PATH and HOME always are)
#   -k          print the guest kernel's messages on stderr at the end
#
# stdin is /dev/null; stdout and stderr stay apart and are streamed; the current
# directory is kept.  Exit code: the command's; 124 time limit; 125 no boot/guest died.
# One CPU, no ublk, no ftrace/eBPF tracing; has nbd, io_uring, ext4, xfs, btrfs, dm-*.
# A unix socket cannot cross between host and guest kernels: use -u or -H for that.
#
# Must be root (namespaces, hostfs as root).  Needs the Debian package
# user-mode-linux (make interop installs it); iproute2 and socat for -N and -u;
# gcc on a host CPU with AMX.
set -u
me=${0##*/} here=$(cd "$(dirname "$0")" && pwd)
die() { echo "$me: $*" >&2; exit 125; }
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit "${1:-0}"; }

limit=120 mem=1G mods=nbd net= hostcmd= kmsg= text= have_text=
rw=() relay=() envs=(PATH HOME)
while getopts 't:m:w:M:NH:u:e:kc:h' o; do
  case $o in
    t) limit=$OPTARG ;;
    m) mem=$OPTARG ;;
    w) d=$(realpath -e -- "$OPTARG") || die "-w $OPTARG: no such directory"; rw+=("$d") ;;
    M) mods=$OPTARG ;;
    N) net=1 ;;
    H) hostcmd=$OPTARG net=1 ;;
    u) relay+=("$OPTARG"); net=1 ;;
    e) envs+=("$OPTARG") ;;
    k) kmsg=1 ;;
    c) text=$OPTARG have_text=1 ;;
    h) usage ;;
    *) usage 125 >&2 ;;
  esac
done
shift $((OPTIND - 1))
[ -n "$have_text" ] || [ $# -gt 0 ] || usage 125 >&2
[ "$(id -u)" = 0 ] || die "must be root"

need() { # need BINARY PACKAGE
  command -v "$1" >/dev/null || die "$1 is missing (Debian package $2)"
}
need linux.uml user-mode-linux
[ -z "$net" ] || need ip iproute2
[ ${#relay[@]} = 0 ] || need socat socat

W=$(mktemp -d /tmp/uml-run.XXXXXX) || die mktemp
nspid=
cleanup() {
  # timeout and what it started are one process group; --kill-child takes the rest along
  [ -z "$nspid" ] || kill -KILL -- "-$nspid" "$nspid" 2>/dev/null
  rm -rf "$W"
}
trap cleanup EXIT
trap 'exit 130' INT; trap 'exit 143' TERM HUP

# ---- what the guest runs -------------------------------------------------------
{
  for v in "${envs[@]}"; do [ -n "${!v+x}" ] && printf 'export %s=%q\n' "$v" "${!v}"; done
  printf 'cd %q || exit 125\n' "$PWD"
  if [ -n "$have_text" ]; then printf '%s\n' "$text"; else printf 'exec'; printf ' %q' "$@"; echo; fi
} >"$W/cmd"
cp "$here/guest.sh" "$W/guest.sh" || die "guest.sh is missing beside this script"
{
  printf 'W=%q MODS=%q NET=%q\n' "$W" "$mods" "$net"
  printf 'rwdirs() {\n:\n'; for d in ${rw[@]+"${rw[@]}"}; do printf 'share %q\n' "$d"; done; echo '}'
} >"$W/conf"

cat >"$W/init" <<'INIT'
#!/bin/bash
# pid 1 of the guest; / is the host's root through hostfs, mounted read-only.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. "${0%/*}/conf"
off() { echo o >/proc/sysrq-trigger; sleep 60; }
share() { mount -t hostfs -o "$1" none "/mnt/root$1"; }
mount -t proc proc /proc
if [ -z "${PIVOTED:-}" ]; then
  M=/usr/lib/uml/modules/$(uname -r)
  insmod "$M/kernel/fs/overlayfs/overlay.ko" || off
  mount -t tmpfs -o mode=755,size=75% tmpfs /mnt && mkdir /mnt/up /mnt/wk /mnt/root &&
  mount -t overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/wk overlay /mnt/root || off
  share "$W" || off
  [ ! -e "/mnt/root$W/booted" ] || off  # the guest rebooted itself: stop
  : >"/mnt/root$W/booted"
  rwdirs
  mkdir -p /mnt/root/lib/modules /mnt/root/.uml-old
  ln -sfn "$M" "/mnt/root/lib/modules/$(uname -r)"
  cd /mnt/root && mount -t proc proc proc && mount -t sysfs sysfs sys &&
  mount -t devtmpfs dev dev && mkdir -p dev/pts dev/shm &&
  mount -t devpts devpts dev/pts && mount -t tmpfs tmpfs dev/shm &&
  mount -t tmpfs -o mode=755 tmpfs run || off
  mkdir -p run/lock; ln -snf /proc/self/fd dev/fd
  ln -snf fd/0 dev/stdin; ln -snf fd/1 dev/stdout; ln -snf fd/2 dev/stderr
  mount -t cgroup2 cgroup2 sys/fs/cgroup 2>/dev/null
  pivot_root . .uml-old || off
  PIVOTED=1 exec chroot . "$W/init"
fi
umount -l /.uml-old; rmdir /.uml-old; cd /
umount /proc; mount -t proc proc /proc 2>/dev/null
ip link set lo up 2>/dev/null
hostname uml
if [ -n "$NET" ]; then
  ip addr add 10.97.0.2/24 dev vec0 && ip link set vec0 up
  cp /etc/hosts /run/hosts 2>/dev/null; echo '10.97.0.1 host' >>/run/hosts
  mount --bind /run/hosts /etc/hosts
fi
. "$W/guest.sh"
load_modules uml-run "$MODS"
run_command
off
INIT
chmod +x "$W/init"

# ---- the host side: own pid, mount (and network) namespace ----------------------
cat >"$W/host" <<'HOST'
W=$1 mem=$2 net=$3 hostcmd=$4; shift 4
mount -t proc proc /proc
vec=()
if [ -n "$net" ]; then
  ip link set lo up && ip tuntap add dev tap0 mode tap && ip addr add 10.97.0.1/24 dev tap0 &&
  ip link set tap0 up || exit 125
  vec=(vec0:transport=tap,ifname=tap0,depth=128,gro=1,mac=02:97:00:00:00:02)
  for r; do
    socat "TCP-LISTEN:${r%%=*},bind=10.97.0.1,reuseaddr,fork,nodelay" "UNIX-CONNECT:${r#*=}" &
  done
  if [ -n "$hostcmd" ]; then
    { bash -c "$hostcmd" 2>&1 </dev/null | sed -u 's/^/host: /' >&2; } &
  fi
fi
[ ! -w /dev/shm ] || export TMPDIR=/dev/shm
[ ! -e "$W/xstate.so" ] || export LD_PRELOAD=$W/xstate.so
# not as pid 1 of the namespace, which could not kill itself with a signal on a panic
linux.uml "mem=$mem" "uml_dir=$W/uml" umid=g root=/dev/root rootfstype=hostfs rootflags=/ ro \
  "init=$W/init" con=null con0=null,fd:1 ssl=null \
  ${vec[@]+"${vec[@]}"} quiet loglevel=4 </dev/null >"$W/console" 2>&1
HOST
mkdir "$W/uml"
if grep -qw amx_tile /proc/cpuinfo; then # see uml/xstate.c
  need gcc gcc
  gcc -shared -fPIC -O1 -o "$W/xstate.so" "$here/uml/xstate.c" || die "cannot compile xstate.c"
fi

: >"$W/out"; : >"$W/err"
ns=(unshare --pid --fork --kill-child=KILL --mount)
[ -z "$net" ] || ns+=(--net)
timeout -s KILL "$limit" "${ns[@]}" bash "$W/host" "$W" "$mem" "$net" "$hostcmd" ${relay[@]+"${relay[@]}"} &
nspid=$!
tail -q -s 0.02 --pid=$nspid -c +1 -f "$W/out" & out=$!
tail -q -s 0.02 --pid=$nspid -c +1 -f "$W/err" >&2 & err=$!
wait "$nspid" 2>/dev/null; hrc=$?
nspid=
wait "$out" "$err" 2>/dev/null

[ -z "$kmsg" ] || cat "$W/dmesg" >&2 2>/dev/null
if [ -s "$W/rc" ]; then exit "$(cat "$W/rc")"; fi
if [ "$hrc" = 124 ] || [ "$hrc" = 137 ]; then
  echo "$me: time limit of $limit s" >&2; rc=124
else
  echo "$me: the guest ended without a result (host side rc $hrc)" >&2; rc=125
fi
tail -n 40 "$W/console" | tr -d '\r' | sed 's/^/guest: /' >&2
exit $rc
