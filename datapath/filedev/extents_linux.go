package filedev

import (
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
)

// run is what has no asynchronous form in the kernel and may sleep. It runs on a
// worker thread. For OpDiscard it returns 0 or a negative errno, otherwise a
// datapath.Status.
func (s *slot) run() int {
	switch s.r.Op {
	case datapath.OpDiscard:
		return -int(blockDiscard(s.q.file.FD(), uint64(s.io.Offset), uint64(s.io.Length)))
	case datapath.OpCache:
		return int(s.q.d.cache(s.r))
	}
	return int(s.q.d.extents(s.r))
}

// cache reads ahead into the page cache.
func (d *Device) cache(r *datapath.Request) datapath.Status {
	_ = unix.Fadvise(int(d.file.Fd()), int64(r.Offset), int64(r.Length), unix.FADV_WILLNEED) // a hint
	return datapath.StatusOK
}

// extents answers with the file's holes and data, by SEEK_HOLE and SEEK_DATA. Both
// count storage that was set aside and not written as a hole; FIEMAP knows better.
func (d *Device) extents(r *datapath.Request) datapath.Status {
	r.Extents = r.Extents[:0]
	limit := cap(r.Extents)
	if r.Context != datapath.ContextAllocation || r.Length == 0 || limit == 0 {
		return datapath.StatusInvalid
	}
	if r.Flags&datapath.FlagOneExtent != 0 {
		limit = 1
	}
	fd := int(d.file.Fd())
	position, end := int64(r.Offset), int64(r.Offset+r.Length)
	for position < end && len(r.Extents) < limit {
		data, err := unix.Seek(fd, position, unix.SEEK_DATA)
		switch {
		case err == unix.ENXIO: // a hole to the end of the file
			data = end
		case err == unix.EINVAL || err == unix.EOPNOTSUPP: // the filesystem does not tell
			data = position
		case err != nil:
			return datapath.StatusIO
		}
		var next int64
		state := datapath.ExtentHole | datapath.ExtentZero
		if data > position {
			next = min(data, end)
			start, stop, found, errno := firstMapped(fd, uint64(position), uint64(next-position))
			switch {
			case errno != 0 || !found: // a filesystem that does not tell sets nothing aside (tmpfs)
			case int64(start) > position:
				next = min(next, int64(start))
			case int64(stop) > position:
				next, state = min(next, int64(stop)), datapath.ExtentZero
			}
		} else {
			state = 0
			next, err = unix.Seek(fd, position, unix.SEEK_HOLE)
			if err == unix.ENXIO {
				d.failed.Or(failedShrunk)
				return datapath.StatusIO // the file shrank: what was here is gone
			} else if err != nil || next <= position {
				next = end
			}
			next = min(next, end)
		}
		r.Extents = append(r.Extents, datapath.Extent{Length: uint64(next - position), State: state})
		position = next
	}
	return datapath.StatusOK
}
