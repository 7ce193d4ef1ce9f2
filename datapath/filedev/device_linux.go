package filedev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ncw/directio"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
)

// Access is the way to a file's bytes.
type Access string

// The ways. AccessAuto lets Open choose.
const (
	AccessAuto     Access = "auto"
	AccessDirect   Access = "direct"
	AccessInline   Access = "inline"
	AccessBuffered Access = "buffered"
)

// Options say how to open a device.
type Options struct {
	ReadOnly bool
	Access   Access // AccessAuto when empty
	// InFlightMax bounds the operations given to the kernel at once, over all
	// queues, except that each queue may always have one there; 0: three quarters
	// of the disk's nr_requests, so that a submission never sleeps in the kernel.
	InFlightMax int
}

const (
	sectorSize = 512
	// inFlightDefault serves where the disk's nr_requests cannot be read.
	inFlightDefault = 128
)

// Device is a raw file or block device. It implements datapath.Device.
type Device struct {
	path   string
	file   *os.File // the way in force
	tail   *os.File // direct mode: the buffered descriptor, which holds the locks, flushes, and serves the end of a file that is no multiple of align
	access Access
	reason string // why this way, for people

	info        datapath.Info
	size        atomic.Uint64 // bytes; grows
	aligned     atomic.Uint64 // size rounded down to align
	align       int           // offsets and lengths of direct I/O; 1 in other modes
	memoryAlign int           // addresses of direct I/O
	sector      int           // of a block device: what discard and zeroing are multiples of
	block       bool          // a block device
	tears       bool          // direct mode: a read sees a block half written, since it is a copy of memory
	readOnly    bool
	rotational  bool
	discards    bool
	zeroes      bool
	inFlightMax int64

	inFlight      atomic.Int64  // operations in the kernel, over all queues
	failed        atomic.Uint32 // failedFlush, failedShrunk; bits are only ever set
	syncs         atomic.Uint64 // calls of fdatasync begun; changed under the lock of syncRegion
	noZero        atomic.Bool   // fallocate turned out not to zero here
	noDsync       atomic.Bool   // pwritev2 takes no RWF_DSYNC here
	noNowaitRead  atomic.Bool   // buffered mode: preadv2 takes no RWF_NOWAIT here
	noNowaitWrite atomic.Bool   // buffered mode: pwritev2 takes no RWF_NOWAIT here
	locks         regionLocks
	lender        lender

	mu     sync.Mutex               // guards changes of queues, and depth
	queues atomic.Pointer[[]*queue] // open; a slice is never changed, only replaced
	depth  int                      // of all queues together
}

// What has failed for good, until the device is opened anew.
const (
	// failedFlush: what was written may be lost; flushes and FUA fail.
	failedFlush uint32 = 1 << iota
	// failedShrunk: the file ends before the device does. Changes fail as well: one
	// past the new end would make the file longer again, with zeros where lost data
	// was.
	failedShrunk
)

// Open opens the file or block device at path.
//
// Errors name the path and, where there is one, the remedy. A block device that
// is mounted or otherwise held, and a file another Ashlar serves for writing, are
// refused.
func Open(path string, o Options) (*Device, error) {
	if o.Access == "" {
		o.Access = AccessAuto
	}
	switch o.Access {
	case AccessAuto, AccessDirect, AccessInline, AccessBuffered:
	default:
		return nil, fmt.Errorf("%s: unknown access %q (auto, direct, inline, buffered)", path, o.Access)
	}
	if o.InFlightMax < 0 {
		return nil, fmt.Errorf("%s: at most %d operations in flight: must not be negative", path, o.InFlightMax)
	}
	stat, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	d := &Device{path: path, readOnly: o.ReadOnly, align: 1, memoryAlign: 1, sector: sectorSize, inFlightMax: int64(o.InFlightMax)}
	d.queues.Store(new([]*queue))
	switch mode := stat.Mode(); {
	case mode.IsRegular():
	case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		d.block = true
	default:
		return nil, fmt.Errorf("%s: is a %s: only regular files and block devices can be served", path, kindOf(mode))
	}
	if err := d.open(o.Access); err != nil {
		return nil, err
	}
	if err := d.measure(); err != nil {
		d.closeFiles()
		return nil, err
	}
	return d, nil
}

func kindOf(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeCharDevice != 0:
		return "character device"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "pipe"
	}
	return "special file"
}

func (d *Device) flags() int {
	flags := unix.O_CLOEXEC
	if d.readOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	if d.block && !d.readOnly {
		flags |= unix.O_EXCL // refused while mounted, or held by dm, md, another export
	}
	return flags
}

// open finds the way to the bytes.
func (d *Device) open(want Access) error {
	var plain *os.File
	err := patiently(func() (err error) {
		plain, err = os.OpenFile(d.path, d.flags(), 0)
		return err
	}, unix.EBUSY)
	if err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%s: the device is in use (mounted, or held by another program; see lsblk and fuser)", d.path)
		}
		if !d.readOnly && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)) {
			return fmt.Errorf("%w (serve it with --read-only, or run as a user who may write it)", err)
		}
		return err
	}
	d.file = plain
	lock := unix.LOCK_EX
	if d.readOnly {
		lock = unix.LOCK_SH
	}
	if err := patiently(func() error { return unix.Flock(int(plain.Fd()), lock|unix.LOCK_NB) }, unix.EWOULDBLOCK); err == unix.EWOULDBLOCK {
		_ = plain.Close() // nothing done with it
		return fmt.Errorf("%s: %w; stop that first", d.path, ErrLocked)
	}
	memory := d.inMemory()
	if want == AccessAuto {
		switch {
		case memory != "":
			d.access, d.reason = AccessInline, "files of "+memory+" answer from memory; io_uring would hand them to worker threads"
			return nil
		default:
			want = AccessDirect
		}
	} else {
		d.reason = "as asked"
	}
	d.access = want
	if want != AccessDirect {
		return nil
	}
	direct, err := os.OpenFile(d.path, d.flags()&^unix.O_EXCL|unix.O_DIRECT, 0)
	if err == nil {
		if err = d.probeDirect(direct); err == nil {
			d.file, d.tail = direct, plain
			d.tears = memory != ""
			// Pages read ahead of the tail would be written past, by direct I/O.
			_ = unix.Fadvise(int(plain.Fd()), 0, 0, unix.FADV_RANDOM) // a hint
			if d.reason == "" {
				d.reason = fmt.Sprintf("O_DIRECT works, in multiples of %d bytes", d.align)
			}
			return nil
		}
		_ = direct.Close() // nothing done with it
	}
	if d.reason != "" {
		d.closeFiles()
		return fmt.Errorf("%s: direct I/O does not work here: %w (use --access buffered)", d.path, err)
	}
	d.align, d.memoryAlign = 1, 1
	d.access, d.reason = AccessBuffered, fmt.Sprintf("the filesystem takes no O_DIRECT (%v)", err)
	return nil
}

// lockPatience is how long Open waits for a file that is held. A process that was
// killed lets go of it only when the kernel has taken its io_uring apart, in the
// background: up to a second later was seen on Linux 6.1.
var lockPatience = 3 * time.Second // shorter in tests

// patiently tries f until it ends otherwise than with held.
func patiently(f func() error, held error) error {
	end := time.Now().Add(lockPatience)
	for {
		err := f()
		if !errors.Is(err, held) || time.Now().After(end) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// inMemory names the filesystem when the file's data can only be in memory.
func (d *Device) inMemory() string {
	if d.block {
		return ""
	}
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(d.file.Fd()), &s); err != nil {
		return ""
	}
	switch int64(s.Type) {
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.RAMFS_MAGIC:
		return "ramfs"
	}
	return ""
}

// probeDirect learns the alignment of direct I/O, by statx where the kernel tells
// (Linux 6.1) and by trying otherwise.
func (d *Device) probeDirect(f *os.File) error {
	var s unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &s); err == nil && s.Mask&unix.STATX_DIOALIGN != 0 {
		if s.Dio_offset_align == 0 {
			return errors.New("the filesystem reports no direct I/O for this file")
		}
		d.align, d.memoryAlign = int(s.Dio_offset_align), int(s.Dio_mem_align)
	} else if d.block {
		n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("BLKSSZGET: %w", err)
		}
		d.align, d.memoryAlign = n, n
	} else {
		d.align, d.memoryAlign = directio.BlockSize, directio.BlockSize
	}
	if d.align > datapath.BlockSize || d.memoryAlign > datapath.BlockSize {
		return fmt.Errorf("needs multiples of %d bytes, more than a logical block", max(d.align, d.memoryAlign))
	}
	block := directio.AlignedBlock(directio.BlockSize)
	if _, err := unix.Pread(int(f.Fd()), block, 0); err != nil {
		return fmt.Errorf("a first direct read: %w", err)
	}
	return nil
}

// measure learns size, limits and abilities.
func (d *Device) measure() error {
	fd := int(d.file.Fd())
	if d.block {
		n, err := blockSize64(fd)
		if err != nil {
			return fmt.Errorf("%s: BLKGETSIZE64: %w", d.path, err)
		}
		d.size.Store(n)
		if d.sector, err = unix.IoctlGetInt(fd, unix.BLKSSZGET); err != nil {
			return fmt.Errorf("%s: BLKSSZGET: %w", d.path, err)
		}
		// The kernel opens such a device for writing and then fails every write.
		if n, err := unix.IoctlGetInt(fd, unix.BLKROGET); err == nil && n != 0 && !d.readOnly {
			return fmt.Errorf("%s: the device is write-protected (serve it with --read-only)", d.path)
		}
	} else {
		s, err := d.file.Stat()
		if err != nil {
			return err
		}
		d.size.Store(uint64(s.Size()))
	}
	size := d.size.Load()
	if size < sectorSize {
		return fmt.Errorf("%s: holds %d bytes, less than one sector (%d): make it larger first, e.g. truncate -s 1G %s", d.path, size, sectorSize, d.path)
	}
	d.aligned.Store(size &^ uint64(d.align-1))
	if d.access == AccessInline && d.inMemory() != "" {
		d.lender.open(fd, size)
	}
	d.discards, d.zeroes = !d.block, !d.block
	queue := d.queueDirectory()
	number := func(name string) (int64, bool) {
		b, err := os.ReadFile(filepath.Join(queue, name))
		if err != nil {
			return 0, false
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		return n, err == nil
	}
	if queue != "" {
		if n, ok := number("nr_requests"); ok && d.inFlightMax == 0 {
			d.inFlightMax = max(n*3/4, 1)
		}
		if n, _ := number("rotational"); n == 1 {
			d.rotational = true
		}
		if d.block {
			n, _ := number("discard_max_bytes")
			d.discards = n > 0
			n, _ = number("write_zeroes_max_bytes")
			d.zeroes = n > 0
		}
	}
	if d.block && d.access != AccessDirect {
		// fallocate(2) of a block device drops what is dirty in the page cache before
		// it asks the disk, and does not bring it back when the disk refuses.
		d.zeroes = false
		d.noZero.Store(true)
	}
	if d.inFlightMax == 0 {
		d.inFlightMax = inFlightDefault
	}
	d.describe()
	return nil
}

// queueDirectory is the sysfs directory of the request queue under the file, ""
// when there is none to be found (a network filesystem, a pool of several disks).
func (d *Device) queueDirectory() string {
	var s unix.Stat_t
	if err := unix.Fstat(int(d.file.Fd()), &s); err != nil {
		return ""
	}
	device := s.Dev
	if d.block {
		device = s.Rdev
	}
	base := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(device), unix.Minor(device))
	for _, p := range []string{base + "/queue", base + "/../queue"} { // a partition has its disk's
		if s, err := os.Stat(p); err == nil && s.IsDir() {
			return p
		}
	}
	return ""
}

// describe fills in what Info answers.
func (d *Device) describe() {
	i := &d.info
	*i = datapath.Info{
		Description: d.path,
		ReadOnly:    d.readOnly,
		MinIO:       1,
		PreferredIO: datapath.BlockSize,
		Features:    datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureMultiQueue | datapath.FeatureWriteZeroes,
	}
	switch d.access {
	case AccessBuffered:
		i.Features |= datapath.FeatureCache
	case AccessInline:
		i.Features |= datapath.FeatureImmediate
	}
	if d.discards {
		i.Features |= datapath.FeatureDiscard
	}
	if d.zeroes {
		i.Features |= datapath.FeatureFastZero
	}
	if d.rotational {
		i.Features |= datapath.FeatureRotational
	}
	if !d.block {
		i.Features |= datapath.FeatureExtents
		i.Contexts = []string{datapath.ContextAllocation}
	}
}

// Info implements datapath.Device.
func (d *Device) Info() datapath.Info {
	i := d.info
	i.Size = d.size.Load()
	return i
}

// Measure takes into use what the file or block device has become larger by.
// Nothing happens where it has not grown; a file whose size was no multiple of what
// direct I/O takes has to be opened anew. Any goroutine.
func (d *Device) Measure() error {
	old, now := d.size.Load(), uint64(0)
	if d.block {
		n, err := blockSize64(int(d.file.Fd()))
		if err != nil {
			return fmt.Errorf("%s: BLKGETSIZE64: %w", d.path, err)
		}
		now = n
	} else {
		s, err := d.file.Stat()
		if err != nil {
			return err
		}
		now = uint64(s.Size())
	}
	switch {
	case now <= old:
		return nil
	case d.aligned.Load() != old:
		return fmt.Errorf("%s: cannot grow while it is open: its %d bytes were no multiple of %d", d.path, old, d.align)
	}
	d.aligned.Store(now &^ uint64(d.align-1))
	d.size.Store(now)
	return nil
}

// Access is the way in force and the reason for it.
func (d *Device) Access() (way Access, reason string) { return d.access, d.reason }

// fixedAlignMax is how the kernel aligns the memory of a request at least.
const fixedAlignMax = sectorSize

// FixedBuffers implements datapath.FixedBuffers: direct I/O can move bytes between the
// disk and memory that only the kernel sees.
func (d *Device) FixedBuffers() (align int, err error) {
	switch {
	case d.access != AccessDirect:
		return 0, errNotDirect
	case d.tears:
		return 0, errTears
	case d.memoryAlign > fixedAlignMax:
		return 0, errMemoryAlign
	}
	return d.align, nil
}

// ErrLocked says that a file cannot be opened, since a process that has it open keeps
// others from it.
var ErrLocked = errors.New("another process has it open (its lock is held)")

// Why a device does not take registered buffers; made once, since queues ask too.
var (
	errNotDirect   = errors.New("the file is not read and written past the page cache (access direct)")
	errTears       = errors.New("the file is in memory")
	errMemoryAlign = fmt.Errorf("direct I/O on the file takes only memory aligned to more than %d bytes", fixedAlignMax)
)

// Path is the path the device was opened by.
func (d *Device) Path() string { return d.path }

// InFlightMax is how many operations are given to the kernel at once.
func (d *Device) InFlightMax() int { return int(d.inFlightMax) }

// Close implements datapath.Device. It does not flush: what is not flushed by the
// export is as durable as the kernel made it.
func (d *Device) Close() error {
	d.lender.close()
	lock := d.file // whose descriptor holds the lock
	if d.tail != nil {
		lock = d.tail
	}
	// The next to open the file need not wait for a ring that still knows it.
	_ = unix.Flock(int(lock.Fd()), unix.LOCK_UN) // closing does it too, later
	err := d.file.Close()
	if d.tail != nil {
		err = errors.Join(err, d.tail.Close())
	}
	return err
}

func (d *Device) closeFiles() { _ = d.Close() } // on a failed Open: nothing was written
