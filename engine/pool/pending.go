package pool

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// pendingLog keeps the changes of maps that are not durable yet in a file mapped
// into memory. It costs a write no system call and no disk: the page cache holds
// the file when the process is killed, and so a write that was acknowledged
// without a flush is still there when the daemon starts again, as it would be on a
// disk. A loss of power loses it, as it loses a disk's cache; the boot id tells.
//
// It is a ring of records, each in the slot of its change number. Records up to
// the last durable change are dead.
type pendingLog struct {
	file   *os.File
	memory []byte
	lsn    *atomic.Uint64  // up to which the journal has been written
	slots  []atomic.Uint64 // pendingWords each
}

const (
	pendingSlots  = 1 << 16 // 2 MiB; a commit is asked for when half of them are taken
	pendingWords  = 4
	pendingHeader = 4096
	pendingLSN    = 104 // offset in the header
	pendingMagic  = "ASHLARPENDING\x00\x00\x01"
)

// What a record does to an entry. Changes of different blocks may be recorded in
// another order than they were made in, so a record says only what it did itself.
const (
	pendingSet     uint32 = 1 // the cluster is this, and has these blocks too
	pendingClear   uint32 = 2 // these blocks are not there; entryZero may have been set
	pendingRelease uint32 = 3 // this cluster is not there; nobody else could change the entry meanwhile
	// A snapshot began: the layer is the new head on the layer v. Where the journal
	// does not have that, nobody was told of the snapshot, but writes may be in the
	// head.
	pendingFreeze uint32 = 4
)

// pendingRecord is a change of one entry.
type pendingRecord struct {
	change   uint64
	layer, v uint32
	kind     uint32
	e        entry
}

// bootID tells one run of the kernel from another.
var bootID = func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// readPending returns the records of a file that belong to the pool's last run,
// in order, without those up to settled.
func readPending(path string, p *Pool, epoch uint32, settled uint64) ([]pendingRecord, error) {
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) < pendingHeader {
		return nil, nil // was being made
	}
	lsn := le.Uint64(b[pendingLSN:])
	le.PutUint64(b[pendingLSN:], 0)
	if len(b) != pendingHeader+8*pendingWords*pendingSlots || !bytes.Equal(b[:pendingHeader], pendingHead(p, epoch)) {
		return nil, nil // of another pool, boot or run
	}
	if end := p.journal.next.Load(); lsn > end {
		// Without this file it would be taken for a torn tail: nothing comes after it.
		return nil, fmt.Errorf("%s: the journal ends at LSN %d, but had been written up to %d: its last groups are damaged, or the disks are older than this file (remove the file to open the pool without them): %w", path, end, lsn, ErrCorrupt)
	}
	var records []pendingRecord
	for i := range pendingSlots {
		s := b[pendingHeader+8*pendingWords*i:]
		r := pendingRecord{change: le.Uint64(s), layer: le.Uint32(s[8:]), v: le.Uint32(s[12:]), e: entry(le.Uint64(s[16:])), kind: le.Uint32(s[24:])}
		if r.change > settled && r.change%pendingSlots == uint64(i) {
			if r.kind < pendingSet || r.kind > pendingFreeze { // of a newer program, or damaged: without it, what was acknowledged is not there
				return nil, fmt.Errorf("%s: change %d is of an unknown kind %d: %w", path, r.change, r.kind, ErrCorrupt)
			}
			records = append(records, r)
		}
	}
	sort.Slice(records, func(i, j int) bool { return records[i].change < records[j].change })
	return records, nil
}

func pendingHead(p *Pool, epoch uint32) []byte {
	b := make([]byte, pendingHeader)
	copy(b, pendingMagic)
	copy(b[32:], p.id[:])
	copy(b[48:], bootID())
	le.PutUint32(b[96:], epoch)
	return b
}

// openPending makes the file anew for this run.
func openPending(path string, p *Pool, epoch uint32) (*pendingLog, error) {
	const size = pendingHeader + 8*pendingWords*pendingSlots
	l := &pendingLog{}
	var err error
	if path == "" {
		if l.memory, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
			return nil, fmt.Errorf("pending changes: %w", err)
		}
	} else {
		// A new file under the old name: the old one stays whole until then.
		temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
		if l.file, err = os.OpenFile(temporary, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return nil, fmt.Errorf("pending changes: %w", err)
		}
		if err = l.file.Truncate(size); err == nil {
			err = unix.Fallocate(int(l.file.Fd()), 0, 0, size) // so that a store never meets a full disk
			if err == unix.EOPNOTSUPP {
				err = nil
			}
		}
		if err == nil {
			_, err = l.file.WriteAt(pendingHead(p, epoch), 0)
		}
		if err == nil {
			l.memory, err = unix.Mmap(int(l.file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		}
		if err == nil {
			err = os.Rename(temporary, path)
		}
		if err != nil {
			_ = l.file.Close() // holds nothing
			return nil, fmt.Errorf("pending changes: %s: %w", path, err)
		}
	}
	l.lsn = &words(l.memory[pendingLSN : pendingLSN+8])[0]
	l.lsn.Store(p.journal.next.Load())
	l.slots = words(l.memory[pendingHeader:])
	return l, nil
}

func (l *pendingLog) close() error {
	err := unix.Munmap(l.memory)
	if l.file != nil {
		if e := l.file.Close(); err == nil {
			err = e
		}
	}
	return err
}

// note keeps one change, which is in memory already. full says that there was no
// room: whoever made the change acknowledges it after a commit only.
func (p *Pool) note(layer, v, kind uint32, e entry) (full bool) {
	change := p.changes.Add(1)
	unsettled := change - p.settled.Load()
	if unsettled == pendingSlots/2 {
		p.request.Lock()
		p.request.commit = true
		p.request.Unlock()
		p.kickCommitter()
	}
	if unsettled == 1 {
		p.wakeKeeper()
	}
	if unsettled > pendingSlots {
		return true
	}
	s := p.pending.slots[change%pendingSlots*pendingWords:][:pendingWords]
	s[0].Store(0)
	s[1].Store(uint64(layer) | uint64(v)<<32)
	s[2].Store(uint64(e))
	s[3].Store(uint64(kind))
	s[0].Store(change)
	return false
}

// replayPending applies the changes of the run that was killed.
func (p *Pool) replayPending(records []pendingRecord) (applied int) {
	for _, r := range records {
		l := p.layers[r.layer]
		if r.kind == pendingFreeze {
			if l == nil && p.replayFreeze(r.layer, p.layers[r.v]) {
				p.changes.Store(r.change)
				applied++
			}
			continue
		}
		if l == nil || uint64(r.v) >= clustersOf(l.rec.size) {
			continue // removed since, durably
		}
		page := l.page(r.v)
		i := r.v % mapEntries
		e := r.e
		switch old := entry(page.entries[i].Load()); r.kind {
		case pendingSet:
			mask := r.e.mask()
			if old.cluster() == r.e.cluster() {
				mask |= old.mask()
			}
			e = makeEntry(r.e.cluster(), mask, old.zero())
		case pendingClear:
			e = makeEntry(old.cluster(), old.mask()&^r.e.mask(), old.zero() || r.e.zero())
		case pendingRelease:
			e = makeEntry(noCluster, 0, old.zero() || r.e.zero())
			if c := old.cluster(); c != noCluster && c != r.e.cluster() {
				// The journal knows what has taken its place: a later write, or a merge.
				e = makeEntry(c, old.mask(), old.zero() || r.e.zero())
			}
		}
		page.entries[i].Store(uint64(e))
		page.changed(i)
		p.changes.Store(r.change)
		applied++
	}
	return applied
}

// replayFreeze puts the head that a snapshot had made onto old. Nobody was told of
// the snapshot, so old is to be merged into its head.
func (p *Pool) replayFreeze(id uint32, old *layer) bool {
	if old == nil || old.rec.flags&layerFrozen != 0 || id <= old.id {
		return false
	}
	rec := old.rec
	rec.id, rec.parent = id, old.id
	head := newLayer(p, rec)
	head.setParent(old)
	old.rec.flags = layerFrozen | layerHidden
	old.rec.name, old.rec.labels = "", nil
	old.children = 1
	p.layers[id] = head
	p.nextLayer.Store(max(p.nextLayer.Load(), id+1))
	p.freezes = append(p.freezes, freeze{[]*layer{head}, func(b []byte) []byte {
		p.storeRecord(old)
		p.storeRecord(head)
		return appendLayerRecord(appendLayerRecord(b, &old.rec), &head.rec)
	}})
	return true
}
