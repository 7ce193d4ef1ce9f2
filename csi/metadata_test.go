package csi

import (
	"fmt"
	"io"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestSnapshotMetadata(t *testing.T) {
	r := newRig(t, nil)
	v, w := r.create("v", gib, nil), r.create("w", gib, nil)
	snap := func(name, id string) string {
		s, err := r.CreateSnapshot(t.Context(), &spec.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
		if err != nil {
			t.Fatal(err)
		}
		return s.GetSnapshot().GetSnapshotId()
	}
	one, two, other := snap("one", v.GetVolumeId()), snap("two", v.GetVolumeId()), snap("other", w.GetVolumeId())
	r.daemon.changes = []*controlpb.Change{
		{OffsetBytes: 0, LengthBytes: 4096}, {OffsetBytes: 4096, LengthBytes: 4096, Zero: true}, {OffsetBytes: 16384, LengthBytes: 8192}, {OffsetBytes: mib, LengthBytes: 4096, Zero: true},
	}
	read := func(base string, offset int64, max int32) (ranges [][2]int64, messages int, err error) {
		var recv func() (int64, []*spec.BlockMetadata, error)
		if base == "" {
			stream, err := r.GetMetadataAllocated(t.Context(), &spec.GetMetadataAllocatedRequest{SnapshotId: two, StartingOffset: offset, MaxResults: max})
			if err != nil {
				return nil, 0, err
			}
			recv = func() (int64, []*spec.BlockMetadata, error) {
				m, err := stream.Recv()
				return m.GetVolumeCapacityBytes(), m.GetBlockMetadata(), err
			}
		} else {
			stream, err := r.GetMetadataDelta(t.Context(), &spec.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: two, StartingOffset: offset, MaxResults: max})
			if err != nil {
				return nil, 0, err
			}
			recv = func() (int64, []*spec.BlockMetadata, error) {
				m, err := stream.Recv()
				return m.GetVolumeCapacityBytes(), m.GetBlockMetadata(), err
			}
		}
		for {
			size, list, err := recv()
			if err == io.EOF {
				return ranges, messages, nil
			}
			if err != nil {
				return ranges, messages, err
			}
			if messages++; size != gib || max > 0 && len(list) > int(max) {
				t.Errorf("a message of %d bytes with %d ranges", size, len(list))
			}
			for _, b := range list {
				ranges = append(ranges, [2]int64{b.GetByteOffset(), b.GetSizeBytes()})
			}
		}
	}
	for _, tt := range []struct {
		name     string
		base     string
		offset   int64
		max      int32
		want     string
		messages int
	}{
		{"allocated", "", 0, 0, "[[0 4096] [16384 8192]]", 1},
		{"allocated, from inside a range", "", 20000, 0, "[[16384 8192]]", 1},
		{"allocated, from the end", "", gib, 0, "[]", 1},
		{"allocated, one by one", "", 0, 1, "[[0 4096] [16384 8192]]", 2},
		{"delta", one, 0, 0, "[[0 8192] [16384 8192] [1048576 4096]]", 1},
		{"delta, two at a time", one, 0, 2, "[[0 8192] [16384 8192] [1048576 4096]]", 2},
		{"delta, going on", one, 24576, 2, "[[1048576 4096]]", 1},
	} {
		got, messages, err := read(tt.base, tt.offset, tt.max)
		if err != nil || fmt.Sprint(got) != tt.want || messages != tt.messages {
			t.Errorf("%s: %v in %d messages, %v; want %s in %d", tt.name, got, messages, err, tt.want, tt.messages)
		}
	}
	for _, tt := range []struct {
		name, base, target string
		offset             int64
		max                int32
		code               codes.Code
		text               string
	}{
		{"no base", "", two, 0, 0, codes.InvalidArgument, "base snapshot id"},
		{"no target", one, "", 0, 0, codes.InvalidArgument, "target snapshot id"},
		{"a base that is gone", "s1/node-1/default/v/gone", two, 0, 0, codes.NotFound, "gone"},
		{"a target that is gone", one, "s1/node-1/default/v/gone", 0, 0, codes.NotFound, "gone"},
		{"different volumes", other, two, 0, 0, codes.InvalidArgument, "different volumes"},
		{"the wrong order", two, one, 0, 0, codes.InvalidArgument, "swap them"},
		{"a negative offset", one, two, -1, 0, codes.OutOfRange, "-1"},
		{"an offset behind the end", one, two, gib + 1, 0, codes.OutOfRange, "starting offset"},
		{"a negative bound", one, two, 0, -1, codes.InvalidArgument, "negative"},
	} {
		stream, err := r.GetMetadataDelta(t.Context(), &spec.GetMetadataDeltaRequest{BaseSnapshotId: tt.base, TargetSnapshotId: tt.target, StartingOffset: tt.offset, MaxResults: tt.max})
		if err == nil {
			_, err = stream.Recv()
		}
		want(t, tt.name, err, tt.code, tt.text)
	}
	stream, err := r.GetMetadataAllocated(t.Context(), &spec.GetMetadataAllocatedRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	want(t, "allocated of nothing", err, codes.InvalidArgument, "snapshot id")
}
