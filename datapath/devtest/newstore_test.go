package devtest_test

import (
	"sync"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// The store of docs/new-store.md.

// shelf is a store in a slice of bytes.
type shelf struct {
	mu   sync.Mutex
	data []byte // guarded by mu
}

func (s *shelf) Info() datapath.Info {
	return datapath.Info{
		Description: "a shelf", Size: uint64(len(s.data)),
		Features: datapath.FeatureFlush | datapath.FeatureWriteZeroes | datapath.FeatureMultiQueue,
		MinIO:    1, PreferredIO: datapath.BlockSize,
	}
}

func (s *shelf) OpenQueue(r *reactor.Reactor, depth int) (datapath.Queue, error) {
	q := &shelfQueue{shelf: s}
	q.completions.Init(r, depth)
	return q, nil
}

func (s *shelf) Close() error { return nil }

// shelfQueue is one reactor's path to a shelf.
type shelfQueue struct {
	shelf       *shelf
	completions datapath.Completions // ends requests after Submit has returned
}

func (q *shelfQueue) Submit(r *datapath.Request) {
	status := datapath.StatusOK
	q.shelf.mu.Lock()
	switch r.Op {
	case datapath.OpRead:
		copy(r.Buf, q.shelf.data[r.Offset:])
		r.Zero = false
	case datapath.OpWrite:
		copy(q.shelf.data[r.Offset:], r.Buf)
	case datapath.OpWriteZeroes:
		clear(q.shelf.data[r.Offset:][:r.Length])
	case datapath.OpFlush: // memory is as durable as it gets
	default:
		status = datapath.StatusNotSupported
	}
	q.shelf.mu.Unlock()
	q.completions.Add(r, status)
}

func (q *shelfQueue) Close() error { return nil }

func TestShelf(t *testing.T) {
	devtest.Run(t, func(*testing.T) datapath.Device { return &shelf{data: make([]byte, devtest.SizeMin)} })
}
