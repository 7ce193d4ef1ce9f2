package fuse

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	loopControl = "/dev/loop-control"
	loopMajor   = 7
	loopMark    = "ashlar:" // begins the name that a loop device of ours carries
	loopTries   = 64        // others may take the free device first
	clearWait   = 10 * time.Second
	claimWait   = time.Second

	loopReadOnly = 1 << 0 // LO_FLAGS_*
	loopDirectIO = 1 << 4
)

// hash stands for a name that is too long.
func hash(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:8])
}

// loopName is what a loop device of ours carries (lo_file_name, 63 bytes): the name of
// the device, or its end and its hash. It is found without the mount, which may be in
// another mount namespace.
func loopName(name string) string {
	const most = 63 - len(loopMark)
	if len(name) <= most {
		return loopMark + name
	}
	return loopMark + "~" + name[len(name)-(most-18):] + "~" + hash(name)
}

// loop is a loop device of ours.
type loop struct {
	number     int
	carried    string // loopName
	backing    string // path of the file, as sysfs tells it
	connection uint32
	readOnly   bool
}

// loops are the loop devices of ours. One on a mount that is seen here is known by its
// path; others are looked at, which costs more: the last who closes a block device has
// the kernel write back and drop its cache.
func loops(seen []mounted) (list []loop, err error) {
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file") // those without a file have none
	if err != nil {
		return nil, fmt.Errorf("fuse: %w", err)
	}
	at := make(map[string]*mounted, len(seen))
	for i := range seen {
		at[seen[i].file] = &seen[i] // the last is above the others
	}
	byPath := map[string]int{} // in list
	for _, name := range names {
		number, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(filepath.Dir(name))), "loop"))
		if err != nil {
			continue
		}
		backing := text(name)
		m := at[backing]
		if other, twice := byPath[backing]; twice { // in another mount namespace there may be the same path
			if l, ok := look(list[other].number); ok {
				list[other].carried, list[other].connection = l.carried, l.connection
			}
			m = nil
		}
		l := loop{number: number}
		if m != nil {
			byPath[backing] = len(list)
			l.carried, l.connection = loopName(m.name), m.connection
			l.readOnly = text(fmt.Sprintf("/sys/block/loop%d/ro", number)) == "1"
		} else {
			var ok bool
			if l, ok = look(number); !ok {
				continue
			}
		}
		l.backing = backing
		list = append(list, l)
	}
	slices.SortFunc(list, func(a, b loop) int { return a.number - b.number })
	return list, nil
}

// look describes a loop device if it is ours.
func look(number int) (l loop, ok bool) {
	fd, err := openLoop(number, unix.O_RDONLY)
	if err != nil {
		return l, false // not configured any more, or no node and no right to make one
	}
	defer func() { _ = unix.Close(fd) }() // nothing is written
	status, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return l, false // not configured any more
	}
	l = loop{number: number, carried: unix.ByteSliceToString(status.File_name[:]), readOnly: status.Flags&loopReadOnly != 0}
	l.connection = unix.Minor(uint64(status.Device))
	return l, strings.HasPrefix(l.carried, loopMark)
}

// text reads a file of sysfs; "" is one that is not there.
func text(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// openLoop opens a loop device, and makes its node where no udev does.
func openLoop(number int, flags int) (int, error) {
	path := loopPath(number)
	want := unix.Mkdev(loopMajor, uint32(number))
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		if err = unix.Mknod(path, unix.S_IFBLK|0o600, int(want)); err == nil || errors.Is(err, unix.EEXIST) {
			err = unix.Stat(path, &st)
		}
	}
	if err != nil {
		return -1, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != want {
		return -1, fmt.Errorf("%s is not block device %d:%d (remove it and run: mknod %[1]s b %[2]d %[3]d)", path, loopMajor, number)
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// openControl opens the loop driver's control device.
func openControl() (int, error) {
	fd, err := unix.Open(loopControl, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("%w: no %s (run: modprobe loop)", ErrUnsupported, loopControl)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("fuse: open %s: %w (needs root; in a container, the device)", loopControl, err)
	}
	return -1, fmt.Errorf("fuse: open %s: %w", loopControl, err)
}

// attachLoop makes a loop device of a file. number is the one to use, or AnyLoop.
//
// Errors: ErrInUse for a number that is taken.
func attachLoop(file, carried string, number int, block uint32, readOnly bool) (int, error) {
	mode := unix.O_RDWR
	if readOnly {
		mode = unix.O_RDONLY
	}
	fd, err := unix.Open(file, mode|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return AnyLoop, fmt.Errorf("fuse: open %s: %w", file, err)
	}
	defer func() { _ = unix.Close(fd) }() // the driver has it
	// The driver takes the size the kernel knows, and it knows none yet.
	if err := askSize(fd); err != nil {
		return AnyLoop, fmt.Errorf("fuse: size of %s: %w", file, err)
	}
	askPoll(fd)
	control, err := openControl()
	if err != nil {
		return AnyLoop, err
	}
	defer func() { _ = unix.Close(control) }() // nothing is written
	config := unix.LoopConfig{Fd: uint32(fd), Size: block}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], carried)
	config.Info.Flags = loopDirectIO
	if readOnly {
		config.Info.Flags |= loopReadOnly
	}
	for try := 0; ; try++ {
		n := number
		if n == AnyLoop {
			if n, err = unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE); err != nil {
				return AnyLoop, fmt.Errorf("fuse: no free loop device: %w", err)
			}
		} else if err := unix.IoctlSetInt(control, unix.LOOP_CTL_ADD, n); err != nil && !errors.Is(err, unix.EEXIST) {
			return AnyLoop, fmt.Errorf("fuse: add %s: %w", loopPath(n), err)
		}
		err = configure(n, &config)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EBUSY) && number != AnyLoop:
			return AnyLoop, fmt.Errorf("%w: %s is another's", ErrInUse, loopPath(n))
		case errors.Is(err, unix.EBUSY) && try < loopTries:
			continue
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY):
			return AnyLoop, fmt.Errorf("%w: LOOP_CONFIGURE of %s: %w (needs Linux 5.8)", ErrUnsupported, loopPath(n), err)
		}
		return AnyLoop, fmt.Errorf("fuse: configure %s: %w", loopPath(n), err)
	}
}

// askSize has the kernel ask the server for a file's size.
func askSize(fd int) error {
	var st unix.Statx_t
	return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_SIZE, &st)
}

// askPoll has the kernel ask the server once whether the file can be polled, and hear that
// it cannot, after which it never asks again. Go polls every file it opens, within the
// runtime and with the runtime's own epoll: a program that opens the file of a mount that
// it serves itself would hold up the very reactor that has to answer.
func askPoll(fd int) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0) // the question is all that matters
}

func configure(number int, config *unix.LoopConfig) error {
	fd, err := openLoop(number, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }() // nothing is written
	return unix.IoctlLoopConfigure(fd, config)
}

// resizeLoop has the loop driver look at a file's size again.
func resizeLoop(number int, file string) error {
	path, err := unix.Open(file, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("fuse: open %s: %w", file, err)
	}
	err = askSize(path)
	_ = unix.Close(path) // nothing is written
	if err != nil {
		return fmt.Errorf("fuse: size of %s: %w", file, err)
	}
	fd, err := openLoop(number, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	defer func() { _ = unix.Close(fd) }() // nothing is written
	if err := unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("fuse: new size of %s: %w", loopPath(number), err)
	}
	return nil
}

// detachLoop frees a loop device that nobody uses. The driver writes back what is
// cached before it lets go.
//
// Errors: ErrInUse; ctx's, when the store does not take what is written.
func detachLoop(ctx context.Context, l *loop) error {
	done := make(chan error, 1)
	go func() { done <- clearLoop(l) }() // ends with the server's answers: system calls that nothing else ends
	select {
	case err := <-done:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return fmt.Errorf("fuse: %s: its store does not take what is written: %w", loopPath(l.number), ctx.Err())
	}
	backing := fmt.Sprintf("/sys/block/loop%d/loop/backing_file", l.number)
	for deadline := time.Now().Add(clearWait); l.backing != "" && text(backing) == l.backing; time.Sleep(pollInterval) {
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("%w: a program has %s open", ErrInUse, loopPath(l.number))
		}
	}
	return nil
}

// clearLoop has the driver free a loop device, now or when the last program that looks
// at it has closed it.
func clearLoop(l *loop) error {
	fd, err := claimLoop(l.number)
	switch {
	case errors.Is(err, unix.ENXIO):
		return nil // it is not there any more
	case err != nil:
		return err
	}
	defer func() { _ = unix.Close(fd) }() // nothing is written
	// The number may be another's by now.
	status, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil || unix.ByteSliceToString(status.File_name[:]) != l.carried || unix.Minor(uint64(status.Device)) != l.connection {
		return nil
	}
	if err := removePartitions(l.number, fd); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("fuse: free %s: %w", loopPath(l.number), err)
	}
	return nil
}

// claimLoop opens a loop device so that nobody can mount it. Whoever looks at a new or
// unmounted device for a moment, as udev does, is waited for.
//
// Errors: ErrInUse.
func claimLoop(number int) (int, error) {
	for deadline := time.Now().Add(claimWait); ; time.Sleep(pollInterval) {
		fd, err := openLoop(number, unix.O_RDONLY|unix.O_EXCL)
		switch {
		case err == nil:
			return fd, nil
		case !errors.Is(err, unix.EBUSY):
			return -1, fmt.Errorf("fuse: %w", err)
		}
		where, holders := users(number)
		if len(where) == 0 && len(holders) == 0 && time.Now().Before(deadline) {
			continue
		}
		if len(where) == 0 && len(holders) == 0 {
			where = usersElsewhere(number)
		}
		by := "opened for itself by a program, or mounted in another mount namespace"
		switch {
		case len(where) > 0:
			by = "mounted on " + strings.Join(where, ", ")
		case len(holders) > 0:
			by = "part of " + strings.Join(holders, ", ")
		}
		return -1, fmt.Errorf("%w: %s is %s", ErrInUse, loopPath(number), by)
	}
}

// busy returns ErrInUse when a loop device is mounted or held.
func busy(number int) error {
	fd, err := claimLoop(number)
	if err == nil {
		_ = unix.Close(fd) // nothing is written
	}
	if errors.Is(err, ErrInUse) {
		return err
	}
	return nil // not there is not busy
}

// parts are the numbers and nodes of a loop device and its partitions, and the devices
// made of them.
func parts(number int) (numbers, sources, holders []string) {
	name := fmt.Sprintf("loop%d", number)
	dir := "/sys/block/" + name
	partitions, _ := filepath.Glob(dir + "/" + name + "p*") // the pattern is good
	for _, d := range append([]string{dir}, partitions...) {
		numbers = append(numbers, text(d+"/dev"))
		sources = append(sources, "/dev/"+filepath.Base(d))
		entries, err := os.ReadDir(d + "/holders")
		if err != nil {
			continue // on its way out
		}
		for _, e := range entries {
			holder := e.Name()
			if mapped := text("/sys/block/" + holder + "/dm/name"); mapped != "" {
				holder += " (" + mapped + ")"
			}
			holders = append(holders, holder)
		}
	}
	return numbers, sources, holders
}

// tables are the kernel's lists of what is mounted, and of swap.
type tables struct{ mounts, swaps string }

func readTables() tables {
	mounts, _ := os.ReadFile(mountInfo)    // unreadable: the mounts go unnamed
	swaps, _ := os.ReadFile("/proc/swaps") // as above
	return tables{string(mounts), string(swaps)}
}

// users are the mounts of a loop device in this mount namespace, and its holders.
func users(number int) (where, holders []string) {
	t := readTables()
	return t.users(number)
}

func (t *tables) users(number int) (where, holders []string) {
	numbers, sources, holders := parts(number)
	where = mountsOf(t.mounts, numbers, sources)
	for line := range strings.Lines(t.swaps) {
		if fields := strings.Fields(line); len(fields) > 0 && slices.Contains(sources, fields[0]) {
			where = append(where, "swap")
		}
	}
	return where, holders
}

// usersElsewhere are the mounts of a loop device in the mount namespaces of other
// processes, one of them each.
func usersElsewhere(number int) (where []string) {
	numbers, sources, _ := parts(number)
	seen := map[string]bool{}
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo") // the pattern is good
	for _, table := range tables {
		namespace, err := os.Readlink(filepath.Dir(table) + "/ns/mnt")
		if err != nil || seen[namespace] {
			continue
		}
		seen[namespace] = true
		b, _ := os.ReadFile(table) // of a process that ended
		for _, place := range mountsOf(string(b), numbers, sources) {
			where = append(where, fmt.Sprintf("%s (of process %s)", place, filepath.Base(filepath.Dir(table))))
		}
	}
	return where
}
