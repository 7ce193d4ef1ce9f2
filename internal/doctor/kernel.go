package doctor

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/ashlar-storage/ashlar/nbd/attach"
	"github.com/ashlar-storage/ashlar/ublk"
)

// versionOf reads the two numbers that a release begins with.
func versionOf(release string) (major, minor int, ok bool) {
	a, rest, found := strings.Cut(release, ".")
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	major, err := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(digits)
	return major, minor, found && err == nil && err2 == nil
}

func checkKernel(h *Host, _ *Options) []Finding {
	release, machine, err := h.Release()
	if err != nil {
		return []Finding{unseen("the kernel's release", err)}
	}
	text := fmt.Sprintf("Linux %s on %s", release, machine)
	major, minor, known := versionOf(release)
	switch {
	case !known:
		return []Finding{note(text+": a release that is no number", "")}
	case major < 5 || major == 5 && minor < 11:
		return []Finding{warning(text+" is too old for io_uring as Ashlar uses it (Linux 5.11) and for ublk (6.0)", "boot a newer kernel")}
	case major < 6:
		return []Finding{ok(text + "; ublk needs 6.0")}
	}
	return []Finding{ok(text)}
}

func checkIOURing(h *Host, _ *Options) []Finding {
	err := h.Ring()
	if err == nil {
		return []Finding{ok("io_uring works for this user")}
	}
	text := "io_uring cannot be used, so requests go through epoll and worker threads, which is slower, and there is no ublk: " + reason(err)
	switch disabled := h.text("/proc/sys/kernel/io_uring_disabled"); disabled {
	case "1":
		return []Finding{warning("io_uring is for privileged processes only (kernel.io_uring_disabled = 1); for others, requests go through epoll and worker threads, which is slower", "sysctl -w kernel.io_uring_disabled=0")}
	case "2":
		return []Finding{warning("io_uring is turned off (kernel.io_uring_disabled = 2), so requests go through epoll and worker threads, which is slower, and there is no ublk", "sysctl -w kernel.io_uring_disabled=0")}
	}
	return []Finding{warning(text, "allow io_uring_setup in the container's seccomp profile, or use Linux 5.11 or later")}
}

// driver is a finding about a driver that is missing.
func (h *Host) driver(module, option, text string) Finding {
	if h.module(module) {
		return note(fmt.Sprintf("%s: the module %s is there and not loaded", text, module), "modprobe "+module)
	}
	return note(fmt.Sprintf("%s: this kernel has no module %s", text, module), "use a kernel with "+option+", if you want it")
}

func checkUblk(h *Host, _ *Options) []Finding {
	err := h.Ublk()
	var bad *ublk.KernelError
	switch {
	case err == nil:
		return []Finding{ok("ublk devices can be made, the fastest way to a block device")}
	case errors.As(err, &bad):
		return []Finding{warning(fmt.Sprintf("ublk is not used on Linux %s, which is known to break on it (%s)", bad.Release, strings.Join(bad.Sources, ", ")), "boot a kernel without the fault; `ashlar attach` goes through nbd meanwhile")}
	case denied(err):
		return []Finding{unseen("ublk", err)}
	case errors.Is(err, ublk.ErrUnsupported) && !h.exists("/dev/ublk-control"):
		return []Finding{h.driver("ublk_drv", "CONFIG_BLK_DEV_UBLK (Linux 6.0)", "no ublk devices")}
	}
	return []Finding{note("no ublk devices: "+reason(err), "")}
}

func checkNBD(h *Host, _ *Options) []Finding {
	err := h.NBD()
	switch {
	case err == nil && h.before(5, 14):
		return []Finding{note("the kernel's nbd driver is there; on this kernel its devices do not outlive the daemon", "boot Linux 5.14 or later, if you want to use it")}
	case err == nil:
		return []Finding{ok("the kernel's nbd driver is there")}
	case denied(err):
		return []Finding{unseen("the nbd driver", err)}
	case errors.Is(err, attach.ErrNoDriver):
		return []Finding{h.driver("nbd", "CONFIG_BLK_DEV_NBD", "no nbd devices")}
	}
	return []Finding{note("no nbd devices: "+reason(err), "")}
}

// checkFuse looks at the way that is left, and says so when there is none.
func checkFuse(h *Host, _ *Options) []Finding {
	var findings []Finding
	fuse, loop := h.exists("/dev/fuse"), h.exists("/dev/loop-control")
	switch {
	case fuse && loop && h.before(6, 9):
		findings = append(findings, note("FUSE and loop devices are there, for hosts with neither ublk nor nbd; on this kernel they fail when the daemon is killed", "boot Linux 6.9 or later, if you want to use them"))
	case fuse && loop:
		findings = append(findings, ok("FUSE and loop devices are there, for hosts with neither ublk nor nbd"))
	}
	if !fuse {
		findings = append(findings, h.driver("fuse", "CONFIG_FUSE_FS", "no devices through FUSE"))
	}
	if !loop {
		findings = append(findings, h.driver("loop", "CONFIG_BLK_DEV_LOOP", "no loop devices"))
	}
	if h.Ublk() != nil && h.NBD() != nil && !(fuse && loop) {
		findings = append(findings, warning("`ashlar attach` has no way to make a block device here; NBD clients elsewhere are served all the same", h.anyDriver()))
	}
	return findings
}

// anyDriver is how to get a way to make block devices: the best that there is a module
// for.
func (h *Host) anyDriver() string {
	for _, name := range []string{"ublk_drv", "nbd"} {
		if h.module(name) {
			return "modprobe " + name
		}
	}
	if h.module("fuse") && h.module("loop") {
		return "modprobe -a fuse loop"
	}
	return "use a kernel with CONFIG_BLK_DEV_UBLK (Linux 6.0) or CONFIG_BLK_DEV_NBD"
}

// before says whether the kernel is known to be older than a release.
func (h *Host) before(major, minor int) bool {
	release, _, err := h.Release()
	if err != nil {
		return false
	}
	a, b, known := versionOf(release)
	return known && (a < major || a == major && b < minor)
}

// checkObservation looks at what eBPF needs, beside rights.
func checkObservation(h *Host, _ *Options) []Finding {
	var findings []Finding
	if h.exists("/sys/kernel/btf/vmlinux") {
		findings = append(findings, ok("the kernel describes its types (BTF), so that disks and reactors can be observed"))
	} else {
		findings = append(findings, warning("the kernel does not describe its types (BTF): disks and reactors are not observed, and `ashlar why` cannot tell a disk's queue from its service", "use a kernel with CONFIG_DEBUG_INFO_BTF"))
	}
	return findings
}
