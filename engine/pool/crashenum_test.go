package pool

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// longTests says that everything is to be tried, not a sample of it.
var longTests = os.Getenv("ASHLAR_TEST_LONG") == "1"

// crashSeconds is how long a sample of the sequences is tried: ASHLAR_TEST_SECONDS, or
// a short time. What is always tried is not bound by it.
func crashSeconds() time.Duration {
	if n, err := strconv.Atoi(os.Getenv("ASHLAR_TEST_SECONDS")); err == nil {
		return time.Duration(n) * time.Second
	}
	if longTests {
		return 10 * time.Minute
	}
	if raceEnabled {
		return 6 * time.Second
	}
	return 12 * time.Second
}

// bases are the pools the scripts begin with.
func (l *lab) bases() []base {
	return []base{
		l.makeBase("fresh", 1, 10<<20, "", nil),
		l.makeBase("aged", 1, 10<<20, "xwofsobf", nil),
		l.makeBase("two disks", 2, 6<<20, "xwofsobf", nil),
		// The journal is about to be checkpointed and near the end of its ring.
		l.makeBase("brim", 1, 10<<20, "xwofsof", func(m *machine) {
			for m.pool.journal.next.Load()%m.pool.journal.blocks != 58 {
				if err := m.pool.SetLabels("b", nil); err != nil {
					l.Fatal(err)
				}
			}
			for m.pool.journal.used() < m.pool.journal.capacity()/2-3*pageSize {
				if err := m.pool.SetLabels("b", nil); err != nil {
					l.Fatal(err)
				}
			}
		}),
		// Hardly a cluster is free: what is freed is used again at once.
		l.makeBase("full", 1, 10<<20, "xwofsof", func(m *machine) {
			for i := uint64(40); i < 128; i++ { // until there is no space
				m.change("fill", "b", datapath.Request{Op: datapath.OpWrite, Offset: i * clusterSize, Length: blockSize})
			}
			m.change("fill", "b", datapath.Request{Op: datapath.OpFlush})
		}),
	}
}

// scripts are all sequences of length of some operations.
func scripts(alphabet string, length int) []string {
	list := []string{""}
	for range length {
		var longer []string
		for _, s := range list {
			for i := range len(alphabet) {
				longer = append(longer, s+alphabet[i:i+1])
			}
		}
		list = longer
	}
	return list
}

// chosen are sequences that are always tried: what a checkpoint cuts, clusters that
// are freed and used again by another volume, orders of deletion, and clones.
var chosen = []string{
	"tb", "tfb", "tmb", "tfbf", "zob", "twbt",
	"som", "sdm", "swdm", "swsdm", "swswem", "sosodm", "socdm", "scoDm", "scocodDm", "socoedm", "scoDDm",
	"soRm", "swRfm", "rwm", "rwfm", "rswdm", "mwom", "oum", "xmx", "smRm", "dtm", "etfm", "stdm", "sztdm",
	"ofk", "ok", "wfk", "ukw", "uu", "wuf",
	"wS", "Sw", "wbS", "SdmS", "SbSm", "wSDm",
}

// sequence is a script on one of the bases.
type sequence struct {
	base int
	ops  string
}

// crashAfter crashes in the last operation of each sequence, until end where that is
// not zero, and returns how many it has tried; prepare tunes each worker. Any failure
// ends it.
func crashAfter(t *testing.T, seed uint64, all []sequence, end time.Time, o memdisk.ImageOptions, prepare func(l *lab)) (tried int) {
	t.Helper()
	var mu sync.Mutex
	images := 0
	began := time.Now()
	var next atomic.Int64
	t.Run("all", func(t *testing.T) {
		bases := newLab(t).bases()
		const workers = 6 // they mostly wait for their reactors
		for worker := range workers {
			t.Run(fmt.Sprint(worker), func(t *testing.T) {
				t.Parallel()
				l := newLab(t)
				prepare(l)
				for i := int(next.Add(1)) - 1; i < len(all) && (end.IsZero() || time.Now().Before(end)) && !t.Failed(); i = int(next.Add(1)) - 1 {
					w, o, before := all[i], o, l.images
					o.Seed = seed + uint64(i)
					l.crashes(bases[w.base], w.ops, o, true, true)
					mu.Lock()
					images += l.images - before
					if tried++; tried%100 == 0 {
						t.Logf("%d of %d sequences, %d images, %v", tried, len(all), images, time.Since(began).Round(time.Second))
					}
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%d of %d sequences, %d images", tried, len(all), images)
	return tried
}

// Without ASHLAR_TEST_LONG only some moments of each sequence are looked at, and few
// images are used on.
func sampled(l *lab) {
	l.again = 1009
	if !longTests {
		l.deep, l.again, l.cuts = 5, 211, 6
	}
}

// imagesOf is which images of each moment are looked at.
func imagesOf(long bool) memdisk.ImageOptions {
	o := memdisk.ImageOptions{Subsets: 3, Each: 4, Random: 2, Torn: 1, Masks: 1}
	if !long {
		o.Subsets, o.Each, o.Random = 2, 2, 1
	}
	return o
}

// TestCrashAfterChosenSequences crashes in the last operation of sequences that are
// known to be hard, and of each operation alone. All of them, however long it takes.
func TestCrashAfterChosenSequences(t *testing.T) {
	seed := devtest.Seed(t)
	var all []sequence
	for i := range len(alphabet) {
		all = append(all, sequence{i % 5, alphabet[i : i+1]}, sequence{(i + 2) % 5, alphabet[i : i+1]})
	}
	for i, ops := range chosen {
		all = append(all, sequence{1 + i%4, ops})
	}
	for _, ops := range []string{"tb", "tfb", "tmb", "tbf", "sdmb", "soRb", "Db"} {
		all = append(all, sequence{4, ops})
	}
	if tried := crashAfter(t, seed, all, time.Time{}, imagesOf(longTests), sampled); tried != len(all) && !t.Failed() {
		t.Errorf("%d of %d sequences were tried", tried, len(all))
	}
}

// TestCrashAfterSomeSequences is the same for as many of all sequences of up to three
// operations as crashSeconds gives it time for, in an order by the seed; of up to four,
// the short ones first, when ASHLAR_TEST_LONG is 1. It is a sample.
func TestCrashAfterSomeSequences(t *testing.T) {
	seed := devtest.Seed(t)
	var all []sequence
	lengths := 3
	if longTests {
		lengths = 4
	}
	for length := 1; length <= lengths; length++ {
		for _, ops := range scripts(alphabet, length) {
			for b := range 5 {
				all = append(all, sequence{b, ops})
			}
		}
	}
	random := rand.New(rand.NewPCG(seed, 1))
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	if longTests {
		slices.SortStableFunc(all, func(a, b sequence) int { return len(a.ops) - len(b.ops) })
	}
	crashAfter(t, seed, all, time.Now().Add(crashSeconds()), imagesOf(longTests), sampled)
}

// basic are the operations of which every sequence is tried: write, overwrite, write
// with FUA, flush, trim, write zeros, snapshot, delete a snapshot, clone, resize, merge.
const basic = "woufztsdcrm"

// TestCrashAfterEverySequence crashes at every event of every sequence of up to three
// basic operations on a pool that has been used: 1,463 of them, without a limit of time.
// The events of all operations but the last are those of a shorter sequence.
func TestCrashAfterEverySequence(t *testing.T) {
	if target := "test-pool-long"; !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), target) {
		t.Skip("takes hours; make " + target + " runs it")
	}
	seed := devtest.Seed(t)
	var all []sequence
	for length := 1; length <= 3; length++ {
		for _, ops := range scripts(basic, length) {
			all = append(all, sequence{1, ops})
		}
	}
	if len(all) != 11+11*11+11*11*11 {
		t.Fatalf("%d sequences", len(all))
	}
	if tried := crashAfter(t, seed, all, time.Time{}, imagesOf(true), func(l *lab) { l.again = 1009 }); tried != len(all) && !t.Failed() {
		t.Errorf("%d of %d sequences were tried", tried, len(all))
	}
}

// TestCheckpointTornEverywhere loses power in a checkpoint when every write that may
// be torn is: of each the first sector is kept, or all but the first. Both copies of
// a page must never be among them.
func TestCheckpointTornEverywhere(t *testing.T) {
	l := newLab(t)
	b := l.makeBase("aged", 1, 10<<20, "xwofsom", nil)
	m, disks, trace := l.run(b, "bbbuom", false) // entries in several sectors of a page are new
	o := memdisk.ImageOptions{Subsets: 1, Each: -1, Random: -1, Torn: -1, Repeat: true}
	o.Only = func(c memdisk.Cut) bool {
		return c.Mark >= 11 && c.Index < len(trace) && trace[c.Index].Op == datapath.OpFlush
	}
	for image := range disks.Images(trace, o) {
		if !strings.HasSuffix(image.String(), "kept nothing") {
			continue
		}
		for _, first := range []bool{true, false} {
			group := image.Group()
			for i := image.Cut.Index - 1; i >= 0 && trace[i].Op != datapath.OpFlush; i-- {
				e := trace[i]
				if e.Op != datapath.OpWrite || e.FUA {
					continue
				}
				if first {
					group.Disk(0).Poke(e.Offset, e.Data[:sectorSize])
				} else {
					group.Disk(0).Poke(e.Offset+sectorSize, e.Data[sectorSize:])
				}
			}
			if err := l.survives(group, "", m.steps[image.Cut.Mark], powerLoss); err != nil {
				t.Fatalf("%s, all else torn:\n\t%v\n%s", image, err, memdisk.Script(trace))
			}
		}
	}
	t.Logf("%d images", l.images)
}

// TestReadsThatWaitForChecksumsAllEnd reads one region many times at once when its
// checksums are not in memory: most reads wait for one of a few loaders, and then do
// not need it.
func TestReadsThatWaitForChecksumsAllEnd(t *testing.T) {
	l := newLab(t)
	b := l.makeBase("b", 1, 10<<20, "", func(m *machine) {
		for i := range uint64(loaderCount) {
			m.change("w", "b", datapath.Request{Op: datapath.OpWrite, Offset: i * clusterSize, Length: 8 * blockSize})
		}
		if err := m.pool.Maintain(); err != nil {
			t.Fatal(err)
		}
	})
	s := l.mustSession(b.group, "")
	d, err := s.pool.OpenVolume("b")
	if err != nil {
		t.Fatal(err)
	}
	c := devtest.NewClient(t, l.r, d, 4*loaderCount)
	var requests []*datapath.Request
	for i := range uint64(4 * loaderCount) {
		requests = append(requests, &datapath.Request{Op: datapath.OpRead, Offset: i/4*clusterSize + i%4*2*blockSize, Length: blockSize, Buf: alignedBytes(blockSize)})
	}
	c.Do(requests...)
	for _, r := range requests {
		if r.Status != datapath.StatusOK {
			t.Errorf("read at %d: %v", r.Offset, r.Status)
		}
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	s.close()
}

// manyEntries are enough changes of the map that a commit takes several groups of
// the journal.
const (
	manyEntries = 5 * mapEntries
	manySize    = manyEntries << clusterShift
)

// manyBase is a pool with room for them, and many changes to write.
func (l *lab) manyBase() base {
	return l.makeBase("many", 1, manySize+(32<<20), "", func(m *machine) {
		if err := m.pool.Resize("v", manySize); err != nil {
			l.Fatal(err)
		}
		m.model.volumes["v"].size = manySize
	})
}

// writeMany maps a block in each cluster of v, without a flush.
func (m *machine) writeMany() {
	m.Helper()
	c, v := m.client("v"), m.model.volumes["v"]
	for i := uint64(0); i < manyEntries; i += 8 {
		var requests []datapath.Request
		for j := i; j < min(i+8, manyEntries); j++ {
			m.next++
			requests = append(requests, write(m.next, j<<clusterShift, blockSize, 0))
			v.complete(j<<clusterShift, blockSize, m.next, false)
		}
		if s := c.do(requests...); s != datapath.StatusOK {
			m.Fatal(s)
		}
	}
}

// TestSnapshotIsOnePointThoughItsCommitTakesSeveralGroups loses power while the
// commit of a snapshot writes one group after the other: the snapshot must not be
// there without what was written before it.
func TestSnapshotIsOnePointThoughItsCommitTakesSeveralGroups(t *testing.T) {
	l := newLab(t)
	l.deep = 1000
	b := l.manyBase()
	group := b.group.Clone()
	m := &machine{session: l.mustSession(group, ""), model: b.model.clone(), next: b.next, count: map[byte]int{}}
	m.writeMany()
	disks := group.StartTrace()
	before := m.model.clone()
	m.steps = []step{{"start", []*model{before}}}
	m.do('s')
	trace := group.StopTrace()
	m.kill()
	for image := range disks.Images(trace, memdisk.ImageOptions{Subsets: 1, Each: 1, Random: -1, Torn: -1}) {
		if err := l.survives(image.Group(), "", m.steps[image.Cut.Mark], powerLoss); err != nil {
			t.Fatalf("%s: %v\n%s", image, err, memdisk.Script(trace))
		}
	}
}

// TestDeathBetweenTheGroupsOfAMerge kills the process while a merge and many other
// changes are written: a cluster that was given up before the merge must not take
// what the merge has put in its place.
func TestDeathBetweenTheGroupsOfAMerge(t *testing.T) {
	l := newLab(t)
	b := l.manyBase()
	group := b.group.Clone()
	m := &machine{model: b.model.clone(), next: b.next, count: map[byte]int{}}
	var kills []deathMoment
	keep := false
	s, err := l.session(group, l.log, func(r *datapath.Request) {
		if keep && r.Op != datapath.OpRead {
			b, err := os.ReadFile(l.log)
			if err != nil {
				t.Error(err)
			}
			kills = append(kills, deathMoment{group: group.Clone(), pending: b, event: fmt.Sprintf("before %v %d @ %d", r.Op, r.Length, r.Offset)})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	m.session = s
	const at = uint64(manySize - 2*clusterSize)
	request := func(op datapath.Op, offset, length uint64) datapath.Request {
		return datapath.Request{Op: op, Offset: offset, Length: length}
	}
	m.change("below", "v", request(datapath.OpWrite, at+blockSize, blockSize))
	m.do('s')
	m.change("above", "v", request(datapath.OpWrite, at, blockSize))
	m.do('d')
	m.change("gone", "v", request(datapath.OpDiscard, at, blockSize))
	for i := uint64(0); i < manyEntries-mapEntries; i += 8 {
		var requests []datapath.Request
		for j := i; j < i+8; j++ {
			requests = append(requests, request(datapath.OpWrite, j<<clusterShift, blockSize))
		}
		m.change("other", "v", requests...)
	}
	if err := s.r.Run(func(*reactor.Reactor) { keep = true }); err != nil {
		t.Fatal(err)
	}
	if err := s.pool.mergeAll(); err != nil {
		t.Fatal(err)
	}
	if err := s.r.Run(func(*reactor.Reactor) { keep = false }); err != nil {
		t.Fatal(err)
	}
	s.kill()
	l.deep = 1000
	for _, k := range kills {
		if err := l.survives(k.group, l.writeLog(k.pending), step{"merge", []*model{m.model}}, processDeath); err != nil {
			t.Fatalf("%s: %v", k.event, err)
		}
	}
}

// TestDeathDuringRecoveryKeepsWhatHadCompleted kills the process again while it
// recovers from its first death.
func TestDeathDuringRecoveryKeepsWhatHadCompleted(t *testing.T) {
	l := newLab(t)
	b := l.makeBase("aged", 1, 10<<20, "xwofsobf", nil)
	for _, ops := range []string{"w", "t", "sw", "dmz"} {
		if raceEnabled && ops != "sw" {
			continue
		}
		m, _, _ := l.run(b, ops, true)
		for _, k := range m.kills {
			if err := l.recoveries(k.group.Clone(), k.pending, m.steps[k.mark], processDeath, memdisk.ImageOptions{}); err != nil {
				t.Fatalf("%s %s, death of the process %s:\n\t%v", ops, m.steps[k.mark].what, k.event, err)
			}
		}
	}
}
