package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// Errors of this package, beside those of package pool, which come through.
var (
	ErrClosed    = errors.New("engine: closed")
	ErrAmbiguous = errors.New("several pools have a volume of this name: say POOL/VOLUME")
	ErrNoDefault = errors.New("there is not exactly one pool: name one")
	ErrVolumes   = errors.New("the pool has volumes")
	ErrBusy      = errors.New("someone is at it: try again")
)

// NotOpenError says that a pool is known and not open, so that nothing can be said
// of what it holds.
type NotOpenError struct {
	Pool   string
	Reason error
}

// Error implements error.
func (e *NotOpenError) Error() string {
	if strings.Contains(e.Reason.Error(), "pool "+e.Pool+": ") {
		return fmt.Sprintf("not open: %v", e.Reason)
	}
	return fmt.Sprintf("pool %s is not open: %v", e.Pool, e.Reason)
}

// Unwrap is why.
func (e *NotOpenError) Unwrap() error { return e.Reason }

// Config says how to open an engine. DataDir and Reactors are required.
type Config struct {
	DataDir  string
	Reactors []*reactor.Reactor // carry the pools' own I/O; stopped by their owner, after the engine
	Log      *slog.Logger       // slog.Default()

	// ReadOnly opens every pool read-only, even with missing devices.
	ReadOnly bool
	// Where to look for devices that are not where they were: files, block devices,
	// directories of these; and with ScanDevices everything sysfs shows.
	Scan        []string
	ScanDevices bool

	// See pool.Config and pool.FormatConfig.
	SumCacheBytes int64
	OverProvision int
	ScrubRate     uint64
	JournalBytes  uint64
	ZoneRegions   int

	Layout Layout // package pool; tests have their own
	// OpenDevice opens a path; by default as a file or block device (filedev).
	OpenDevice func(path string, readOnly bool) (datapath.Device, error)
	Now        func() time.Time // time.Now
}

// Engine is what exists on this node. Its methods may be called from any goroutine
// but a reactor's.
type Engine struct {
	config     Config
	log        *slog.Logger
	layout     Layout
	openDevice func(path string, readOnly bool) (datapath.Device, error)
	sysfs      string // of block devices
	events     eventLog
	gone       chan struct{} // closed by Close

	// turn is held by whoever changes which pools there are. Unlike mu it is held
	// across I/O: such changes go one after the other. turn before mu.
	turn chan struct{}

	mu     sync.Mutex
	closed bool
	pools  map[uuid.UUID]*entry
	naming map[string]bool // volumes that are being made

	// Changed with the turn.
	forgotten []uuid.UUID
	fresh     bool   // immutable
	openings  uint64 // how often a pool was opened, for names of jobs
}

// entry is a pool the catalog knows.
type entry struct {
	engine *Engine
	record record // guarded by Engine.mu; changed with the turn

	// Guarded by Engine.mu; changed with the turn, users and devices aside.
	pool     Pool        // nil while it is not open
	reason   error       // why it is not
	seen     []uuid.UUID // devices found at the last try that failed
	opening  uint64
	readOnly bool
	members  []*member
	users    int           // calls under way
	devices  int           // handed out and not closed
	leaving  bool          // takes no more users
	idle     chan struct{} // closed when it is leaving and users is 0

	life context.Context // of the open pool; ends what waits
	end  context.CancelFunc
}

// Open opens every pool in the catalog of the data directory. A pool that cannot
// be opened is no error: Pools says why.
func Open(c Config) (*Engine, error) {
	if len(c.Reactors) == 0 {
		return nil, errors.New("engine: needs at least one reactor")
	}
	e := &Engine{
		config: c, log: c.Log, layout: c.Layout, openDevice: c.OpenDevice, sysfs: "/sys/class/block",
		gone: make(chan struct{}), turn: make(chan struct{}, 1), pools: map[uuid.UUID]*entry{}, naming: map[string]bool{},
	}
	if e.log == nil {
		e.log = slog.Default()
	}
	if e.layout == nil {
		e.layout = onDisk{}
	}
	if e.openDevice == nil {
		e.openDevice = openFile
	}
	if e.config.Now == nil {
		e.config.Now = time.Now
	}
	dir, err := filepath.Abs(c.DataDir)
	if err != nil {
		return nil, err
	}
	e.config.DataDir = dir
	e.config.Scan = nil
	for _, path := range c.Scan {
		path, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		e.config.Scan = append(e.config.Scan, path)
	}
	if err := os.MkdirAll(filepath.Join(dir, poolsDir), 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	_, err = os.Stat(filepath.Join(dir, catalogName))
	e.fresh = errors.Is(err, os.ErrNotExist)
	known, err := readCatalog(dir)
	if err != nil {
		return nil, err
	}
	e.forgotten = known.Forgotten
	for _, r := range known.Pools {
		e.pools[r.UUID] = &entry{engine: e, record: r, reason: errors.New("it is being opened")}
	}
	for _, r := range known.Pools {
		en := e.pools[r.UUID]
		if r.Destroying {
			e.finishDestroy(en)
			continue
		}
		e.reopen(en, nil)
	}
	e.adopt()
	return e, nil
}

// Fresh says whether the data directory had no catalog when the engine was opened:
// no pool was ever made or imported here.
func (e *Engine) Fresh() bool { return e.fresh }

// Close closes every pool: all that is written becomes durable. The devices handed
// out are closed before: with pool.ErrInUse the pools they are of are open still,
// and so is the engine.
func (e *Engine) Close() error {
	e.turn <- struct{}{}
	defer func() { <-e.turn }()
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	list := e.sortedLocked()
	e.mu.Unlock()
	var errs []error
	inUse := false
	for _, en := range list {
		if err := e.shut(en, ErrClosed); err != nil {
			errs = append(errs, err)
			inUse = inUse || errors.Is(err, pool.ErrInUse)
		}
	}
	if inUse {
		e.mu.Lock()
		e.closed = false
		e.mu.Unlock()
		return errors.Join(errs...)
	}
	close(e.gone)
	return errors.Join(errs...)
}

func (e *Engine) sortedLocked() []*entry {
	var list []*entry
	for _, en := range e.pools {
		list = append(list, en)
	}
	slices.SortFunc(list, func(a, b *entry) int { return strings.Compare(a.record.Name, b.record.Name) })
	return list
}

// change takes the turn. Unless the engine is closed, the caller gives it back.
func (e *Engine) change() error {
	e.turn <- struct{}{}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		<-e.turn
		return ErrClosed
	}
	return nil
}

// save writes the catalog. The caller has the turn.
func (e *Engine) save() error {
	e.mu.Lock()
	c := &catalog{Version: catalogVersion, Pools: []record{}, Forgotten: e.forgotten}
	for _, en := range e.sortedLocked() {
		c.Pools = append(c.Pools, en.record)
	}
	e.mu.Unlock()
	return c.write(e.config.DataDir)
}

// openMembers are the devices of all open pools.
func (e *Engine) openMembers() []*member {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []*member
	for _, en := range e.sortedLocked() {
		list = append(list, en.members...)
	}
	return list
}

// report passes an event of a pool on. It may be called on any goroutine.
func (e *Engine) report(event pool.Event) {
	if event.Time.IsZero() {
		event.Time = e.config.Now()
	}
	e.events.add(event)
	level := slog.LevelInfo
	switch event.Kind {
	case pool.EventCorrupt, pool.EventIO, pool.EventStopped:
		level = slog.LevelError
	case pool.EventSpaceLow, pool.EventFull, pool.EventRepaired, EventNotOpened, EventAmbiguous:
		level = slog.LevelWarn
	}
	e.log.Log(context.Background(), level, "pool event", "kind", event.Kind, "pool", event.Pool, "volume", event.Volume,
		"offset", event.Offset, "device", event.Device, "address", event.Address, "message", event.Message)
}

// ValidateName says why a name cannot be a pool's, volume's or snapshot's. What is
// left out are the signs of references (/ and @), of paths and of shells.
func ValidateName(kind, name string) error {
	const nameMax = 128 // bytes; far above what Kubernetes makes up ("pvc-" and a UUID), below a file name's 255
	fail := func(why string) error { return fmt.Errorf("%s name %q: %s: %w", kind, name, why, pool.ErrInvalid) }
	switch {
	case name == "":
		return fail("is empty")
	case len(name) > nameMax:
		return fail(fmt.Sprintf("is longer than %d bytes", nameMax))
	}
	for i, r := range name {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !letter && (i == 0 || !strings.ContainsRune("._-:", r)) {
			return fail("letters, digits and, after the first, . _ - : only")
		}
	}
	return nil
}
