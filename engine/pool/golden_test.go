package pool

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// symbols tells a trace in the words of the format.
type symbols struct {
	s *superblock
}

func newSymbols(d *memdisk.Disk) *symbols {
	end := d.Info().Size - pairSize
	y := &symbols{}
	for _, at := range []uint64{0, pageSize, end, end + pageSize} {
		if s, err := decodeSuperblock(d.Bytes(at, pageSize)); err == nil && (y.s == nil || s.generation > y.s.generation) {
			y.s = s
		}
	}
	return y
}

// event is one line.
func (y *symbols) event(e memdisk.Event) string {
	if e.Op == datapath.OpFlush {
		return "flush"
	}
	text := fmt.Sprintf("%s %s, %d", e.Op, y.place(e), e.Length)
	if e.FUA {
		text += " fua"
	}
	return text
}

func (y *symbols) place(e memdisk.Event) string {
	s, m := y.s, y.s.members[0]
	switch at := e.Offset; {
	case at < labelSize:
		return fmt.Sprintf("superblock %d at the start", at/pageSize)
	case at >= m.size-trailerSize:
		return fmt.Sprintf("superblock %d at the end", (at-(m.size-pairSize))/pageSize)
	case at < s.journalOffset+s.journalLength:
		return "journal (" + y.records(e.Data) + ")"
	default:
		zone, in := (at-m.base)/s.zoneStride(), (at-m.base)%s.zoneStride()
		switch {
		case in < pairSize:
			return fmt.Sprintf("zone page %d, copy %d", zone, in/pageSize+1)
		case in < s.zoneHead():
			return fmt.Sprintf("checksums of region %d, both copies", zone*uint64(s.zoneRegions)+(in-clusterSize)/pairSize)
		}
		if e.Length == pageSize && le.Uint32(e.Data) == pageMagic {
			return fmt.Sprintf("%s, copy %d", y.page(e.Data), in%pairSize/pageSize+1)
		}
		if e.Length == clusterSize && le.Uint32(e.Data) == pageMagic {
			return "metadata cluster of free pages"
		}
		cluster := zone*uint64(s.zoneClusters()) + (in-s.zoneHead())>>clusterShift
		return fmt.Sprintf("data, cluster %d from block %d", cluster, in%clusterSize/blockSize)
	}
}

func (y *symbols) page(b []byte) string {
	switch h, _ := openPage(b, y.s.pool, le.Uint64(b[16:])); h.kind {
	case pageMap:
		return fmt.Sprintf("map page %d of layer %d", h.index, h.owner)
	case pageLayer:
		return fmt.Sprintf("record of layer %d", h.owner)
	case pageFree:
		return "free page"
	}
	return "page of an unknown kind"
}

func (y *symbols) records(b []byte) string {
	var list []string
	h, ok := decodeGroupHeader(b, y.s.pool)
	if !ok {
		return "no group"
	}
	_ = eachRecord(b[groupHeaderSize:groupHeaderSize+h.length], func(t recordType, b []byte) error { // never fails
		switch t {
		case recordMap:
			e := entry(le.Uint64(b[8:]))
			text := fmt.Sprintf("map %d/%d", le.Uint32(b), le.Uint32(b[4:]))
			if e.cluster() != noCluster {
				text += fmt.Sprintf(" = cluster %d", e.cluster())
				if e.mask() != wholeMask {
					text += fmt.Sprintf(" blocks %#x", e.mask())
				}
			} else {
				text += " = nothing"
			}
			if e.zero() {
				text += ", else zeros"
			}
			list = append(list, text)
		case recordRegion:
			list = append(list, fmt.Sprintf("region %d %s", le.Uint32(b), []string{"fresh", "dirty", "clean"}[le.Uint32(b[4:])]))
		case recordLayer:
			list = append(list, fmt.Sprintf("layer %d", le.Uint32(b)))
		case recordRemove:
			list = append(list, fmt.Sprintf("layer %d removed", le.Uint32(b)))
		case recordPad:
			list = append(list, "padding")
		}
		return nil
	})
	if regions := func(s string) bool { return strings.HasPrefix(s, "region ") }; !slices.ContainsFunc(list, func(s string) bool { return !regions(s) }) {
		slices.Sort(list) // they have no order
	}
	return strings.Join(list, "; ")
}

// script is a trace in lines. What the cleaner asks of the committer may be done
// alone or together with a flush that is asked for at the same time: the group goes
// before that flush, or behind it. It is shown before.
func (y *symbols) script(trace []memdisk.Event) string {
	var lines []string
	for _, e := range trace {
		lines = append(lines, y.event(e))
		if n := len(lines); n >= 3 && lines[n-3] == "flush" && lines[n-2] == "flush" && strings.HasPrefix(lines[n-1], "write journal (region ") && !strings.Contains(lines[n-1], "map") {
			lines[n-2], lines[n-1] = lines[n-1], lines[n-2]
		}
	}
	return strings.Join(append(lines, ""), "\n")
}

// TestTraceOfEachOperation wants the writes and flushes that reach the disk to be
// those of testdata/traces.txt. Each operation begins where the one before ended.
func TestTraceOfEachOperation(t *testing.T) {
	const file = "testdata/traces.txt"
	disk := memory(64 << 20)
	g := newRig(t, 4, disk)
	g.open()
	s := newStory(t, g)
	request := func(r datapath.Request) func() {
		return func() {
			q := r
			if q.Op == datapath.OpWrite {
				q.Buf = imageFill(int(q.Length), 1)
			}
			s.on("v", func(c *devtest.Client) { c.Do(&q) })
		}
	}
	write := func(offset, length uint64, flags datapath.Flags) func() {
		return request(datapath.Request{Op: datapath.OpWrite, Offset: offset, Length: length, Flags: flags})
	}
	must := func(f func(p *Pool) error) func() { return func() { s.pool(f) } }
	clean := must(func(p *Pool) error {
		next := p.journal.next.Load()
		err := p.cleanRegions(0)
		for end := time.Now().Add(10 * time.Second); p.journal.next.Load() == next && time.Now().Before(end); { // the committer has been asked
			time.Sleep(time.Millisecond)
		}
		return err
	})
	flush := request(datapath.Request{Op: datapath.OpFlush})
	steps := []struct {
		name string
		do   func()
	}{
		{"create a volume", func() { s.create(VolumeSpec{Name: "v", Size: 1 << 20}) }},
		{"first write of a cluster, in a region that was never used", write(0, 4096, 0)},
		{"flush after it", flush},
		{"flush with nothing new", flush},
		{"first write of a cluster, in a dirty region", write(clusterSize, 8192, 0)},
		{"overwrite in a dirty region", write(0, 4096, 0)},
		{"overwrite with FUA in a dirty region, with changes of maps not yet durable", write(0, 4096, datapath.FlagFUA)},
		{"overwrite with FUA in a dirty region", write(0, 4096, datapath.FlagFUA)},
		{"first write with FUA", write(2*clusterSize, 4096, datapath.FlagFUA)},
		{"write of a part of a block", write(512, 512, 0)},
		{"write of 256 KiB", write(4*clusterSize, 2*clusterSize, 0)},
		{"flush after that", flush},
		{"clean the regions", clean},
		{"overwrite in a clean region", write(0, 4096, 0)},
		{"discard of a cluster", request(datapath.Request{Op: datapath.OpDiscard, Offset: 4 * clusterSize, Length: clusterSize})},
		{"discard of a block", request(datapath.Request{Op: datapath.OpDiscard, Offset: 5 * clusterSize, Length: 4096})},
		{"flush after the discards", flush},
		{"write zeroes", request(datapath.Request{Op: datapath.OpWriteZeroes, Offset: 5 * clusterSize, Length: 8192})},
		{"write zeroes that must not make a hole", request(datapath.Request{Op: datapath.OpWriteZeroes, Offset: 7 * clusterSize, Length: 4096, Flags: datapath.FlagNoUnmap})},
		{"checkpoint", must((*Pool).checkpoint)},
		{"checkpoint with nothing new", must((*Pool).checkpoint)},
		{"snapshot", func() { s.snapshot("v", "one") }},
		{"write zeroes of a whole cluster over a snapshot", request(datapath.Request{Op: datapath.OpWriteZeroes, Offset: 0, Length: clusterSize})},
		{"write zeroes of a block over a snapshot", request(datapath.Request{Op: datapath.OpWriteZeroes, Offset: 5*clusterSize + 16384, Length: 4096})},
		{"write of a block over a snapshot", write(clusterSize, 4096, 0)},
		{"flush over a snapshot", flush},
		{"clone", func() { s.clone("v", "one", "c", 1<<20) }},
		{"resize", func() { s.resize("v", 2<<20) }},
		{"labels", must(func(p *Pool) error { return p.SetLabels("v", map[string]string{"a": "b"}) })},
		{"delete the clone", must(func(p *Pool) error { _, err := p.DeleteVolume("c", false); return err })},
		{"delete the snapshot", func() { s.deleteSnapshot("v", "one") }},
		{"merge what is left of it", must((*Pool).mergeAll)},
		{"close", g.close},
		{"open after a close", func() { g.open() }},
		{"write and crash", func() {
			s.on("v", func(c *devtest.Client) { c.Write(0, imageFill(4096, 9)); c.Flush() })
		}},
	}
	var got strings.Builder
	y := newSymbols(disk)
	disk.StartTrace()
	for _, step := range steps {
		from := len(disk.Trace())
		step.do()
		fmt.Fprintf(&got, "%s\n----\n%s\n", step.name, y.script(disk.Trace()[from:]))
	}
	crashed := disk.Clone()
	crashed.CrashLose()
	g.close()
	x := rigOn(t, crashed)
	crashed.StartTrace()
	x.open()
	fmt.Fprintf(&got, "open after a crash\n----\n%s\n", y.script(crashed.Trace()))
	from := len(crashed.Trace())
	x.close()
	fmt.Fprintf(&got, "close after that\n----\n%s", y.script(crashed.Trace()[from:]))
	compareGolden(t, file, got.String())
}

// compareGolden compares with a file, or renews it.
func compareGolden(t *testing.T, file, got string) {
	t.Helper()
	if *rewrite {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := strings.Split(got, "\n"), strings.Split(string(want), "\n"); got != string(want) {
		for i := range max(len(a), len(b)) {
			if i >= len(a) || i >= len(b) || a[i] != b[i] {
				t.Fatalf("%s:%d differs (look at it, and renew it with -rewrite):\ngot  %s\nwant %s", file, i+1, strings.Join(a[min(i, len(a)):min(i+6, len(a))], "\n     "), strings.Join(b[min(i, len(b)):min(i+6, len(b))], "\n     "))
			}
		}
	}
}

// TestWriteAmplification measures bytes to the device per byte written, and renews
// docs/internals/write-amplification.md.
func TestWriteAmplification(t *testing.T) {
	const file = "../../docs/internals/write-amplification.md"
	const size = 256 << 20
	measure := func(profile string, mapped bool, length uint64, count int, random, flushEach bool) string {
		disk := memory(4 << 30)
		r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
		disks := []Disk{{"mem0", disk}}
		if _, err := Format(FormatConfig{Name: "p", Disks: disks, Reactor: r}); err != nil {
			t.Fatal(err)
		}
		p, err := Open(Config{Disks: disks, Reactor: r, Manual: true, Log: quiet()})
		if err != nil {
			t.Fatal(err)
		}
		g := &rig{TB: t, r: r, disks: disks, pool: p}
		d := g.volume("v", size)
		c := devtest.NewClient(t, r, d, 4)
		if mapped {
			for at := uint64(0); at < size; at += 4 << 20 {
				c.Write(at, make([]byte, 4<<20))
			}
		}
		c.Flush()
		if err := p.Maintain(); err != nil {
			t.Fatal(err)
		}
		disk.ResetStats()
		rng := rand.New(rand.NewPCG(1, 2))
		data := bytes.Repeat([]byte{7}, int(length))
		for i := range count {
			at := uint64(i) * length
			if random {
				at = rng.Uint64N(size/length) * length
			}
			c.Write(at, data)
			if flushEach {
				c.Flush()
			}
		}
		c.Flush()
		busy := disk.Stats()
		if err := p.Maintain(); err != nil {
			t.Fatal(err)
		}
		all := disk.Stats()
		c.Close()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		g.close()
		user := float64(length) * float64(count)
		per := func(n uint64) string { return fmt.Sprintf("%.2f", float64(n)/float64(count)) }
		return fmt.Sprintf("| %s | %.3f | %.3f | %s | %s | %s |\n", profile, float64(busy.WriteBytes)/user, float64(all.WriteBytes)/user,
			per(busy.Writes), per(busy.FUA), per(busy.Flushes))
	}
	var b strings.Builder
	b.WriteString(`# Write amplification of a pool

Bytes that reach the device per byte a client writes, on a pool of one disk of 4 GiB with the default geometry and a volume
of 256 MiB. "Until the last flush" is what clients wait for; "at rest" adds what the pool does later by itself: checksum
pages, the record that regions are clean, and one checkpoint. The last three columns are requests to the device per write of
the client, until the last flush; FUA writes and flushes are those a disk feels most. On a disk in memory, by
` + "`go test ./engine/pool -run WriteAmplification -rewrite`" + `, which writes this page; the numbers are exact, since nothing in
them depends on time.

| profile | until the last flush | at rest | writes | of them FUA | flushes |
|---|---|---|---|---|---|
`)
	b.WriteString(measure("sequential 128 KiB, thin", false, 128<<10, 2048, false, false))
	b.WriteString(measure("sequential 128 KiB, overwrite", true, 128<<10, 2048, false, false))
	b.WriteString(measure("random 4 KiB, thin (most make a new cluster)", false, 4096, 2048, true, false))
	b.WriteString(measure("random 4 KiB, overwrite", true, 4096, 8192, true, false))
	b.WriteString(measure("random 4 KiB, overwrite, each flushed", true, 4096, 2048, true, true))
	b.WriteString(measure("random 4 KiB, thin, each flushed", false, 4096, 2048, true, true))
	b.WriteString(`
Read them so: a large write pays for one record of 20 bytes a cluster. A small overwrite pays nothing at once, and later a
checksum page (8 KiB with its copy) for each region of 3.9 MiB that was touched, whatever the number of writes in it: the
fewer writes a region gets before it is cleaned, the more each of them pays. A flush writes nothing where no map has
changed, and else one group of the journal, 4 KiB at least.
`)
	compareGolden(t, file, b.String())
}

// TestWorkedExample renews the dump in docs/internals/disk-format.md and wants it
// to be what a fresh pool has.
func TestWorkedExample(t *testing.T) {
	const file = "../../docs/internals/disk-format.md"
	disk := memory(64 << 20)
	newRig(t, zoneRegionsMax, disk)
	s := newSymbols(disk).s
	// What differs from pool to pool is replaced.
	s.pool = uuid.MustParse("01234567-89ab-cdef-0123-456789abcdef")
	s.members[0].id = uuid.MustParse("fedcba98-7654-3210-fedc-ba9876543210")
	s.disk, s.created = s.members[0].id, 1_790_000_000_000_000_000
	b := make([]byte, pageSize)
	s.encode(b)
	var dump strings.Builder
	zeros := make([]byte, 16)
	for at := 0; at < pageSize; at += 16 {
		line := b[at : at+16]
		if bytes.Equal(line, zeros) && at > 0 && bytes.Equal(b[at-16:at], zeros) {
			if !strings.HasSuffix(dump.String(), "*\n") {
				dump.WriteString("*\n")
			}
			continue
		}
		text := strings.Map(func(r rune) rune {
			if r < 32 || r > 126 {
				return '.'
			}
			return r
		}, string(latin(line)))
		fmt.Fprintf(&dump, "%08x  % x  % x  |%s|\n", at, line[:8], line[8:], text)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- superblock -->\n```\n", "```\n<!-- end -->"
	i, j := strings.Index(string(text), begin), strings.Index(string(text), end)
	if i < 0 || j < i {
		t.Fatalf("%s has no place for the dump", file)
	}
	compareGolden(t, file, string(text[:i+len(begin)])+dump.String()+string(text[j:]))
}

// latin makes a rune of each byte.
func latin(b []byte) []rune {
	r := make([]rune, len(b))
	for i, c := range b {
		r[i] = rune(c)
	}
	return r
}
