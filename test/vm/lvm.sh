#!/bin/bash
# lvm.sh -- runs inside a guest of vm-run.sh -K 2 -M loop: LVM's thin volumes as the rig of
# benchmarks/harness sets them up, one bar of the pool with them, and what a killed run
# leaves. It asks whether that works, not how fast.
#
#   lvm.sh BINARY PROGRAMS
#
# BINARY is ashlar, PROGRAMS a folder with harness.test, bars and devperf.
set -u -o pipefail
binary=$1 programs=$2 work=/run/ashlar-lvm
PATH=$programs:$PATH
fail() {
  echo "${0##*/}: $*" >&2
  losetup --list >&2
  dmsetup ls >&2
  dmesg 2>/dev/null | tail -n 15 >&2
  exit 1
}
try() { "$@" || fail "failed ($?): $*"; }
refuse() { # refuse TEXT COMMAND...: it fails and says TEXT
  local want=$1 said; shift
  said=$("$@" 2>&1) && fail "was not refused: $*: $said"
  grep -q -- "$want" <<<"$said" || fail "$*: said '$said', not '$want'"
}
clean() { # nothing is left of a run: no device, no file, no daemon
  local left
  left=$(dmsetup ls | grep -v '^No devices'; losetup --noheadings --list; ls -d /dev/ashlar_bench_* "$work"/disk/ashlar-stage-* /etc/lvm/archive/* /etc/lvm/backup/* 2>/dev/null; pgrep -lx dmeventd; pgrep -lx lvmpolld)
  [ -z "$left" ] || fail "$1 left: $left"
}
bars() { # bars NAMES [FLAG...]: some bars of the pool
  timeout 600 bars --ashlar "$binary" --pool $work/disk --only "$@"
}
small='--rounds 1 --runtime 1s --ramp 0s --pool-size 64MiB'

mkdir -p $work/disk $work/results
try mkfs.ext4 -q -F /dev/vda
try mount /dev/vda $work/disk
export TMPDIR=$work/disk/tmp
mkdir $TMPDIR

echo "== volumes"
(cd "$(dirname "$binary")/../benchmarks/harness" && harness.test -test.v -test.timeout 15m -test.run '^TestGuestThin') || fail "harness.test"
clean harness.test

echo "== a bar"
try bars pool-randread-4k-qd32 $small --out $work/results
clean "a bar"
result=$(ls $work/results/*-pool-randread-4k-qd32.json) || fail "no result"
try python3 - $result <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
assert "absent" not in r, r["absent"]
assert [p for p in r["peers"] if p["name"] == "lvm-thin" and "LVM version" in p["version"]], r["peers"]
run = [x for x in r["runs"] if x["peer"] == "lvm-thin"][0]
assert run["iops"] > 0 and run["server_sampled"] and run["server_cpu_seconds_per_million"] > 0, run
claims = [v for v in r["verdicts"] if v.get("against") == "lvm-thin"]
assert [v["metric"] for v in claims] == ["iops", "latency_p999_us", "server_cpu_seconds_per_million"], r["verdicts"]
assert all(v["measured"] > 0 and not v.get("absent") for v in claims), claims
PY

echo "== killed, and after it a block device"
"$programs/bars" --ashlar "$binary" --pool $work/disk --only pool-first-randwrite-4k-qd32 $small --out '' >$work/killed 2>&1 & killed=$!
for i in $(seq 6000); do # until a volume of a run is there
  dmsetup ls | grep -q '^ashlar_bench_.*-run' && break
  kill -0 $killed 2>/dev/null || fail "ended before it was killed: $(cat $work/killed)"
  sleep 0.05
done
kill -9 $killed || fail "it is no more"
wait $killed 2>/dev/null
dmsetup ls | grep -q '^ashlar_bench_' || fail "it was killed too late"
refuse "say --yes if it may" bars pool-first-randwrite-4k-qd32 $small --out '' --lvm-device /dev/vdb
try bars pool-first-randwrite-4k-qd32 $small --out '' --lvm-device /dev/vdb --yes 2>$work/said
cat $work/said >&2
grep -q 'removed what a run that was killed left: /dev/loop.* and ashlar_bench_' $work/said || fail "it did not say what it removed"
rm -r $work/disk/ashlar-stage-* # it is named, and stays
clean "a killed run, or one with a block device,"
[ -z "$(blkid -p /dev/vdb)" ] || fail "/dev/vdb keeps $(blkid -p /dev/vdb)"
try umount $work/disk
echo PASS lvm
