package load

import (
	"testing"
	"time"
)

func TestGeneratorStaysOnTheDeviceAndKeepsItsMix(t *testing.T) {
	const device, block, draws = 1 << 20, 4096, 100_000
	p := Pattern{Random: true, ReadPercent: 75, BlockBytes: block, Depth: 1, Jobs: 1, Seed: 3}
	if err := p.Check(device); err != nil {
		t.Fatal(err)
	}
	g := NewGenerator(p, 0, device)
	var reads int
	seen := map[uint64]bool{}
	for range draws {
		op, offset := g.Next()
		if offset%block != 0 || offset+block > device {
			t.Fatalf("offset %d", offset)
		}
		seen[offset] = true
		if op == OpRead {
			reads++
		}
	}
	if share := float64(reads) / draws; share < 0.74 || share > 0.76 {
		t.Errorf("seed 3: share of reads = %v, want 0.75", share)
	}
	if len(seen) != device/block {
		t.Errorf("seed 3: %d of %d blocks used", len(seen), device/block)
	}
}

func TestSequentialJobsStartApartAndWrap(t *testing.T) {
	p := Pattern{ReadPercent: 100, BlockBytes: 4096, Depth: 1, Jobs: 2}
	g := NewGenerator(p, 1, 8*4096)
	want := []uint64{4, 5, 6, 7, 0, 1}
	for i, block := range want {
		if _, offset := g.Next(); offset != block*4096 {
			t.Errorf("request %d at block %d, want %d", i, offset/4096, block)
		}
	}
}

func TestFlushFollowsTheNumberOfWrites(t *testing.T) {
	p := Pattern{Random: true, BlockBytes: 4096, Depth: 1, Jobs: 1, FlushEvery: 2}
	g := NewGenerator(p, 0, 1<<20)
	var got []Op
	for range 6 {
		op, _ := g.Next()
		got = append(got, op)
	}
	want := []Op{OpWrite, OpWrite, OpFlush, OpWrite, OpWrite, OpFlush}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("operations %v, want %v", got, want)
		}
	}
}

func TestCheckNamesWhatIsOutOfRange(t *testing.T) {
	good := Pattern{ReadPercent: 100, BlockBytes: 4096, Depth: 1, Jobs: 1}
	for name, change := range map[string]func(*Pattern){
		"block":   func(p *Pattern) { p.BlockBytes = 0 },
		"depth":   func(p *Pattern) { p.Depth = DepthMax + 1 },
		"jobs":    func(p *Pattern) { p.Jobs = 0 },
		"percent": func(p *Pattern) { p.ReadPercent = 101 },
		"flush":   func(p *Pattern) { p.FlushEvery = -1 },
		"size":    func(p *Pattern) { p.SizeBytes = 1 << 30 },
		"small":   func(p *Pattern) { p.BlockBytes = 2 << 20 },
	} {
		p := good
		change(&p)
		if p.Check(1<<20) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := good.Check(1 << 20); err != nil {
		t.Error(err)
	}
}

func TestSummarizeJoinsJobsAndLeavesFlushesOut(t *testing.T) {
	start := time.Unix(100, 0)
	a, b := new(Meter), new(Meter)
	a.Begin(start)
	b.Begin(start)
	for range 1000 {
		a.Record(OpRead, 10*time.Microsecond, 4096)
		b.Record(OpWrite, 30*time.Microsecond, 4096)
		b.Record(OpFlush, time.Second, 0)
	}
	a.End(start.Add(2 * time.Second))
	b.End(start.Add(2 * time.Second))
	r := Summarize(Pattern{}, []*Meter{a, b}, 1)
	if r.IOs != 2000 || r.IOPS != 1000 || r.BytesPerSecond != 2000*4096/2 {
		t.Errorf("ios %d, iops %v, bytes/s %v", r.IOs, r.IOPS, r.BytesPerSecond)
	}
	if r.LatencyP999 < 29 || r.LatencyP999 > 31 {
		t.Errorf("p99.9 = %v us, want 30: flushes are counted apart", r.LatencyP999)
	}
	if r.Ops["flush"].Count != 1000 {
		t.Errorf("flushes %d", r.Ops["flush"].Count)
	}
}

func TestNextDoesNotAllocate(t *testing.T) {
	g := NewGenerator(Pattern{Random: true, ReadPercent: 50, BlockBytes: 4096, Depth: 1, Jobs: 1}, 0, 1<<30)
	if n := testing.AllocsPerRun(1000, func() { g.Next() }); n != 0 {
		t.Errorf("Next allocates %v times", n)
	}
}
