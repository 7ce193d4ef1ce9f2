package pool

import "testing"

// TestClusterTakenForMetadataIsNotMissedTwice: a checkpoint takes what was kept for it,
// so data gets as much while it does as before and after.
func TestClusterTakenForMetadataIsNotMissedTwice(t *testing.T) {
	data := func(checkpoint bool) (taken int) {
		p := &Pool{zoneClusters: regionClusters}
		p.alloc.addZone(0, regionClusters, regionClusters)
		p.alloc.owed.Store(2)
		p.setReserve(0)
		if checkpoint {
			if _, ok := p.alloc.take(claimMeta, regionClusters); !ok {
				t.Fatal("no cluster for metadata")
			}
		}
		for {
			if _, ok := p.alloc.take(claimData, regionClusters); !ok {
				return taken
			}
			taken++
		}
	}
	if before, during := data(false), data(true); before != during || before == 0 {
		t.Errorf("%d clusters for data, and %d while a checkpoint takes one", before, during)
	}
}
