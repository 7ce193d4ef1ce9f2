package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// lvmThin is a thin volume of LVM: the kernel's device mapper serves it, there is no
// process. It needs root, dm-thin-pool, and LVM 2.03.12 or later.
//
// The physical volume is a file of the Stage, fully written like the pool's, behind a
// loop device with direct I/O, or a block device. On it are a volume group, a thin
// pool, and one thin volume, written from one end to the other. Nothing of it is
// active between two runs; each activates it and takes it away again.
type lvmThin struct{ on machine }

const (
	// lvmFile is the physical volume in the directory of a Stage, or a symbolic link
	// to it. What a killed run leaves is known by this name.
	lvmFile = "ashlar-lvm.img"

	lvmGroup = "ashlar_bench_" // and random digits: device mapper's names are the host's
	lvmPool  = "pool"
	lvmRun   = "run" // a volume for one run

	// lvmChunk is what a pool's volume maps at once, too, so both allocate as often.
	// It is twice LVM's default for pools of this size, which allocates more often.
	lvmChunk = clusterBytes

	// lvmFileFactor is the size of the file in volumes: one mapped, one for a run, and
	// half a one to spare in the thin pool; the rest, 32 MiB at least, is for LVM's
	// metadata.
	lvmFileFactor = 3
)

// lvmConfig has LVM start no daemon that watches its pool, leave no copy of its metadata
// in /etc/lvm, and make pools whose writers fail when they are full, else they wait for a
// minute.
const lvmConfig = "activation{monitoring=0 error_when_full=1} backup{backup=0 archive=0}"

const lvmPackages = "lvm2 thin-provisioning-tools"

func (lvmThin) Name() string { return "lvm-thin" }
func (lvmThin) About() string {
	return "a thin volume of LVM, chunks of 128 KiB, not zeroed, on a loop device with direct I/O, or a block device; no server: fio on it with io_uring"
}
func (lvmThin) Program() (string, string) { return "lvm", lvmPackages }
func (lvmThin) VersionArgs() []string     { return []string{"version"} }
func (lvmThin) staged()                   {}

func (l lvmThin) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingPool {
		return Plan{}, unsupported(l, s.Backing)
	}
	plan := Plan{
		// A symbolic link: what the device will be called is not known yet.
		Target: Target{Engine: "io_uring", Path: filepath.Join(s.Dir, "volume")},
		Kernel: func(ctx context.Context) (kernelTarget, error) {
			v, err := l.start(ctx, s)
			if err != nil {
				return nil, fmt.Errorf("lvm-thin: %w", err)
			}
			return v, nil
		},
	}
	if s.Volume == VolumeFilled {
		plan.Setup = [][]string{fillArgs(plan.Target, filledPercent)}
	}
	return plan, nil
}

// machine is what LVM is asked to work on; tests have one of their own.
type machine struct {
	root  string // of /proc, /sys and /dev
	uid   int
	order func(ctx context.Context, argv []string) (output []byte, err error)

	detachMax time.Duration // for a loop device to go
}

// thisMachine is this host. A command begun is finished: one killed half way may leave a
// device suspended.
var thisMachine = machine{root: "/", uid: os.Getuid(), order: outputWhole, detachMax: detachMax}

// lvm runs a command of LVM that sees one device, and no other of the host.
func (m machine) lvm(ctx context.Context, device, command string, words ...string) (string, error) {
	output, err := m.mapping(ctx, lvmArgs(device, command, words...))
	return strings.TrimSpace(string(output)), err
}

func lvmArgs(device, command string, words ...string) []string {
	return append([]string{"lvm", command, "--devices", device, "--config", lvmConfig}, words...)
}

// mapping runs a command that changes device mapper's devices. Where no udev runs, as in a
// small guest, it makes and removes their nodes itself; else it would wait for, or
// trust in, somebody who does not come.
func (m machine) mapping(ctx context.Context, argv []string) ([]byte, error) {
	if _, err := os.Stat(filepath.Join(m.root, "run/udev/control")); err != nil {
		argv = append([]string{"env", "DM_DISABLE_UDEV=1"}, argv...)
	}
	return m.order(ctx, argv)
}

// available changes nothing: modules are not loaded yet, only looked for.
func (l lvmThin) available() error {
	ctx := context.Background()
	devices, err := os.ReadFile(filepath.Join(l.on.root, "proc/devices"))
	if err != nil {
		return fmt.Errorf("lvm-thin: whether the kernel has a device mapper cannot be read: %w", err)
	}
	_, err = l.on.order(ctx, []string{"modprobe", "--dry-run", "--quiet", "dm_thin_pool"})
	loadable := err == nil
	mapper := hasDeviceMapper(string(devices))
	if !mapper && !loadable {
		return errors.New("lvm-thin: this kernel has no device mapper (no device-mapper in /proc/devices)")
	}
	if l.on.uid != 0 {
		return errors.New("lvm-thin: a loop device and a volume group need root; run it with sudo")
	}
	if !kernelSeen(filepath.Join(l.on.root, "proc")) {
		return errors.New("lvm-thin: the kernel's threads are not to be seen here, so their CPU time cannot be counted; run it outside of a container")
	}
	if err := lookProgram("dmsetup", "dmsetup"); mapper && !loadable && err == nil {
		if err := l.hasThinTarget(ctx); err != nil {
			return err
		}
	}
	if _, err := l.on.order(ctx, []string{"losetup", "--find"}); err != nil {
		return fmt.Errorf("lvm-thin: %w", noLoop(err))
	}
	return nil
}

// hasDeviceMapper looks for dm's line in the text of /proc/devices.
func hasDeviceMapper(devices string) bool {
	for _, line := range strings.Split(devices, "\n") {
		if fields := strings.Fields(line); len(fields) == 2 && fields[1] == "device-mapper" {
			return true
		}
	}
	return false
}

// hasThinTarget asks the device mapper for its thin pools. The names of all targets
// begin a line.
func (l lvmThin) hasThinTarget(ctx context.Context) error {
	output, err := l.on.order(ctx, []string{"dmsetup", "targets"})
	if err != nil {
		return fmt.Errorf("lvm-thin: the device mapper's targets cannot be read: %w", err)
	}
	for _, line := range strings.Split(string(output), "\n") {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "thin-pool" {
			return nil
		}
	}
	return errors.New("lvm-thin: this kernel's device mapper has no thin pools (no thin-pool in `dmsetup targets`, and no module dm_thin_pool)")
}

// noLoop says what to do when losetup found no device; any other error stays.
func noLoop(err error) error {
	if strings.Contains(err.Error(), "find an unused loop device") {
		return fmt.Errorf("no loop device is free; load the module loop, or detach one of those that `losetup --list` shows: %w", err)
	}
	return err
}

// prepare makes the physical volume in a Stage, and on it the group, the thin pool and
// the mapped volume, which is left empty. Nothing is active when it returns.
func (l lvmThin) prepare(ctx context.Context, s *Stage) (err error) {
	if err := l.available(); err != nil {
		return err
	}
	if err := lookProgram("thin_check", lvmPackages); err != nil {
		return err
	}
	if _, err := l.on.order(ctx, []string{"modprobe", "--quiet", "dm_thin_pool"}); err != nil {
		if err := l.hasThinTarget(ctx); err != nil { // else it is built in
			return err
		}
	}
	if err := l.on.sweep(ctx, s.say); err != nil {
		return fmt.Errorf("lvm-thin: %w", err)
	}
	path := filepath.Join(s.Dir, lvmFile)
	if s.LVMDevice != "" {
		if err := l.take(ctx, s.LVMDevice, path); err != nil {
			return fmt.Errorf("lvm-thin: %w", err)
		}
	} else if err := fillFile(path, lvmFileFactor*s.Size); err != nil {
		return err
	}
	v, err := l.on.attach(ctx, s.Dir)
	if err == nil {
		err = errors.Join(v.format(ctx, s.Size), v.Stop())
	}
	if err != nil {
		return fmt.Errorf("lvm-thin: %w", err)
	}
	return nil
}

// take makes path a symbolic link to a block device that nobody uses. That LVM may
// overwrite it has been agreed to; one that belongs to another volume group pvcreate
// refuses all the same.
func (l lvmThin) take(ctx context.Context, device, path string) error {
	info, err := os.Stat(device)
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0 {
		return fmt.Errorf("%s is not a block device", device)
	}
	if group, err := l.on.groupOf(ctx, device); err == nil {
		return fmt.Errorf("%s still has the volume group %s of a run that was killed; when no other runs, remove it: vgremove --yes %s && pvremove %s", device, group, group, device)
	}
	device, err = filepath.Abs(device)
	if err != nil {
		return err
	}
	return os.Symlink(device, path)
}

// giveBack takes the group off a block device that is a Stage's physical volume.
func (l lvmThin) giveBack(ctx context.Context, s *Stage) error {
	if s.LVMDevice == "" {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(s.Dir, lvmFile)); err != nil {
		return nil // it was not taken
	}
	group, err := l.on.groupOf(ctx, s.LVMDevice)
	if err != nil {
		return nil // no group was made
	}
	if _, err = l.on.lvm(ctx, s.LVMDevice, "vgremove", "--yes", group); err == nil {
		_, err = l.on.lvm(ctx, s.LVMDevice, "pvremove", "--yes", s.LVMDevice)
	}
	if err != nil {
		return fmt.Errorf("lvm-thin: %s keeps the volume group %s: %w", s.LVMDevice, group, err)
	}
	return nil
}

// groupOf asks for the group of a physical volume; one that is not a rig's is an error.
func (m machine) groupOf(ctx context.Context, device string) (string, error) {
	group, err := m.lvm(ctx, device, "pvs", "--noheadings", "--options", "vg_name", device)
	if err == nil && !strings.HasPrefix(group, lvmGroup) {
		err = fmt.Errorf("%s has no volume group of a benchmark, but %q", device, group)
	}
	return group, err
}

// bytesOf is how LVM takes a number of bytes.
func bytesOf(n uint64) string { return strconv.FormatUint(n, 10) + "b" }
