package pool

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
)

// deepVolume is a volume with a chain of depth snapshots, each of which changed one
// block of every cluster written.
func deepVolume(t *testing.T, depth int) (*rig, datapath.Device, *devtest.Client, [][]byte) {
	t.Helper()
	g := newRig(t, 16, memory(512<<20))
	g.open()
	const clusters = 8
	d := g.volume("v", clusters*clusterSize)
	c := devtest.NewClient(t, g.r, d, 8)
	want := make([][]byte, clusters)
	for i := range want {
		want[i] = bytes.Repeat([]byte{byte(i + 1)}, clusterSize)
		c.Write(uint64(i)*clusterSize, want[i])
	}
	for n := range depth {
		if _, err := g.pool.CreateSnapshot("v", fmt.Sprintf("s%d", n), nil); err != nil {
			t.Fatal(err)
		}
		i, block := n%clusters, n/clusters%clusterBlocks
		data := bytes.Repeat([]byte{byte(100 + n)}, blockSize)
		copy(want[i][block*blockSize:], data)
		c.Write(uint64(i)*clusterSize+uint64(block)*blockSize, data)
	}
	return g, d, c, want
}

func TestDeepChainsReadWhatWasWritten(t *testing.T) {
	g, d, c, want := deepVolume(t, 100)
	compare := func(when string) {
		t.Helper()
		for range 2 { // the second time from what the chain remembers
			for i, w := range want {
				if got := c.Read(uint64(i)*clusterSize, clusterSize); !bytes.Equal(got, w) {
					t.Fatalf("%s: cluster %d differs", when, i)
				}
			}
		}
	}
	compare("100 snapshots")
	for _, n := range []int{50, 0, 99, 51, 52, 7} {
		if _, err := g.pool.DeleteSnapshot("v", fmt.Sprintf("s%d", n)); err != nil {
			t.Fatal(err)
		}
		compare("before the merge")
		if err := g.pool.Maintain(); err != nil {
			t.Fatal(err)
		}
		compare(fmt.Sprintf("without snapshot %d", n))
	}
	if i, err := g.pool.Volume("v"); err != nil || i.Depth != 95 {
		t.Errorf("depth %d, %v", i.Depth, err)
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	g.close()
}

// BenchmarkLocate is what finding a block costs, by the length of the chain.
func BenchmarkLocate(b *testing.B) {
	for _, depth := range []int{0, 1, 4, 100} {
		b.Run(fmt.Sprintf("%d layers below", depth), func(b *testing.B) {
			p := &Pool{}
			var l *layer
			for i := range depth + 1 {
				x := newLayer(p, layerRecord{id: uint32(i + 1), size: 1 << 30})
				if l != nil {
					x.setParent(l)
				} else {
					for v := range uint32(8192) {
						x.page(v).entries[v%mapEntries].Store(uint64(makeEntry(v, wholeMask, false)))
					}
				}
				for v := uint32(i) * 64; i > 0 && v < 8192; v += 6400 { // something, but not here
					x.page(v).entries[v%mapEntries].Store(uint64(makeEntry(v, 1, false)))
				}
				l = x
			}
			b.ReportAllocs()
			for v := uint32(0); b.Loop(); v = (v + 577) % 8192 {
				l.locate(v, 5, 1)
			}
		})
	}
}
