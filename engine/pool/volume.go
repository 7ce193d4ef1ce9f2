package pool

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/rate"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// volume is what queues of all its devices share. A snapshot that is open has one
// of its own.
type volume struct {
	p        *Pool
	id       uuid.UUID
	name     string // VOLUME, or VOLUME@SNAPSHOT
	readOnly bool   // immutable

	head     atomic.Pointer[layer] // changes while all queues pause
	size     atomic.Uint64         // bytes
	thick    atomic.Bool
	reserved atomic.Int64 // clusters still promised to it
	// allocating counts pieces between taking a cluster and entering it in the map.
	allocating atomic.Int64
	locks      blockLocks
	order      changeOrder
	rate       atomic.Pointer[rate.Turns] // nil: no limit

	named    atomic.Pointer[[]namedLayer] // snapshots
	contexts atomic.Pointer[[]string]
	queuesMu sync.Mutex // guards changes of queues, and pausing
	queues   atomic.Pointer[[]*queue]
	pausing  bool

	opens    int // guarded by Pool.mu
	toldFull atomic.Int64
}

// snapshotSet are the snapshots of one volume.
type snapshotSet struct {
	byName map[string]*layer
}

func (p *Pool) newVolume(l *layer, name string, readOnly bool) *volume {
	v := &volume{p: p, id: l.rec.volume, name: name, readOnly: readOnly}
	v.head.Store(l)
	v.size.Store(l.rec.size)
	v.thick.Store(l.rec.flags&layerThick != 0)
	v.queues.Store(new([]*queue))
	if !readOnly {
		v.setRate(l.rec.limits())
	}
	v.renameLayers()
	return v
}

func (v *volume) addQueue(q *queue) {
	v.queuesMu.Lock()
	defer v.queuesMu.Unlock()
	queues := append(slices.Clone(*v.queues.Load()), q)
	v.queues.Store(&queues)
	q.paused = v.pausing
}

func (v *volume) removeQueue(q *queue) {
	v.queuesMu.Lock()
	defer v.queuesMu.Unlock()
	queues := slices.DeleteFunc(slices.Clone(*v.queues.Load()), func(x *queue) bool { return x == q })
	v.queues.Store(&queues)
}

// pause holds back changes on all queues and waits until none is under way.
func (v *volume) pause() {
	v.queuesMu.Lock()
	v.pausing = true
	queues := *v.queues.Load()
	v.queuesMu.Unlock()
	var waiting sync.WaitGroup
	for _, q := range queues {
		waiting.Add(1)
		if !q.r.Post(reactor.TaskFunc(func(*reactor.Reactor) { q.pause(waiting.Done) })) {
			waiting.Done() // the reactor has stopped, and its queues with it
		}
	}
	waiting.Wait()
}

// pauseAll pauses several volumes, all of them at once for the time the slowest takes.
func pauseAll(volumes []*volume) {
	var waiting sync.WaitGroup
	for _, v := range volumes {
		waiting.Go(v.pause) // ends when it is paused
	}
	waiting.Wait()
}

// resume undoes pause.
func (v *volume) resume() {
	v.queuesMu.Lock()
	v.pausing = false
	queues := *v.queues.Load()
	v.queuesMu.Unlock()
	for _, q := range queues {
		q.r.Post(reactor.TaskFunc(func(*reactor.Reactor) { q.resume() }))
	}
}

// device is one open of a volume.
type device struct {
	v    *volume
	info datapath.Info
	once sync.Once
}

// Info implements [datapath.Device].
func (d *device) Info() datapath.Info {
	i := d.info
	i.Size = d.v.size.Load()
	i.Contexts = *d.v.contexts.Load()
	return i
}

// OpenQueue implements [datapath.Device].
func (d *device) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	return d.v.openQueue(r, depth)
}

// Close implements [datapath.Device]. It does not flush.
func (d *device) Close() error {
	err := error(fmt.Errorf("volume %s: closed twice: %w", d.v.name, ErrStopped))
	d.once.Do(func() {
		d.v.p.mu.Lock()
		d.v.opens--
		d.v.p.mu.Unlock()
		err = nil
	})
	return err
}

func (v *volume) device() *device {
	i := datapath.Info{
		Description: fmt.Sprintf("volume %s of pool %s", v.name, v.p.name),
		Features: datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureDiscard | datapath.FeatureWriteZeroes |
			datapath.FeatureFastZero | datapath.FeatureExtents | datapath.FeatureMultiQueue,
		ReadOnly: v.readOnly || v.p.config.ReadOnly, MinIO: 1, PreferredIO: blockSize,
	}
	return &device{v: v, info: i}
}

// OpenVolume gives the device of a volume. Each open has its own Close; several
// may be open.
func (p *Pool) OpenVolume(name string) (datapath.Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	switch {
	case p.closed:
		return nil, fmt.Errorf("pool %s: %w", p.name, ErrStopped)
	case v == nil:
		return nil, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	v.opens++
	return v.device(), nil
}

// OpenSnapshot gives a read-only device of a snapshot.
func (p *Pool) OpenSnapshot(name, snapshot string) (datapath.Device, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fmt.Errorf("pool %s: %w", p.name, ErrStopped)
	}
	_, l, err := p.findSnapshot(name, snapshot)
	if err != nil {
		return nil, err
	}
	if l.vol == nil {
		l.vol = p.newVolume(l, name+"@"+snapshot, true)
	}
	l.vol.opens++
	return l.vol.device(), nil
}

// findSnapshot looks up a snapshot of a volume. mu is held.
func (p *Pool) findSnapshot(name, snapshot string) (*volume, *layer, error) {
	v := p.volumes[name]
	if v == nil {
		return nil, nil, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	if s := p.snapshots[v.id]; s != nil && s.byName[snapshot] != nil {
		return v, s.byName[snapshot], nil
	}
	return v, nil, fmt.Errorf("snapshot %s@%s: %w", name, snapshot, ErrNotFound)
}

// buildCatalog names what was loaded.
func (p *Pool) buildCatalog() {
	for _, l := range p.layers {
		switch {
		case l.rec.flags&layerFrozen == 0:
			v := p.newVolume(l, l.rec.name, false)
			l.vol = v
			p.volumes[v.name] = v
			if v.thick.Load() {
				n := int64(clustersOf(l.rec.size)) - l.owned.Load()
				p.alloc.reserved += uint64(max(n, 0))
				p.alloc.owed.Add(l.pay())
				v.reserved.Store(max(n, 0))
			}
		case l.rec.flags&layerHidden == 0:
			p.snapshotsOf(l.rec.volume).byName[l.rec.name] = l
		}
	}
	for _, v := range p.volumes {
		v.renameLayers()
	}
}

// snapshotsOf are the snapshots of a volume. mu is held.
func (p *Pool) snapshotsOf(volume uuid.UUID) *snapshotSet {
	s := p.snapshots[volume]
	if s == nil {
		s = &snapshotSet{byName: map[string]*layer{}}
		p.snapshots[volume] = s
	}
	return s
}

const labelsMax = 2 << 10

func (p *Pool) checkSpec(s *VolumeSpec) error {
	if err := validName("volume", s.Name); err != nil {
		return err
	}
	switch {
	case s.Size == 0 || s.Size%blockSize != 0 || s.Size > volumeSizeMax:
		return fmt.Errorf("volume %s: size %d: must be a multiple of %d up to %d TiB: %w", s.Name, s.Size, blockSize, uint64(volumeSizeMax)>>40, ErrInvalid)
	case p.volumes[s.Name] != nil:
		return fmt.Errorf("volume %s: %w", s.Name, ErrExists)
	}
	if err := errors.Join(checkLabels("volume "+s.Name, s.Labels), s.Limits.check(s.Name)); err != nil {
		return err
	}
	return p.checkProvision(s.Name, s.Size)
}

// checkProvision refuses what would promise more than the limit. mu is held.
func (p *Pool) checkProvision(name string, more uint64) error {
	if p.config.OverProvision == 0 {
		return nil
	}
	var sum uint64
	for _, v := range p.volumes {
		sum += v.size.Load()
	}
	total, _ := p.alloc.space()
	if bound := total / 100 * uint64(p.config.OverProvision); sum+more > bound {
		return fmt.Errorf("volume %s: %d bytes more would promise %d, over the limit of %d %% of the pool (%d bytes): %w", name, more, sum+more, p.config.OverProvision, bound, ErrOverProvisioned)
	}
	return nil
}

// CreateVolume makes an empty volume. It is durable when the call returns, as all
// changes of the catalog are.
func (p *Pool) CreateVolume(s VolumeSpec) (VolumeInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.createVolume(s, nil)
}

// Clone makes a volume that begins as a snapshot; Size 0 is the snapshot's.
func (p *Pool) Clone(name, snapshot string, s VolumeSpec) (VolumeInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, parent, err := p.findSnapshot(name, snapshot)
	if err != nil {
		return VolumeInfo{}, err
	}
	if s.Size == 0 {
		s.Size = parent.rec.size
	}
	if s.Size < parent.rec.size {
		return VolumeInfo{}, fmt.Errorf("volume %s: size %d: less than the %d of %s@%s: %w", s.Name, s.Size, parent.rec.size, name, snapshot, ErrInvalid)
	}
	return p.createVolume(s, parent)
}

func (p *Pool) createVolume(s VolumeSpec, parent *layer) (VolumeInfo, error) {
	if err := p.checkSpec(&s); err != nil {
		return VolumeInfo{}, err
	}
	if !p.alloc.owe(1) {
		return VolumeInfo{}, fmt.Errorf("volume %s: no room for its record: %w", s.Name, ErrNoSpace)
	}
	clusters := int64(clustersOf(s.Size))
	if s.Thick && !p.alloc.promise(clusters, int64(mapPages(s.Size))) {
		p.alloc.owed.Add(-1)
		return VolumeInfo{}, fmt.Errorf("volume %s: %d bytes cannot be reserved: %w", s.Name, s.Size, ErrNoSpace)
	}
	id := uuid.New()
	l := newLayer(p, layerRecord{id: p.nextLayer.Add(1) - 1, size: s.Size, created: time.Now().UnixNano(), uuid: id, volume: id, name: s.Name, labels: withLimits(s.Labels, s.Limits)})
	l.owed = true
	if s.Thick {
		l.rec.flags |= layerThick
		l.pay()
	}
	if parent != nil {
		l.rec.parent = parent.id
		l.setParent(parent)
	}
	if err := p.commitTxn(func(b []byte) []byte {
		p.storeRecord(l)
		return appendLayerRecord(b, &l.rec)
	}); err != nil {
		if s.Thick {
			p.alloc.promise(-clusters, -int64(mapPages(s.Size)))
		}
		return VolumeInfo{}, err
	}
	if parent != nil {
		parent.children++
	}
	p.layers[l.id] = l
	v := p.newVolume(l, s.Name, false)
	l.vol = v
	if s.Thick {
		v.reserved.Store(clusters)
	}
	p.volumes[s.Name] = v
	return p.volumeInfo(v), nil
}

// Volumes describes all volumes, by name.
func (p *Pool) Volumes() []VolumeInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	infos := make([]VolumeInfo, 0, len(p.volumes))
	for _, v := range p.sortedVolumes() {
		infos = append(infos, p.volumeInfo(v))
	}
	return infos
}

// Volume describes one.
func (p *Pool) Volume(name string) (VolumeInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	if v == nil {
		return VolumeInfo{}, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	return p.volumeInfo(v), nil
}

func (p *Pool) volumeInfo(v *volume) VolumeInfo {
	l := v.head.Load()
	i := VolumeInfo{Name: v.name, UUID: v.id, Pool: p.name, Size: v.size.Load(), Thick: v.thick.Load(), Labels: userLabels(l.rec.labels), Limits: l.rec.limits(),
		Created: time.Unix(0, l.rec.created), Open: v.opens, Allocated: uint64(l.owned.Load()) << clusterShift}
	if s := p.snapshots[v.id]; s != nil {
		i.Snapshots = len(s.byName)
	}
	for x := l; x != nil; x = x.parent.Load() {
		i.Depth++
		if i.Parent == "" && x.rec.volume != v.id && x.rec.flags&(layerFrozen|layerHidden) == layerFrozen {
			i.Parent = p.snapshotName(x)
		}
	}
	return i
}

// snapshotName is VOLUME@SNAPSHOT. mu is held.
func (p *Pool) snapshotName(l *layer) string {
	for _, v := range p.volumes {
		if v.id == l.rec.volume {
			return v.name + "@" + l.rec.name
		}
	}
	return "?@" + l.rec.name
}

// Resize makes a volume larger; open devices see it at once.
func (p *Pool) Resize(name string, size uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	if v == nil {
		return fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	old := v.size.Load()
	switch {
	case size == old:
		return nil
	case size < old:
		return fmt.Errorf("volume %s: cannot become smaller (%d, now %d bytes): what lies at its end would be lost: %w", name, size, old, ErrInvalid)
	case size%blockSize != 0 || size > volumeSizeMax:
		return fmt.Errorf("volume %s: size %d: must be a multiple of %d up to %d TiB: %w", name, size, blockSize, uint64(volumeSizeMax)>>40, ErrInvalid)
	}
	if err := p.checkProvision(name, size-old); err != nil {
		return err
	}
	l := v.head.Load()
	more, pages := int64(clustersOf(size)-clustersOf(old)), int64(mapPages(size)-len(*l.table.Load()))
	if v.thick.Load() && !p.alloc.promise(more, pages) {
		return fmt.Errorf("volume %s: %d bytes more cannot be reserved: %w", name, size-old, ErrNoSpace)
	}
	rec := l.rec
	rec.size = size
	if err := p.commitRecord(l, rec); err != nil {
		if v.thick.Load() {
			p.alloc.promise(-more, -pages)
		}
		return err
	}
	l.grow(size)
	if v.thick.Load() {
		v.reserved.Add(more)
	}
	v.size.Store(size)
	return nil
}

// commitRecord changes the record of a layer. mu is held.
func (p *Pool) commitRecord(l *layer, rec layerRecord) error {
	return p.commitTxn(func(b []byte) []byte {
		l.rec = rec
		p.storeRecord(l)
		return appendLayerRecord(b, &rec)
	})
}

// SetLabels replaces the labels of a volume.
func (p *Pool) SetLabels(name string, labels map[string]string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	if v == nil {
		return fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	if err := checkLabels("volume "+name, labels); err != nil {
		return err
	}
	l := v.head.Load()
	rec := l.rec
	rec.labels = withLimits(labels, rec.limits())
	return p.commitRecord(l, rec)
}

// DeleteVolume removes a volume nobody has open; with snapshots only when cascade.
// The job frees its space.
func (p *Pool) DeleteVolume(name string, cascade bool) (Job, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	if v == nil {
		return Job{}, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	if v.opens > 0 {
		return Job{}, fmt.Errorf("volume %s: %d client(s) have it open: %w", name, v.opens, ErrInUse)
	}
	set := p.snapshotsOf(v.id)
	if len(set.byName) > 0 && !cascade {
		return Job{}, fmt.Errorf("volume %s: %w: %d", name, ErrHasSnapshots, len(set.byName))
	}
	if n := len(set.byName); (n+1)*hiddenRecord > p.journal.chunkMax() {
		return Job{}, fmt.Errorf("volume %s: %d snapshots are more than one step can delete: delete some of them first: %w", name, n, ErrInvalid)
	}
	for _, s := range set.byName {
		if s.vol != nil && s.vol.opens > 0 {
			return Job{}, fmt.Errorf("snapshot %s: %d client(s) have it open: %w", s.vol.name, s.vol.opens, ErrInUse)
		}
	}
	head := v.head.Load()
	if err := p.commitTxn(func(b []byte) []byte {
		for _, s := range set.byName {
			b = p.hide(b, s)
		}
		p.dropPairs(head)
		return appendRecord(b, recordRemove, head.id)
	}); err != nil {
		return Job{}, err
	}
	delete(p.volumes, name)
	delete(p.snapshots, v.id)
	if n := v.reserved.Swap(0); n > 0 {
		p.alloc.promise(-n, 0)
	}
	p.removeLayer(head)
	j := p.jobs.begin(p, JobDelete, name, uint64(head.owned.Load())<<clusterShift)
	p.startFreeing(head, j)
	p.startMerging()
	return j.snapshot(), nil
}

// hiddenRecord is how many bytes of the journal it takes to hide a snapshot.
const hiddenRecord = 72

// hide makes a snapshot a layer without a name. applyMu is held for writing.
func (p *Pool) hide(b []byte, l *layer) []byte {
	l.rec.flags |= layerHidden
	l.rec.name, l.rec.labels = "", nil
	p.storeRecord(l)
	return appendLayerRecord(b, &l.rec)
}

// removeLayer takes a layer, whose removal is durable, out of the tree. mu is held.
func (p *Pool) removeLayer(l *layer) {
	l.removed = true
	delete(p.layers, l.id)
	if parent := p.layers[l.rec.parent]; parent != nil {
		parent.children--
	}
}

// CreateSnapshot keeps the volume as it is now: one point in the order of its
// writes, durable when the call returns. Changes are held back while those under
// way end, and no longer.
func (p *Pool) CreateSnapshot(name, snapshot string, labels map[string]string) (SnapshotInfo, error) {
	infos, err := p.CreateSnapshotGroup(snapshot, []string{name}, labels)
	if err != nil {
		return SnapshotInfo{}, err
	}
	return infos[0], nil
}

// CreateSnapshotGroup keeps several volumes as they are at one point in the order of
// the writes of all of them, under one name: all of the snapshots exist then, or
// none. Else as CreateSnapshot.
func (p *Pool) CreateSnapshotGroup(snapshot string, volumes []string, labels map[string]string) ([]SnapshotInfo, error) {
	if err := validName("snapshot", snapshot); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	all, err := p.checkSnapshots(snapshot, volumes, labels)
	if err != nil {
		return nil, err
	}
	promised := map[*volume]int64{}
	for _, v := range all {
		if !v.thick.Load() {
			continue
		}
		// Everything may have to be written once more beside what the snapshot keeps.
		more := int64(clustersOf(v.size.Load())) - v.reserved.Load()
		if !p.alloc.promise(more, int64(mapPages(v.size.Load()))) {
			for v, n := range promised {
				p.alloc.promise(-n, -int64(mapPages(v.size.Load())))
			}
			p.alloc.owed.Add(-int64(len(all)))
			return nil, fmt.Errorf("snapshot %s@%s: the volume is thick, and %d bytes more cannot be reserved: %w", v.name, snapshot, more<<clusterShift, ErrNoSpace)
		}
		promised[v] = more
	}
	for v, n := range promised {
		v.reserved.Add(n)
	}
	now := time.Now().UnixNano()
	olds, heads := make([]*layer, len(all)), make([]*layer, len(all))
	for i, v := range all {
		old := v.head.Load()
		head := newLayer(p, layerRecord{id: p.nextLayer.Add(1) - 1, parent: old.id, flags: old.rec.flags, size: old.rec.size,
			created: old.rec.created, uuid: v.id, volume: v.id, name: v.name, labels: old.rec.labels})
		head.setParent(old)
		head.vol = v
		head.owed = true
		if v.thick.Load() {
			head.pay()
		}
		olds[i], heads[i] = old, head
	}

	pauseAll(all)
	p.captureMu.Lock()
	full := false
	for i, v := range all {
		v.head.Store(heads[i])
		olds[i].unpay()
		full = p.note(heads[i].id, olds[i].id, pendingFreeze, 0) || full
	}
	p.freezes = append(p.freezes, freeze{heads, func(b []byte) []byte {
		for i, old := range olds {
			old.rec.flags = layerFrozen
			old.rec.uuid, old.rec.name, old.rec.labels, old.rec.created = uuid.New(), snapshot, maps.Clone(labels), now
			p.storeRecord(old)
			p.storeRecord(heads[i])
			b = appendLayerRecord(appendLayerRecord(b, &old.rec), &heads[i].rec)
		}
		return b
	}})
	p.captureMu.Unlock()
	if full {
		_ = p.commitAll() // before anything can be written to the new heads; commitTxn below tells of a failure
	}
	for _, v := range all {
		v.resume()
	}

	for i, old := range olds {
		old.vol = nil
		old.children = 1
		p.layers[heads[i].id] = heads[i]
	}
	if err := p.commitTxn(func(b []byte) []byte { return b }); err != nil {
		return nil, err
	}
	infos := make([]SnapshotInfo, len(all))
	for i, v := range all {
		p.snapshotsOf(v.id).byName[snapshot] = olds[i]
		v.renameLayers()
		infos[i] = p.snapshotInfo(olds[i], v.name)
	}
	return infos, nil
}

// checkSnapshots finds the volumes of a group, and says why it cannot be. The records
// of their new heads count as owed from then on. mu is held.
func (p *Pool) checkSnapshots(snapshot string, volumes []string, labels map[string]string) ([]*volume, error) {
	if len(volumes) == 0 {
		return nil, fmt.Errorf("snapshot %s: of no volume: %w", snapshot, ErrInvalid)
	}
	var all []*volume
	records := 0 // bytes
	for _, name := range volumes {
		v := p.volumes[name]
		switch {
		case v == nil:
			return nil, fmt.Errorf("volume %s: %w", name, ErrNotFound)
		case slices.Contains(all, v):
			return nil, fmt.Errorf("snapshot %s: volume %s is named twice: %w", snapshot, name, ErrInvalid)
		case p.snapshotsOf(v.id).byName[snapshot] != nil:
			return nil, fmt.Errorf("snapshot %s@%s: %w", name, snapshot, ErrExists)
		}
		if err := checkLabels("snapshot "+name+"@"+snapshot, labels); err != nil {
			return nil, err
		}
		all = append(all, v)
		rec := v.head.Load().rec
		records += len(appendLayerRecord(nil, &rec))
		rec.name, rec.labels = snapshot, labels
		records += len(appendLayerRecord(nil, &rec))
	}
	if records > p.journal.chunkMax() {
		return nil, fmt.Errorf("snapshot %s: %d volumes are more than one step can keep: make groups of fewer: %w", snapshot, len(volumes), ErrInvalid)
	}
	if err := p.writable(); err != nil {
		return nil, err
	}
	if !p.alloc.owe(int64(len(all))) {
		return nil, fmt.Errorf("snapshot %s@%s: no room for its record: %w", volumes[0], snapshot, ErrNoSpace)
	}
	return all, nil
}

// Snapshots describes the snapshots of a volume, oldest first; "" for all volumes.
func (p *Pool) Snapshots(name string) ([]SnapshotInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	infos := []SnapshotInfo{}
	for _, v := range p.sortedVolumes() {
		if name != "" && v.name != name {
			continue
		}
		infos = append(infos, p.snapshotsInfo(v)...)
	}
	if name != "" && p.volumes[name] == nil {
		return nil, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	return infos, nil
}

func (p *Pool) snapshotsInfo(v *volume) []SnapshotInfo {
	var layers []*layer
	if s := p.snapshots[v.id]; s != nil {
		for _, l := range s.byName {
			layers = append(layers, l)
		}
	}
	sort.Slice(layers, func(i, j int) bool { return layers[i].id < layers[j].id })
	infos := make([]SnapshotInfo, 0, len(layers))
	for _, l := range layers {
		infos = append(infos, p.snapshotInfo(l, v.name))
	}
	return infos
}

func (p *Pool) snapshotInfo(l *layer, volume string) SnapshotInfo {
	i := SnapshotInfo{Volume: volume, Name: l.rec.name, UUID: l.rec.uuid, Size: l.rec.size, Created: time.Unix(0, l.rec.created),
		Labels: maps.Clone(l.rec.labels), Allocated: uint64(l.owned.Load()) << clusterShift}
	if l.vol != nil {
		i.Open = l.vol.opens
	}
	for _, v := range p.sortedVolumes() {
		if v.id == l.rec.volume {
			continue
		}
		for x := v.head.Load().parent.Load(); x != nil; x = x.parent.Load() {
			if x.rec.flags&layerHidden == 0 {
				if x == l {
					i.Clones = append(i.Clones, v.name)
				}
				break
			}
		}
	}
	return i
}

// DeleteSnapshot removes a snapshot nobody has open. The job gives its space back.
func (p *Pool) DeleteSnapshot(name, snapshot string) (Job, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, l, err := p.findSnapshot(name, snapshot)
	if err != nil {
		return Job{}, err
	}
	if l.vol != nil && l.vol.opens > 0 {
		return Job{}, fmt.Errorf("snapshot %s@%s: %d client(s) have it open: %w", name, snapshot, l.vol.opens, ErrInUse)
	}
	if err := p.commitTxn(func(b []byte) []byte { return p.hide(b, l) }); err != nil {
		return Job{}, err
	}
	l.vol = nil
	delete(p.snapshotsOf(v.id).byName, snapshot)
	v.renameLayers()
	l.job = p.jobs.begin(p, JobMerge, name+"@"+snapshot, uint64(l.owned.Load())<<clusterShift)
	if l.children > 1 {
		l.job.note("several volumes or snapshots stand on it: its space comes back when all but one of them are deleted")
	}
	j := l.job.snapshot()
	p.startMerging()
	return j, nil
}

// Revert makes a volume nobody has open what a snapshot of it is. Newer snapshots
// stay.
func (p *Pool) Revert(name, snapshot string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, l, err := p.findSnapshot(name, snapshot)
	if err != nil {
		return err
	}
	if v.opens > 0 {
		return fmt.Errorf("volume %s: %d client(s) have it open: %w", name, v.opens, ErrInUse)
	}
	old := v.head.Load()
	rec := old.rec
	rec.id, rec.parent, rec.size = p.nextLayer.Add(1)-1, l.id, max(old.rec.size, l.rec.size)
	head := newLayer(p, rec)
	head.setParent(l)
	head.vol = v
	if !p.alloc.owe(1) {
		return fmt.Errorf("volume %s: no room for its record: %w", name, ErrNoSpace)
	}
	head.owed = true
	if v.thick.Load() {
		more := int64(clustersOf(rec.size)) - v.reserved.Load()
		if !p.alloc.promise(more, head.pay()) {
			p.alloc.owed.Add(-1)
			return fmt.Errorf("volume %s: is thick, and %d bytes more cannot be reserved: %w", name, more<<clusterShift, ErrNoSpace)
		}
		v.reserved.Add(more)
	}
	if err := p.commitTxn(func(b []byte) []byte {
		p.storeRecord(head)
		p.dropPairs(old)
		return appendRecord(appendLayerRecord(b, &head.rec), recordRemove, old.id)
	}); err != nil {
		return err
	}
	l.children++
	p.layers[head.id] = head
	v.head.Store(head)
	v.renameLayers()
	p.removeLayer(old)
	p.startFreeing(old, p.jobs.begin(p, JobDelete, name+" (reverted)", uint64(old.owned.Load())<<clusterShift))
	p.startMerging()
	return nil
}

// Map says where a volume's bytes are.
func (p *Pool) Map(name string) (MapInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	if v == nil {
		return MapInfo{}, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	head := v.head.Load()
	i := MapInfo{Volume: name, Size: v.size.Load(), Exclusive: uint64(head.owned.Load()) << clusterShift, Snapshots: p.snapshotsInfo(v)}
	i.Reclaimable = i.Exclusive
	others := map[*layer]bool{} // layers that volumes or snapshots of other volumes need
	for _, o := range p.volumes {
		if o != v {
			for x := o.head.Load(); x != nil; x = x.parent.Load() {
				others[x] = true
			}
		}
	}
	for x := head.parent.Load(); x != nil; x = x.parent.Load() {
		i.Shared += uint64(x.owned.Load()) << clusterShift
		if !others[x] && x.rec.volume == v.id {
			i.Reclaimable += uint64(x.owned.Load()) << clusterShift
		}
	}
	clusters := uint32(clustersOf(i.Size))
	for c := uint32(0); c < clusters; {
		if n := head.emptyRun(uint64(c)<<clusterShift, uint64(clusters)<<clusterShift); n > 0 {
			c += uint32(n >> clusterShift)
			continue
		}
		i.Mapped += blocksIn(head.visible(c)) * blockSize
		c++
	}
	return i, nil
}

// Changes lists what differs between a snapshot (since; "" for an empty volume)
// and a later snapshot of the same line (until; "" for the volume as it is now),
// from offset on, at most limit runs; next is where to go on, the size at the end.
// What was written with the same content counts as changed.
func (p *Pool) Changes(name, since, until string, offset uint64, limit int) (changes []Change, next uint64, err error) {
	p.mu.Lock()
	v := p.volumes[name]
	if v == nil {
		p.mu.Unlock()
		return nil, 0, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	from, to := (*layer)(nil), v.head.Load()
	if since != "" {
		if _, from, err = p.findSnapshot(name, since); err != nil {
			p.mu.Unlock()
			return nil, 0, err
		}
	}
	if until != "" {
		if _, to, err = p.findSnapshot(name, until); err != nil {
			p.mu.Unlock()
			return nil, 0, err
		}
	}
	size := to.rec.size
	p.mu.Unlock()
	if from != nil && !to.standsOn(from) {
		return nil, 0, fmt.Errorf("volume %s: %s is not older than %s in one line of snapshots: %w", name, since, orNow(until), ErrInvalid)
	}
	limit = max(limit, 1)
	for next = offset &^ (blockSize - 1); next < size; {
		n, changed, zero := to.changedRun(next, size, from)
		if changed {
			if k := len(changes) - 1; k >= 0 && changes[k].Zero == zero && changes[k].Offset+changes[k].Length == next {
				changes[k].Length += n
			} else if len(changes) == limit {
				return changes, next, nil
			} else {
				changes = append(changes, Change{Offset: next, Length: n, Zero: zero})
			}
		}
		next += n
	}
	return changes, size, nil
}

func orNow(snapshot string) string {
	if snapshot == "" {
		return "the volume"
	}
	return snapshot
}

// standsOn reports whether l is from or comes after it.
func (l *layer) standsOn(from *layer) bool {
	return l == from || l.chain.Load().has(from)
}

// changedRun says whether the block at offset was changed after from was frozen,
// whether it now reads as zeros for want of data, and how far that goes at least.
func (l *layer) changedRun(offset, size uint64, from *layer) (n uint64, changed, zero bool) {
	p := l.p
	v, b := uint32(offset>>clusterShift), uint32(offset%clusterSize/blockSize)
	for {
		began := p.merges.Load()
		if began&1 != 0 {
			continue
		}
		var touched, covered, data uint32
		const pageBytes = mapEntries << clusterShift
		empty, below := true, true
		for x := l; x != nil; x = x.parent.Load() {
			if x == from {
				below = false
			}
			if table := *x.table.Load(); int(v/mapEntries) >= len(table) || table[v/mapEntries].Load() == nil {
				continue
			}
			empty = false
			e := x.lookup(v)
			data |= e.mask() &^ covered
			if below {
				touched |= e.mask()
				if e.zero() {
					touched = wholeMask
				}
			}
			covered |= e.mask()
			if e.zero() {
				covered = wholeMask
			}
		}
		if p.merges.Load() != began {
			continue
		}
		if empty {
			return min(size, (offset/pageBytes+1)*pageBytes) - offset, false, false
		}
		changed, zero = touched&(1<<b) != 0, data&(1<<b) == 0
		same := touched
		if !changed {
			same = ^touched
		} else if zero {
			same &= ^data
		} else {
			same &= data
		}
		return min(uint64(run(same, b))*blockSize, clusterSize-uint64(b)*blockSize, size-offset), changed, zero && changed
	}
}
