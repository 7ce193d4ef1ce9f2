package memdisk

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

const (
	modelSectors = 12
	modelSize    = modelSectors * sector
)

// modelTrace draws requests, some of them together in one turn, and returns what
// was recorded of them.
func modelTrace(t *testing.T, rt *rapid.T, r *reactor.Reactor, disks, events int) (base *Group, trace []Event) {
	var configs []Config
	for range disks {
		configs = append(configs, Config{Size: modelSize})
	}
	g := NewGroup(configs...)
	var clients []*devtest.Client
	for _, d := range g.Disks() {
		clients = append(clients, devtest.NewClient(t, r, d, 8))
	}
	letter := byte('a')
	step := func() {
		k := rapid.IntRange(0, disks-1).Draw(rt, "disk")
		var batch []*datapath.Request
		for range rapid.IntRange(1, 3).Draw(rt, "together") {
			at := rapid.IntRange(0, modelSectors-1).Draw(rt, "at")
			n := rapid.IntRange(1, min(3, modelSectors-at)).Draw(rt, "sectors")
			flags := datapath.Flags(0)
			if rapid.IntRange(0, 4).Draw(rt, "fua") == 0 {
				flags = datapath.FlagFUA
			}
			switch rapid.IntRange(0, 9).Draw(rt, "op") {
			case 0, 1:
				batch = append(batch, flush())
			case 2:
				batch = append(batch, zero(uint64(at)*sector, uint64(n)*sector, flags))
			case 3:
				batch = append(batch, &datapath.Request{Op: datapath.OpDiscard, Flags: flags, Offset: uint64(at) * sector, Length: uint64(n) * sector})
			case 4:
				g.Mark(string(letter))
			case 5:
				g.Disk(k).Poke(uint64(at)*sector, letters('*', n))
			default:
				batch = append(batch, write(uint64(at)*sector, letters(letter, n), flags))
				letter++
			}
		}
		clients[k].Do(batch...)
	}
	for range rapid.IntRange(0, 2).Draw(rt, "before") {
		step()
	}
	base = g.StartTrace()
	for len(g.Trace()) < events {
		step()
	}
	for _, c := range clients {
		c.Close()
	}
	return base, g.StopTrace()
}

// moments are the cuts of a trace as the model sees them: events, and the number
// of the last one whose consequences have to be there.
func moments(trace []Event) (cuts []Cut) {
	var c Cut
	cuts = append(cuts, c)
	for i, e := range trace {
		c.Index = i + 1
		if e.Op == OpMark {
			c.Mark, c.Label = e.Mark, e.Label
		}
		cuts = append(cuts, c)
	}
	c.Settled = true
	return append(cuts, c)
}

// modelChange is a change in the model: a letter on sectors.
type modelChange struct {
	disk        int
	from, count int
	letter      byte
	durable     bool
}

// modelChanges lists the changes up to a cut, oldest first.
func modelChanges(base *Group, trace []Event, cut Cut) (changes []modelChange) {
	now := uint64(0)
	if cut.Index > 0 {
		now = trace[cut.Index-1].Seq
	}
	complete := func(e Event) bool { return e.Ended != 0 && (e.Ended < now || cut.Settled) }
	covered := func(disk int, ended uint64) bool {
		return slices.ContainsFunc(trace[:cut.Index], func(f Event) bool {
			return f.Op == datapath.OpFlush && f.Disk == disk && complete(f) && ended != 0 && ended < f.Seq
		})
	}
	for k, d := range base.Disks() {
		for _, c := range d.medium.log {
			letter := byte('.')
			if c.data != nil {
				letter = c.data[0]
			}
			changes = append(changes, modelChange{k, int(c.offset / sector), int(c.length / sector), letter, c.durable || covered(k, c.ended)})
		}
	}
	for _, e := range trace[:cut.Index] {
		m := modelChange{disk: e.Disk, from: int(e.Offset / sector), count: int(e.Length / sector), letter: '.'}
		switch e.Op {
		case datapath.OpWrite:
			m.letter = e.Data[0]
		case OpPoke:
			m.letter, m.durable = e.Data[0], true
		case datapath.OpDiscard, datapath.OpWriteZeroes:
		default:
			continue
		}
		m.durable = m.durable || e.FUA && complete(e) || covered(e.Disk, e.Ended)
		changes = append(changes, m)
	}
	return changes
}

func contents(t testing.TB, g *Group) (all string) {
	for _, d := range g.Disks() {
		all += text(t, d.Bytes(0, modelSize)) + "|"
	}
	return all
}

// durableBase is the base without its log.
func durableBase(t testing.TB, base *Group) [][]byte {
	var all [][]byte
	for _, d := range base.Clone().Disks() {
		d.medium.log = nil
		all = append(all, []byte(text(t, d.Durable(0, modelSize))))
	}
	return all
}

// TestSubsetsAreComplete compares the images of small traces with all subsets of
// what may be lost, worked out the slow way.
func TestSubsetsAreComplete(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	rapid.Check(t, func(rt *rapid.T) {
		disks := rapid.IntRange(1, 2).Draw(rt, "disks")
		base, trace := modelTrace(t, rt, r, disks, 8)
		before := durableBase(t, base)
		type key struct {
			cut     Cut
			content string
		}
		want := make(map[key]bool)
		for _, cut := range moments(trace) {
			changes := modelChanges(base, trace, cut)
			var pending []int
			for i, c := range changes {
				if !c.durable {
					pending = append(pending, i)
				}
			}
			image := func(lost func(i int) bool, oldest bool) {
				var all string
				for k := range disks {
					for s := range modelSectors {
						letter, settled := before[k][s], true
						for i, c := range changes {
							if c.disk != k || s < c.from || s >= c.from+c.count || lost(i) {
								continue
							}
							if c.durable || !oldest || settled {
								letter, settled = c.letter, c.durable
							}
						}
						all += string(letter)
					}
					all += "|"
				}
				want[key{cut, all}] = true
			}
			for bits := range 1 << len(pending) {
				image(func(i int) bool { at := slices.Index(pending, i); return at >= 0 && bits>>at&1 == 1 }, false)
			}
			image(func(int) bool { return false }, true)
		}
		got := make(map[key]bool)
		for im := range base.Images(trace, ImageOptions{Subsets: 20, Torn: -1, Random: -1, Repeat: true}) {
			got[key{im.Cut, contents(t, im.Group())}] = true
		}
		for k := range want {
			if !got[k] {
				rt.Fatalf("cut %+v lacks the image %s\n%s", k.cut, k.content, Script(trace))
			}
		}
		for k := range got {
			if !want[k] {
				rt.Fatalf("cut %+v has an image that cannot be: %s\n%s", k.cut, k.content, Script(trace))
			}
		}
		// Without Repeat the same content is seen under the same mark.
		for im := range base.Images(trace, ImageOptions{Subsets: 20, Torn: -1, Random: -1}) {
			c := contents(t, im.Group())
			for k := range got {
				if k.content == c && k.cut.Mark == im.Cut.Mark {
					delete(got, k)
				}
			}
		}
		for k := range got {
			rt.Fatalf("mark %d: the image %s of cut %d is left out\n%s", k.cut.Mark, k.content, k.cut.Index, Script(trace))
		}
	})
}

// legal checks an image sector by sector: the last durable change, or any change
// after it.
func legal(before [][]byte, changes []modelChange, content string) error {
	for k, disk := range strings.Split(strings.TrimSuffix(content, "|"), "|") {
		for s := range modelSectors {
			allowed := []byte{before[k][s]}
			for _, c := range changes {
				if c.disk != k || s < c.from || s >= c.from+c.count {
					continue
				}
				if c.durable {
					allowed = allowed[:0]
				}
				allowed = append(allowed, c.letter)
			}
			if !slices.Contains(allowed, disk[s]) {
				return fmt.Errorf("disk %d, sector %d holds %c, may be %q, in %s", k, s, disk[s], allowed, content)
			}
		}
	}
	return nil
}

func TestEveryImageIsLegal(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	rapid.Check(t, func(rt *rapid.T) {
		base, trace := modelTrace(t, rt, r, rapid.IntRange(1, 3).Draw(rt, "disks"), 14)
		before := durableBase(t, base)
		o := ImageOptions{Subsets: 3, Seed: rapid.Uint64().Draw(rt, "seed")}
		var last Cut
		for im := range base.Images(trace, o) {
			if im.Cut.Index < last.Index || im.Cut.Mark < last.Mark {
				rt.Fatalf("cut %+v after %+v", im.Cut, last)
			}
			last = im.Cut
			if err := legal(before, modelChanges(base, trace, im.Cut), contents(t, im.Group())); err != nil {
				rt.Fatalf("%s: %v\n%s", im, err, Script(trace))
			}
		}
	})
}

// TestLiveCrashIsLegal is the same for Crash, of a disk that is in use.
func TestLiveCrashIsLegal(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	rapid.Check(t, func(rt *rapid.T) {
		base, trace := modelTrace(t, rt, r, 2, 10)
		before := durableBase(t, base)
		// Replay on the base itself, then crash clones of it.
		w := &walk{group: base.Clone(), trace: trace, options: &ImageOptions{Only: func(Cut) bool { return false }}}
		w.run()
		changes := modelChanges(base, trace, Cut{Index: len(trace), Settled: true})
		for seed := range uint64(10) {
			g := w.group.Clone()
			g.Crash(seed)
			if err := legal(before, changes, contents(t, g)); err != nil {
				rt.Fatalf("seed %d: %v\n%s", seed, err, Script(trace))
			}
		}
	})
}

func manyWrites(t *testing.T, n int) (base *Group, trace []Event) {
	g := newRig(t, Config{Size: 1 << 20})
	base = g.StartTrace()
	for i := range n {
		g.must(write(uint64(i)*4*sector, letters(byte('a'+i), 4), 0))
	}
	return base, g.Trace()
}

func TestSampleHasWhatItPromises(t *testing.T) {
	const n = 9
	base, trace := manyWrites(t, n)
	last := func(c Cut) bool { return c.Index == n }
	seen := make(map[string]bool)
	for im := range base.Images(trace, ImageOptions{Only: last, Random: 5, Seed: 7}) {
		s := text(t, im.Disk().Bytes(0, n*4*sector))
		if seen[s] {
			t.Errorf("twice: %s", s)
		}
		seen[s] = true
	}
	picture := func(kept func(i int) string) (s string) {
		for i := range n {
			for _, k := range kept(i) {
				if k == '.' {
					s += "."
				} else {
					s += string(rune('a' + i))
				}
			}
		}
		return s
	}
	must := []string{picture(func(int) string { return "...." }), picture(func(int) string { return "xxxx" })}
	for one := range n {
		must = append(must,
			picture(func(i int) string { return map[bool]string{true: "xxxx", false: "...."}[i == one] }),
			picture(func(i int) string { return map[bool]string{true: "....", false: "xxxx"}[i == one] }))
	}
	for _, torn := range []string{"x...", "xx..", "xxx.", "...x", "..xx", ".xxx"} {
		for _, one := range []int{n - 1, n - 2} {
			for _, others := range []string{"xxxx", "...."} {
				must = append(must, picture(func(i int) string {
					if i == one {
						return torn
					}
					return others
				}))
			}
		}
	}
	for _, m := range must {
		if !seen[m] {
			t.Errorf("missing: %s", m)
		}
	}
	if len(seen) < len(must)+5 {
		t.Errorf("%d images, want the %d that must be, 5 random ones and masks", len(seen), len(must))
	}
	few := 0
	for range base.Images(trace, ImageOptions{Only: last, Each: 2, Random: -1, Torn: -1}) {
		few++
	}
	if few != 2+2*2 {
		t.Errorf("%d images with Each 2", few)
	}
}

func TestImagesAreTheSameBySeed(t *testing.T) {
	base, trace := manyWrites(t, 8)
	sum := func(o ImageOptions) uint64 {
		h := fnv.New64a()
		for im := range base.Images(trace, o) {
			_, _ = fmt.Fprintln(h, im) // a hash takes everything
			_, _ = h.Write(im.Disk().Bytes(0, 8*4*sector))
		}
		return h.Sum64()
	}
	first := sum(ImageOptions{Seed: 1})
	if again := sum(ImageOptions{Seed: 1}); first != again {
		t.Error("one seed, two sets of images")
	}
	if first == sum(ImageOptions{Seed: 2}) {
		t.Error("the seed does not matter")
	}
}

func TestImagesOutliveTheIterationAndEachOther(t *testing.T) {
	base, trace := manyWrites(t, 6)
	var images []*Image
	var want []string
	for im := range base.Images(trace, ImageOptions{}) {
		images = append(images, im)
		want = append(want, text(t, im.Disk().Bytes(0, 6*4*sector)))
	}
	done := make(chan error)
	for i, im := range images { // each ends after its comparison
		go func() {
			d := im.Disk()
			d.Poke(0, letters('!', 24))
			if got := text(t, im.Disk().Bytes(0, 6*4*sector)); got != want[i] {
				done <- fmt.Errorf("%s: %s, was %s", im, got, want[i])
				return
			}
			done <- nil
		}()
	}
	for range images {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for range base.Images(trace, ImageOptions{}) {
		break // stopping early is allowed
	}
	if got := text(t, base.Disk(0).Bytes(0, 4*sector)); got != "...." {
		t.Errorf("the base changed: %s", got)
	}
}

func TestCutsOfAGroupAreOneMoment(t *testing.T) {
	g := newRig(t, Config{Size: modelSize}, Config{Size: modelSize})
	base := g.StartTrace()
	// The data goes to disk 1 and is flushed; then disk 0 points to it.
	g.clients[1].Write(0, letters('d', 2))
	g.clients[1].Flush()
	g.clients[0].Write(0, letters('p', 1))
	if n := g.Mark("written"); n != 1 {
		t.Errorf("mark %d", n)
	}
	g.clients[0].Flush()
	g.Disk(0).Mark("durable")
	trace := g.StopTrace()
	const script = "disk 1: write 1024 @ 0\ndisk 1: flush\ndisk 0: write 512 @ 0\nmark written\ndisk 0: flush\nmark durable\n"
	if got := Script(trace); got != script {
		t.Errorf("script:\n%s", got)
	}
	pointed := 0
	for im := range base.Images(trace, ImageOptions{}) {
		disks := im.Group().Disks()
		pointer, data := text(t, disks[0].Bytes(0, sector)), text(t, disks[1].Bytes(0, 2*sector))
		if pointer == "p" {
			pointed++
			if data != "dd" {
				t.Errorf("%s: points to %s", im, data)
			}
		}
		if im.Cut.Label == "durable" && pointer != "p" {
			t.Errorf("%s: lost what was durable", im)
		}
	}
	if pointed < 3 {
		t.Errorf("%d images with the pointer", pointed)
	}
	// Without the flush in between some image must show the pointer alone.
	broken := slices.DeleteFunc(slices.Clone(trace), func(e Event) bool { return e.Op == datapath.OpFlush && e.Disk == 1 })
	for i := range broken {
		broken[i].Seq = trace[0].Seq + uint64(i)
		broken[i].Ended = broken[i].Seq
	}
	found := false
	for im := range base.Images(broken, ImageOptions{}) {
		disks := im.Group().Disks()
		found = found || text(t, disks[0].Bytes(0, sector)) == "p" && text(t, disks[1].Bytes(0, 2*sector)) != "dd"
	}
	if !found {
		t.Error("a missing flush does not show")
	}
}

func TestScript(t *testing.T) {
	g := newRig(t, Config{Size: 1 << 20})
	d := g.Disk(0)
	if d.Mark("before") != 0 {
		t.Error("a mark without a trace")
	}
	g.must(write(0, letters('x', 1), 0))
	d.StartTrace()
	g.must(write(8192, letters('a', 8), datapath.FlagFUA), read(0, sector), flush())
	d.Mark("commit 1")
	g.must(zero(0, 4096, 0), &datapath.Request{Op: datapath.OpDiscard, Offset: 4096, Length: 4096})
	d.LoseWrite(func(e Event) bool { return e.Offset == 512 && e.Data[0] == 'l' })
	g.must(write(512, letters('l', 1), 0), write(512, letters('k', 1), 0))
	d.Misdirect(1<<20-512, nil)
	g.must(write(1024, letters('m', 2), 0))
	d.Truncate(1 << 19)
	d.Poke(5, []byte("abc"))
	want := strings.TrimPrefix(`
write 4096 @ 8192 fua
flush
mark commit 1
write-zeroes 4096 @ 0
discard 4096 @ 4096
write 512 @ 512 lost
write 512 @ 512
write 1024 @ 1024 stored @ 1047552
resize 524288
poke 3 @ 5
`, "\n")
	if got := Script(d.Trace()); got != want {
		t.Errorf("script:\n%s", got)
	}
	trace := d.StopTrace()
	g.must(flush())
	if n := len(d.Trace()); n != len(trace) {
		t.Errorf("a stopped trace grew to %d", n)
	}
}

// TestDamageInATraceIsInItsImages replays what only a test does to a disk.
func TestDamageInATraceIsInItsImages(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	base := d.StartTrace()
	g.must(write(0, letters('a', 4), 0))
	d.LoseWrite(func(Event) bool { return true })
	g.must(write(0, letters('l', 4), datapath.FlagFUA))
	d.LoseWrite(nil)
	d.Misdirect(8*sector, func(e Event) bool { return e.Data[0] == 'm' })
	g.must(write(4*sector, letters('n', 1), 0))
	g.must(write(0, letters('m', 2), 0))
	g.must(write(0, letters('z', 1), 0))
	d.Poke(2*sector, letters('p', 1))
	d.Truncate(9 * sector)
	d.Truncate(16 * sector)
	g.must(flush())
	d.Mark("end")
	want := text(t, d.Bytes(0, 16*sector))
	if want != "zapan...m......." {
		t.Errorf("the disk holds %s", want)
	}
	n := 0
	for im := range base.Images(d.Trace(), ImageOptions{Only: func(c Cut) bool { return c.Label == "end" }}) {
		n++
		if got := text(t, im.Disk().Bytes(0, 16*sector)); got != want || im.Disk().Info().Size != 16*sector {
			t.Errorf("%s: %s of %d bytes", im, got, im.Disk().Info().Size)
		}
	}
	if n != 1 {
		t.Errorf("%d images when all is durable", n)
	}
}

func TestTraceEndsAtACrash(t *testing.T) {
	g := newRig(t, Config{Size: 64 * sector})
	d := g.Disk(0)
	d.StartTrace()
	g.must(write(0, letters('a', 1), 0))
	g.close()
	d.CrashKeep()
	g.Mark("still")
	g.Crash(1)
	g.Group.CrashKeep()
	g.Mark("no more")
	g.Group.CrashLose()
	if got := Script(d.Trace()); got != "write 512 @ 0\nmark still\n" {
		t.Errorf("script:\n%s", got)
	}
}

func BenchmarkImage(b *testing.B) {
	d := New(Config{Size: 256 << 20})
	do := func(r *datapath.Request) {
		order, _ := d.submit(r)
		d.end(r.Op, order)
	}
	for i := range uint64(4096) {
		do(write(i*64<<10, letters('b', 8), 0))
	}
	do(flush())
	base := d.StartTrace()
	for i := range uint64(100) {
		do(write(i*997%4096*4096, letters('a', 8), 0))
		if i%8 == 7 {
			do(flush())
		}
	}
	trace := d.Trace()
	count := 0
	for b.Loop() {
		for im := range base.Images(trace, ImageOptions{}) {
			if im.Disk() != nil {
				count++
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(count), "ns/image")
	b.ReportMetric(float64(count)/float64(b.N), "images/op")
}
