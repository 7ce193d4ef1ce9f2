package powerfail

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	diskSize   = 512 << 20
	volumeSize = "320MiB" // xfs wants 300 MiB
	diskPath   = "/dev/mapper/disk"
	mountPoint = "mnt"

	deviceLimit = 20 * time.Second // until the kernel has let go of a device
)

// run runs a program of the system.
func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// machine is the guest: a pool's disk made of device-mapper, a node on it, a file
// system on a volume.
type machine struct {
	t   *testing.T
	dir string // a tmpfs
	fs  string
	*node
}

func newMachine(t *testing.T, fs string) *machine {
	t.Helper()
	m := &machine{t: t, dir: "/run/powerfail", fs: fs}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m.must(unix.Mount("powerfail", m.dir, "tmpfs", 0, "size=90%"))
	m.must(os.Mkdir(m.in(mountPoint), 0o700))
	m.must(os.Setenv("DM_DISABLE_UDEV", "1")) // dmsetup makes the nodes itself
	binary := m.in("ashlar")                  // a copy: the original may be built anew
	m.must(run("cp", requireBinary(t), binary))
	m.node = newNode(t, binary, m.dir, "--log-level", "warn")
	m.limit = guestLimit
	m.reboot()
	return m
}

func (m *machine) in(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// loop makes a sparse file, and a device of it.
func (m *machine) loop(number int, size int64) (device, file string) {
	m.t.Helper()
	device, file = fmt.Sprintf("/dev/loop%d", number), m.in(fmt.Sprintf("loop%d", number))
	m.must(os.WriteFile(file, nil, 0o600))
	m.must(os.Truncate(file, size))
	m.must(run("losetup", device, file))
	return device, file
}

// table is a device-mapper table of one target over the whole disk.
func table(target string, args ...string) string {
	return fmt.Sprintf("0 %d %s %s", diskSize/512, target, strings.Join(args, " "))
}

// remove takes the disk away; who had it may only just have died.
func (m *machine) remove() {
	m.t.Helper()
	m.within("the disk is in use", func() error { return run("dmsetup", "remove", "disk") })
}

func (m *machine) within(what string, try func() error) {
	m.t.Helper()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Since(begun) > deviceLimit {
			m.t.Fatalf("%s: %v", what, err)
		}
	}
}

// reboot gives the machine another boot id, as it has after its power was lost.
func (m *machine) reboot() {
	m.t.Helper()
	const id = "/proc/sys/kernel/random/boot_id"
	_ = unix.Unmount(id, unix.MNT_DETACH) // not the first time
	fresh, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	m.must(err)
	m.must(os.WriteFile(m.in("boot_id"), fresh, 0o600))
	m.must(unix.Mount(m.in("boot_id"), id, "", unix.MS_BIND, ""))
}

// attach makes an export the kernel's device.
func (m *machine) attach(export, device string) error {
	if err := run("nbd-client", "-unix", m.path("nbd"), "-name", export, device, "-connections", "2"); err != nil {
		return err
	}
	m.within(device+" has no size", func() error {
		text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "size"))
		if err == nil && strings.TrimSpace(string(text)) == "0" {
			err = errors.New("0 sectors")
		}
		return err
	})
	return nil
}

func (m *machine) detach(device string) {
	m.t.Helper()
	m.disconnect(device)
	m.detached(device)
}

// disconnect ends the requests of a device whose server may be dead. The device
// stays for as long as somebody has it open.
func (m *machine) disconnect(device string) {
	m.t.Helper()
	m.must(run("nbd-client", "-d", device))
}

// detached waits until nobody has a device that was disconnected.
func (m *machine) detached(device string) {
	m.t.Helper()
	m.within(device+" is still connected", func() error {
		if _, err := os.Stat(filepath.Join("/sys/block", filepath.Base(device), "pid")); err == nil {
			return errors.New("it has a pid")
		}
		return nil
	})
}

// create makes the pool, the volume and the file system, and mounts it.
func (m *machine) create() {
	m.t.Helper()
	m.start()
	m.node.run("pool", "create", "tank", diskPath)
	m.node.run("volume", "create", "data", "--size", volumeSize)
	m.must(m.attach("data", "/dev/nbd0"))
	switch m.fs {
	case "ext4":
		m.must(run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "/dev/nbd0"))
	case "xfs":
		m.must(run("mkfs.xfs", "-q", "-f", "/dev/nbd0"))
	default:
		m.t.Fatalf("no file system %q", m.fs)
	}
	m.mount()
}

func (m *machine) mount() {
	m.t.Helper()
	if err := unix.Mount("/dev/nbd0", m.in(mountPoint), m.fs, 0, ""); err != nil {
		m.t.Fatalf("mount: %v", err)
	}
}

func (m *machine) unmount() {
	m.t.Helper()
	m.within("unmount", func() error { return unix.Unmount(m.in(mountPoint), 0) })
}

// fsck wants the file system to be clean; its journal was replayed by a mount.
func (m *machine) fsck() error {
	if m.fs == "ext4" {
		return run("e2fsck", "-fn", "/dev/nbd0")
	}
	return run("xfs_repair", "-n", "/dev/nbd0")
}

// frozen runs act while the file system is frozen.
func (m *machine) frozen(act func() error) error {
	if err := run("fsfreeze", "--freeze", m.in(mountPoint)); err != nil {
		return err
	}
	return errors.Join(act(), run("fsfreeze", "--unfreeze", m.in(mountPoint)))
}

// snapshot compares a snapshot, taken while the file system was frozen, with what
// the files were after a step.
func (m *machine) snapshot(name string, h *history, dir string, step int) error {
	const device = "/dev/nbd1"
	if err := m.attach("data@"+name, device); err != nil {
		return err
	}
	options := "noload"
	if m.fs == "xfs" {
		options = "norecovery,nouuid"
	}
	err := unix.Mount(device, m.in(mountPoint), m.fs, unix.MS_RDONLY, options)
	if err == nil {
		err = h.check(m.in(filepath.Join(mountPoint, dir)), step, step)
		m.unmount()
	}
	m.detach(device)
	return err
}
