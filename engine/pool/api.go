package pool

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Errors callers act on. They come wrapped, with the name of what they are about.
var (
	ErrNotFound     = errors.New("not found")
	ErrExists       = errors.New("already exists")
	ErrInUse        = errors.New("in use")
	ErrInvalid      = errors.New("invalid")
	ErrNoSpace      = errors.New("no space left in the pool")
	ErrReadOnly     = errors.New("the pool is read-only")
	ErrCorrupt      = errors.New("damaged")
	ErrNotPool      = errors.New("no pool on this device")
	ErrForeign      = errors.New("the device holds something else")
	ErrUnsupported  = errors.New("unsupported format")
	ErrHasSnapshots = errors.New("the volume has snapshots")
	ErrStopped      = errors.New("the pool has stopped")
	ErrNotSupported = errors.New("not supported")

	// ErrOverProvisioned is about what Config.OverProvision refuses, whatever space there is.
	ErrOverProvisioned = errors.New("over-provisioned")
)

// MissingError says which devices of a pool were not given to Open.
type MissingError struct {
	Pool    string
	Missing []Member
}

// Error implements error.
func (e *MissingError) Error() string {
	s := fmt.Sprintf("pool %s: %d device(s) missing:", e.Pool, len(e.Missing))
	for _, m := range e.Missing {
		s += fmt.Sprintf(" #%d %s (%d bytes, last seen as %s)", m.Index, m.UUID, m.Size, m.Hint)
	}
	return s
}

// Member is one device of a pool, as the superblock records it.
type Member struct {
	Index int
	UUID  uuid.UUID
	Size  uint64 // bytes
	Hint  string // the path it was last opened by
}

// Label is what a device says of the pool it belongs to.
type Label struct {
	Pool       uuid.UUID
	Name       string
	Device     uuid.UUID
	Index      int // of this device
	Members    []Member
	Generation uint64
	Version    uint32
	Created    time.Time
}

// Disk is a device given to a pool, with a name for people.
type Disk struct {
	Path   string // for messages and Member.Hint
	Device datapath.Device
}

// FormatConfig says what pool to make.
type FormatConfig struct {
	Name    string
	Disks   []Disk
	Reactor *reactor.Reactor // carries the writes
	Force   bool             // overwrite what a device holds, even another pool

	// Geometry; zero for the default. Small values are for tests.
	JournalBytes uint64 // default: 1/1024 of the pool, 4 MiB to 256 MiB
	ZoneRegions  int    // regions a zone; default 256
}

// Config says how to open a pool.
type Config struct {
	Disks   []Disk           // in any order; the pool does not close them
	Reactor *reactor.Reactor // carries the pool's own I/O

	// ReadOnly writes nothing at all. A pool with missing devices can be opened
	// only so; what lies on them is answered with StatusIO.
	ReadOnly bool
	// CrashLog is a file, on a local file system, that keeps what was acknowledged
	// but not flushed over the death of the process (not of the machine). "": a write
	// that was not flushed may be lost with the process.
	CrashLog string
	// SumCacheBytes bounds the checksums kept in memory; 0: 64 MiB, enough for 64 GiB
	// of data in use.
	SumCacheBytes int64
	// OverProvision bounds the sum of the sizes of all volumes, in percent of the
	// pool; 0: no bound.
	OverProvision int
	// ScrubRate bounds the scrub, bytes a second; 0: 64 MiB/s.
	ScrubRate uint64
	// Manual starts no background work: a test calls Maintain.
	Manual bool
	Event  func(Event) // on any goroutine; must not block or call the pool; may be nil
	Log    *slog.Logger
}

// EventKind is what happened.
type EventKind string

// The kinds of events.
const (
	EventCorrupt  EventKind = "corrupt"   // a block failed its checksum twice
	EventIO       EventKind = "io-error"  // a device failed a request
	EventStopped  EventKind = "stopped"   // the pool takes no more changes until it is reopened
	EventSpaceLow EventKind = "space-low" // a threshold (80, 90, 95 %) was passed upwards
	EventFull     EventKind = "full"      // a write was answered with no space
	EventRepaired EventKind = "repaired"  // a structure was read from its second copy
)

// Event is something an operator should hear of.
type Event struct {
	Time    time.Time
	Kind    EventKind
	Pool    string
	Volume  string // "" when it is not about one
	Offset  uint64 // bytes, on the volume
	Device  string // path of the disk, "" when it is not about one
	Address uint64 // bytes, on the disk
	Message string // one sentence
}

// State of a pool.
type State string

// The states.
const (
	StateOnline   State = "online"
	StateReadOnly State = "read-only"
	StateStopped  State = "stopped" // a flush or a metadata write failed
)

// Info describes a pool now.
type Info struct {
	Name    string
	UUID    uuid.UUID
	State   State
	Reason  string // why it is not online
	Members []Member
	Created time.Time
	Version uint32

	// Bytes. Total = Allocated + Metadata + Free. Reserved and Reserve are part of
	// Free and kept for thick volumes and for the pool's own needs; Available is
	// what any volume can still get.
	Total, Allocated, Metadata, Free, Reserved, Reserve, Available uint64
	// Provisioned is the sum of the sizes of all volumes.
	Provisioned  uint64
	Volumes      int
	Snapshots    int
	DirtyRegions int
	Journal      JournalInfo
}

// JournalInfo describes the journal.
type JournalInfo struct {
	Bytes, Used uint64
	Groups      uint64 // written since open
}

// VolumeSpec says what volume to make.
type VolumeSpec struct {
	Name   string
	Size   uint64            // bytes; a multiple of 4096
	Thick  bool              // reserve the space now
	Labels map[string]string // kept with it; up to 2 KiB together; no key begins with ashlar.io/
	Limits Limits
}

// VolumeInfo describes a volume.
type VolumeInfo struct {
	Name      string
	UUID      uuid.UUID
	Pool      string
	Size      uint64 // bytes
	Thick     bool
	Labels    map[string]string
	Limits    Limits
	Created   time.Time
	Parent    string // VOLUME@SNAPSHOT it is a clone of, while that has a name; "" else
	Snapshots int
	Open      int    // devices open on it
	Depth     int    // layers a read may have to look at
	Allocated uint64 // bytes of clusters only the head owns
}

// SnapshotInfo describes a snapshot.
type SnapshotInfo struct {
	Volume    string
	Name      string
	UUID      uuid.UUID
	Size      uint64
	Created   time.Time
	Labels    map[string]string
	Clones    []string // volumes whose nearest named ancestor it is
	Open      int
	Allocated uint64 // bytes of clusters this layer owns
}

// MapInfo says where a volume's bytes are. All are bytes.
type MapInfo struct {
	Volume      string
	Size        uint64
	Mapped      uint64 // blocks a read of the volume finds in any layer
	Exclusive   uint64 // clusters that only this volume's head owns
	Shared      uint64 // clusters of layers below, which snapshots or clones need too
	Reclaimable uint64 // clusters given back when the volume and its snapshots are deleted
	Snapshots   []SnapshotInfo
}

// JobKind names long work.
type JobKind string

// The kinds of jobs.
const (
	JobMerge  JobKind = "merge"  // a deleted snapshot's layer goes into its child
	JobDelete JobKind = "delete" // a deleted volume's clusters are freed
	JobScrub  JobKind = "scrub"
)

// Job is long work under way or just ended.
type Job struct {
	ID      uint64
	Kind    JobKind
	Pool    string
	Target  string // volume, VOLUME@SNAPSHOT or pool
	Done    uint64 // bytes
	Total   uint64 // bytes
	Started time.Time
	Ended   time.Time // zero while it runs
	Err     string    // "" when it ended well or runs
	Stopped bool      // scrub: ended before its end because it was told to, which is no error; its place is kept
	Found   uint64    // scrub: damaged blocks
	Note    string    // why it does not go on, "" when it does
}

// Change is a run of blocks of a volume.
type Change struct {
	Offset, Length uint64 // bytes
	Zero           bool   // now reads as zeros
}
