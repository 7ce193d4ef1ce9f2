package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/mount-utils"
	"k8s.io/utils/exec"
)

// host is what the driver does on its node: mounts, filesystems, LUKS.
type host struct {
	mounter mount.Interface
	format  *mount.SafeFormatAndMount
	grow    *mount.ResizeFs
	command Command
	log     *slog.Logger
	mapper  string // directory of device-mapper's devices
	table   string // the kernel's table of mounts

	turns chan struct{} // bounds runs of cryptsetup that take luksMemory
}

func newHost(m mount.Interface, c Command, log *slog.Logger) *host {
	return &host{
		mounter: m, format: mount.NewSafeFormatAndMount(m, exec.New()), grow: mount.NewResizeFs(exec.New()),
		command: c, log: log, mapper: mapperDir, table: "/proc/self/mountinfo",
		turns: make(chan struct{}, luksAtOnce),
	}
}

// device is the number of a block device.
type device uint64

func makeDevice(major, minor int) device { return device(unix.Mkdev(uint32(major), uint32(minor))) }

// deviceNumber gives the number of the block device at a path.
func deviceNumber(path string) (device, error) {
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return 0, fmt.Errorf("device %s: %w", path, err)
	}
	if s.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("device %s: is no block device", path)
	}
	return device(s.Rdev), nil
}

// mounted is one mount: of the filesystem on a device, of the node of a device, or
// of something without a device, which has a number that no block device has.
type mounted struct {
	path     string
	device   device
	block    bool // it is the device's node
	readOnly bool
}

// mounts lists all mounts, in the order of the kernel's table.
func (h *host) mounts() ([]mounted, error) {
	table, err := mount.ParseMountInfo(h.table)
	if err != nil {
		return nil, fmt.Errorf("mounts: %w", err)
	}
	var list []mounted
	for _, m := range table {
		x := mounted{path: m.MountPoint, device: makeDevice(m.Major, m.Minor), readOnly: slices.Contains(m.MountOptions, "ro")}
		if m.Root != "/" && (m.FsType == "devtmpfs" || m.FsType == "tmpfs") {
			if n, err := deviceNumber(m.MountPoint); err == nil {
				x.device, x.block = n, true
			}
		}
		list = append(list, x)
	}
	return list, nil
}

// mountsOf lists the mounts of devices.
func (h *host) mountsOf(devices ...device) ([]mounted, error) {
	list, err := h.mounts()
	return slices.DeleteFunc(list, func(m mounted) bool { return !slices.Contains(devices, m.device) }), err
}

// mountAt gives what is mounted at a path, last; nil for nothing.
func (h *host) mountAt(path string) (*mounted, error) {
	list, err := h.mounts()
	if err != nil {
		return nil, err
	}
	path = resolved(path)
	for _, m := range slices.Backward(list) {
		if m.path == path {
			return &m, nil
		}
	}
	return nil, nil
}

// resolved is a path as the kernel's table has it: without symbolic links.
func resolved(path string) string {
	path = filepath.Clean(path)
	if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		return filepath.Join(dir, filepath.Base(path))
	}
	return path
}

// unmountsMax bounds how often one path is unmounted: mounts may lie on each other.
const unmountsMax = 16

// unmount takes away all that is mounted at a path.
func (h *host) unmount(path string) error {
	for range unmountsMax {
		m, err := h.mountAt(path)
		if err != nil {
			return err
		}
		if m == nil {
			return nil
		}
		if err := h.mounter.Unmount(path); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return fmt.Errorf("unmount %s: something is mounted there again and again", path)
}

// remove removes a mount point that nothing is mounted on. A folder must be empty:
// never what a pod wrote beside a mount that failed.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// bind mounts source on target, which is made if it is not there and removed if it
// cannot be mounted.
func (h *host) bind(source, target string, block bool, options []string) (err error) {
	if block {
		err = os.MkdirAll(filepath.Dir(target), 0o750)
		if err == nil {
			var f *os.File
			if f, err = os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o640); err == nil {
				_ = f.Close() // nothing was written
			}
		}
	} else {
		err = os.MkdirAll(target, 0o750)
	}
	if err != nil {
		return err
	}
	if err := h.mounter.Mount(source, target, "", append([]string{"bind"}, options...)); err != nil {
		_ = h.unmount(target) // a bind mount that could not be made read-only
		_ = remove(target)    // empty, and the error is told
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	return nil
}

// exitCorrected is the exit code of e2fsck when it has mended something.
const exitCorrected = 1

// growUnmounted has an ext4 that is not mounted be as large as its device.
func (h *host) growUnmounted(ctx context.Context, path string) error {
	_, err := h.command(ctx, nil, "e2fsck", "-f", "-p", path)
	var exit *osexec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == exitCorrected) {
		return err
	}
	_, err = h.command(ctx, nil, "resize2fs", path)
	return err
}

// growMounted has a mounted filesystem be as large as its device.
func (h *host) growMounted(device, path string) error {
	_, err := h.grow.Resize(device, path)
	if err != nil && strings.Contains(err.Error(), "Permission denied to resize") {
		return status.Errorf(codes.FailedPrecondition, "the filesystem on %s cannot grow while it is mounted, since the driver has no CAP_SYS_RESOURCE: it grows when the volume is staged the next time, so start the pod again", device)
	}
	return err
}

// under says whether a path is in a directory.
func under(path, dir string) bool {
	return dir != "" && strings.HasPrefix(path, strings.TrimSuffix(resolved(dir), "/")+"/")
}
