package doctor

import (
	"cmp"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// capability is a right of a process, by its bit in /proc/self/status.
type capability struct {
	bit  uint
	name string
	lost string // what is not possible without it
	unit bool   // a unit without it lacks something
}

var capabilities = []capability{
	{capSysAdmin, "CAP_SYS_ADMIN", "`ashlar attach` cannot make block devices", true},
	{capBPF, "CAP_BPF", "disks and reactors are not observed", true},
	{capPerfmon, "CAP_PERFMON", "disks and reactors are not observed", true},
	{capSysResource, "CAP_SYS_RESOURCE", "when memory is short the daemon may wait for its own devices, and a mounted ext4 does not grow", true},
	{capDACOverride, "CAP_DAC_OVERRIDE", "disks and files of other users cannot be opened", true},
	{23, "CAP_SYS_NICE", "reactors cannot be given precedence over other work", false},
	{capIPCLock, "CAP_IPC_LOCK", "buffers count against the limit of locked memory", false},
}

const (
	capDACOverride = 1
	capIPCLock     = 14
	capSysAdmin    = 21 // the kernel takes it for CAP_BPF and CAP_PERFMON too
	capSysResource = 24 // of PR_SET_IO_FLUSHER and EXT4_IOC_RESIZE_FS
	capPerfmon     = 38
	capBPF         = 39
)

// implies says whether the right of bit comes with what set has.
func implies(set uint64, bit uint) bool {
	return set&(1<<bit) != 0 || set&(1<<capSysAdmin) != 0 && (bit == capBPF || bit == capPerfmon)
}

// effective are the capabilities of this process, by bit.
func (h *Host) effective() (set uint64, known bool) {
	for line := range strings.Lines(h.text("/proc/self/status")) {
		if value, found := strings.CutPrefix(line, "CapEff:"); found {
			set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			return set, err == nil
		}
	}
	return 0, false
}

func checkCapabilities(h *Host, _ *Options) []Finding {
	set, known := h.effective()
	if !known {
		return []Finding{note("the capabilities of this process could not be read from /proc/self/status", "")}
	}
	var findings []Finding
	for _, c := range capabilities {
		if implies(set, c.bit) {
			continue
		}
		text := fmt.Sprintf("this user has no %s: %s", c.name, c.lost)
		if h.isRoot() && c.unit {
			findings = append(findings, warning("root has no "+c.name+" here: "+c.lost, "give it to the container or the unit: AmbientCapabilities="+c.name))
			continue
		}
		findings = append(findings, note(text, "run the daemon as root, or with AmbientCapabilities="+c.name+" in its unit"))
	}
	if len(findings) == 0 {
		return []Finding{ok("this user has all capabilities that the daemon can use")}
	}
	return findings
}

const (
	nofileMin  = 4096  // some clients of some volumes
	nofileGood = 65536 // 250 devices with their queues, and as many clients
	pidsMin    = 256   // threads of the runtime, and workers where there is no io_uring
)

func checkLimits(h *Host, o *Options) []Finding {
	var findings []Finding
	if set, _ := h.effective(); set&(1<<capIPCLock) != 0 {
		findings = append(findings, ok("locked memory is not limited for this user (CAP_IPC_LOCK)"))
	} else if soft, _, err := h.Limit(Memlock); err != nil {
		findings = append(findings, unseen("the limit of locked memory", err))
	} else if soft < o.Buffers {
		findings = append(findings, warning(fmt.Sprintf("locked memory is limited to %s, less than the %s of buffers of one reactor: they are not registered with io_uring, and every request costs more",
			sizeOf(soft), sizeOf(o.Buffers)), "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit"))
	} else {
		findings = append(findings, ok("locked memory suffices for the buffers"))
	}
	switch _, hard, err := h.Limit(Nofile); { // the daemon raises the soft one
	case err != nil:
		findings = append(findings, unseen("the limit of open files", err))
	case hard < nofileMin:
		findings = append(findings, warning(fmt.Sprintf("only %d open files are allowed", hard), fmt.Sprintf("ulimit -Hn %d, or LimitNOFILE=1048576 in the unit", nofileGood)))
	case hard < nofileGood:
		findings = append(findings, note(fmt.Sprintf("%d open files are allowed, which is little for hundreds of volumes", hard), fmt.Sprintf("ulimit -Hn %d, or LimitNOFILE=1048576 in the unit", nofileGood)))
	default:
		findings = append(findings, ok("open files are not limited to less than is of use"))
	}
	if n, at := h.cgroupLeast("pids.max"); at != "" && n < pidsMin {
		findings = append(findings, warning(fmt.Sprintf("the cgroup %s allows %d threads", at, n), fmt.Sprintf("TasksMax=%d in the unit", 16*pidsMin)))
	}
	return findings
}

const cgroupRoot = "/sys/fs/cgroup"

// cgroups are the directories of this process's cgroup (version 2) and of those above,
// the innermost first.
func (h *Host) cgroups() []string {
	for line := range strings.Lines(h.text("/proc/self/cgroup")) {
		if own, found := strings.CutPrefix(strings.TrimSpace(line), "0::"); found {
			var dirs []string
			for dir := path.Clean("/" + own); ; dir = path.Dir(dir) {
				dirs = append(dirs, path.Join(cgroupRoot, dir))
				if dir == "/" {
					return dirs
				}
			}
		}
	}
	return nil
}

// cgroupLeast is the least value of a limit in this cgroup and those above, and whose
// it is; "" when none has one.
func (h *Host) cgroupLeast(file string) (least uint64, at string) {
	for _, dir := range h.cgroups() {
		if n, found := h.number(dir + "/" + file); found && (at == "" || n < least) { // "max" is no number
			least, at = n, cgroupName(dir)
		}
	}
	return least, at
}

func cgroupName(dir string) string { return cmp.Or(strings.TrimPrefix(dir, cgroupRoot), "/") }

const memoryMin = 256 << 20 // the daemon, the buffers of a reactor, the caches of a pool

func checkCgroup(h *Host, o *Options) []Finding {
	if len(h.cgroups()) == 0 || !h.exists(cgroupRoot+"/cgroup.controllers") {
		return []Finding{note("no cgroup version 2 is mounted on "+cgroupRoot+": limits of memory and CPU could not be looked at", "")}
	}
	var findings []Finding
	if n, at := h.cgroupLeast("memory.max"); at != "" && n < memoryMin+o.Buffers {
		findings = append(findings, warning(fmt.Sprintf("the cgroup %s is limited to %s of memory", at, sizeOf(n)), fmt.Sprintf("MemoryMax=%d in the unit, or more memory for the container", 2*(memoryMin+o.Buffers))))
	}
	for _, dir := range h.cgroups() {
		quota, period, found := strings.Cut(h.text(dir+"/cpu.max"), " ")
		q, err := strconv.ParseFloat(quota, 64)
		p, err2 := strconv.ParseFloat(period, 64)
		if !found || err != nil || err2 != nil || p <= 0 { // max: no limit
			continue
		}
		if cpus := q / p; cpus < 2 {
			findings = append(findings, warning(fmt.Sprintf("the cgroup %s is limited to %.2g CPUs: a reactor that has used them up stands still for the rest of each %.0f ms",
				cgroupName(dir), cpus, p/1000), "CPUQuota= in the unit, or no CPU limit for the container (a request instead), or --poll off"))
		}
	}
	if len(findings) == 0 {
		return []Finding{ok("no cgroup limits memory or CPU to less than is of use")}
	}
	return findings
}

// sizeOf prints bytes in the largest unit below them.
func sizeOf(bytes uint64) string {
	if bytes == Unlimited {
		return "unlimited"
	}
	v, unit := float64(bytes), 0
	names := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for v >= 1024 && unit < len(names)-1 {
		v /= 1024
		unit++
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + names[unit]
}
