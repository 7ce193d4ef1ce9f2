package csi

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// ranges reads all of what a stream of metadata says.
func (w *world) ranges(base, target string, offset int64, max int32) (list []*spec.BlockMetadata, capacity int64, messages int, err error) {
	var recv func() (int64, []*spec.BlockMetadata, error)
	if base == "" {
		stream, err := w.GetMetadataAllocated(w.t.Context(), &spec.GetMetadataAllocatedRequest{SnapshotId: target, StartingOffset: offset, MaxResults: max})
		if err != nil {
			return nil, 0, 0, err
		}
		recv = func() (int64, []*spec.BlockMetadata, error) {
			m, err := stream.Recv()
			return m.GetVolumeCapacityBytes(), m.GetBlockMetadata(), err
		}
	} else {
		stream, err := w.GetMetadataDelta(w.t.Context(), &spec.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: offset, MaxResults: max})
		if err != nil {
			return nil, 0, 0, err
		}
		recv = func() (int64, []*spec.BlockMetadata, error) {
			m, err := stream.Recv()
			return m.GetVolumeCapacityBytes(), m.GetBlockMetadata(), err
		}
	}
	for {
		size, part, err := recv()
		if errors.Is(err, io.EOF) {
			return list, capacity, messages, nil
		}
		if err != nil {
			return list, capacity, messages, err
		}
		if max > 0 && len(part) > int(max) {
			w.t.Errorf("a message has %d ranges, more than %d", len(part), max)
		}
		capacity = size
		list = append(list, part...)
		messages++
	}
}

// TestSnapshotMetadataRebuildsTheVolume copies what the metadata names, as a backup
// does, and wants the copy to be the snapshot.
func TestSnapshotMetadataRebuildsTheVolume(t *testing.T) {
	w := newWorld(t, "4GiB")
	const size = 64 * mib
	v := w.volume("v", blockCapability())
	must(t, v.use(size, nil))
	write := func(offset int64, data []byte) {
		t.Helper()
		f, err := os.OpenFile(v.target, os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(data, offset)
		must(t, err, f.Sync(), f.Close())
	}
	for i := range int64(40) {
		write(i*mib+i*4096, pattern("first", 12*kib))
	}
	one, err := v.snapshot("one")
	must(t, err)
	for i := range int64(10) {
		write(i*3*mib, pattern("second", 8*kib))
	}
	write(mib, make([]byte, 64*kib)) // zeros over data: a change
	two, err := v.snapshot("two")
	must(t, err)
	write(0, pattern("third", mib)) // after it

	content := func(s *spec.Snapshot) []byte {
		t.Helper()
		c := w.volume("copy", blockCapability())
		must(t, c.use(size, fromSnapshot(s.GetSnapshotId())))
		b, err := os.ReadFile(c.target)
		must(t, err, c.drop())
		return b
	}
	first, second := content(one), content(two)
	apply := func(onto, from []byte, list []*spec.BlockMetadata) {
		t.Helper()
		end := int64(0)
		for _, b := range list {
			if b.GetByteOffset() < end || b.GetSizeBytes() <= 0 || b.GetByteOffset()+b.GetSizeBytes() > size {
				t.Fatalf("range %v after %d", b, end)
			}
			end = b.GetByteOffset() + b.GetSizeBytes()
			copy(onto[b.GetByteOffset():end], from[b.GetByteOffset():end])
		}
	}
	backup := make([]byte, size)
	for _, max := range []int32{0, 1, 7} {
		allocated, capacity, messages, err := w.ranges("", one.GetSnapshotId(), 0, max)
		must(t, err)
		if capacity != size || messages < 1 || max == 1 && messages != len(allocated) {
			t.Errorf("%d ranges in %d messages of %d bytes", len(allocated), messages, capacity)
		}
		clear(backup)
		if apply(backup, first, allocated); !bytes.Equal(backup, first) {
			t.Error("what is allocated is not all of the snapshot")
		}
		delta, _, _, err := w.ranges(one.GetSnapshotId(), two.GetSnapshotId(), 0, max)
		must(t, err)
		if apply(backup, second, delta); !bytes.Equal(backup, second) {
			t.Error("the delta does not lead from one snapshot to the other")
		}
		var bytesChanged int64
		for _, b := range delta {
			bytesChanged += b.GetSizeBytes()
		}
		if bytesChanged > 4*mib { // 144 KiB were written
			t.Errorf("the delta has %d bytes", bytesChanged)
		}
	}
	// A backup that was interrupted goes on.
	all, _, _, err := w.ranges(one.GetSnapshotId(), two.GetSnapshotId(), 0, 0)
	must(t, err)
	half := all[len(all)/2]
	rest, _, _, err := w.ranges(one.GetSnapshotId(), two.GetSnapshotId(), half.GetByteOffset()+half.GetSizeBytes(), 0)
	must(t, err)
	if len(rest) != len(all)-len(all)/2-1 {
		t.Errorf("%d ranges of %d after the half", len(rest), len(all))
	}
	_, _, _, err = w.ranges(two.GetSnapshotId(), one.GetSnapshotId(), 0, 0)
	want(t, "the wrong order", err, codes.InvalidArgument, "")
	_, _, _, err = w.ranges("", one.GetSnapshotId(), size+1, 0)
	want(t, "behind the end", err, codes.OutOfRange, "")
	must(t, w.deleteSnapshot(one.GetSnapshotId()), w.deleteSnapshot(two.GetSnapshotId()), v.drop())
}

// TestGroupSnapshotIsOnePoint writes a number to one volume and then to another: in
// every group snapshot the second is never ahead of the first.
func TestGroupSnapshotIsOnePoint(t *testing.T) {
	w := newWorld(t, "4GiB")
	a, b := w.volume("a", blockCapability()), w.volume("b", blockCapability())
	must(t, a.use(16*mib, nil), b.use(16*mib, nil))
	fa, err := os.OpenFile(a.target, os.O_RDWR, 0)
	must(t, err)
	fb, err := os.OpenFile(b.target, os.O_RDWR, 0)
	must(t, err)
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() { // ends with stop
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := errors.Join(counter(fa, &n, true), counter(fb, &n, true)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var groups []*spec.VolumeGroupSnapshot
	for _, name := range []string{"g1", "g2", "g3", "g4"} {
		var id string
		for range 2 {
			g, err := again(w, func() (*spec.CreateVolumeGroupSnapshotResponse, error) {
				return w.CreateVolumeGroupSnapshot(t.Context(), &spec.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: []string{a.id, b.id}})
			})
			must(t, err)
			if id != "" && g.GetGroupSnapshot().GetGroupSnapshotId() != id || len(g.GetGroupSnapshot().GetSnapshots()) != 2 {
				t.Errorf("the group is %v", g)
			}
			if id == "" {
				groups = append(groups, g.GetGroupSnapshot())
			}
			id = g.GetGroupSnapshot().GetGroupSnapshotId()
		}
	}
	close(stop)
	writer.Wait()
	must(t, fa.Close(), fb.Close())
	for _, g := range groups {
		var n [2]uint64
		var ids []string
		for i, s := range g.GetSnapshots() {
			ids = append(ids, s.GetSnapshotId())
			c := w.volume("copy", blockCapability())
			must(t, c.use(16*mib, fromSnapshot(s.GetSnapshotId())))
			f, err := os.Open(c.target)
			must(t, err, counter(f, &n[i], false), f.Close(), c.drop())
			_, err = w.DeleteSnapshot(t.Context(), &spec.DeleteSnapshotRequest{SnapshotId: s.GetSnapshotId()})
			want(t, "delete of a member", err, codes.FailedPrecondition, "belongs to")
		}
		if n[1] > n[0] || n[0]-n[1] > 1 {
			t.Errorf("a group snapshot has %d in the first volume and %d in the second", n[0], n[1])
		}
		for range 2 {
			_, err := w.DeleteVolumeGroupSnapshot(t.Context(), &spec.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: ids})
			must(t, err)
		}
	}
	must(t, a.drop(), b.drop())
}
