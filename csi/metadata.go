package csi

import (
	"context"
	"errors"
	"io"

	spec "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// snapshotMetadata says which bytes a snapshot has, and which of them changed
// since another. The sidecar that authenticates backup programs connects to the
// driver's own socket for it.
type snapshotMetadata struct {
	spec.UnimplementedSnapshotMetadataServer
	driver *Driver
}

// rangesMax is how many ranges go into one message unless fewer are wanted: some
// 20 KiB.
const rangesMax = 1024

// GetMetadataAllocated implements spec.SnapshotMetadataServer.
func (s *snapshotMetadata) GetMetadataAllocated(r *spec.GetMetadataAllocatedRequest, stream spec.SnapshotMetadata_GetMetadataAllocatedServer) error {
	if r.GetSnapshotId() == "" {
		return missing("snapshot id")
	}
	target, err := s.driver.snapshot(stream.Context(), r.GetSnapshotId())
	if err != nil {
		return err
	}
	return s.ranges(stream.Context(), "", target, r.GetStartingOffset(), r.GetMaxResults(), func(capacity int64, list []*spec.BlockMetadata) error {
		return stream.Send(&spec.GetMetadataAllocatedResponse{BlockMetadataType: spec.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: capacity, BlockMetadata: list})
	})
}

// GetMetadataDelta implements spec.SnapshotMetadataServer.
func (s *snapshotMetadata) GetMetadataDelta(r *spec.GetMetadataDeltaRequest, stream spec.SnapshotMetadata_GetMetadataDeltaServer) error {
	if err := needs("base snapshot id", r.GetBaseSnapshotId(), "target snapshot id", r.GetTargetSnapshotId()); err != nil {
		return err
	}
	base, err := s.driver.snapshot(stream.Context(), r.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	target, err := s.driver.snapshot(stream.Context(), r.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	switch {
	case base.GetPool() != target.GetPool() || base.GetVolume() != target.GetVolume():
		return invalid("snapshots %s and %s are of different volumes", r.GetBaseSnapshotId(), r.GetTargetSnapshotId())
	case target.GetCreated().AsTime().Before(base.GetCreated().AsTime()):
		return invalid("snapshot %s is older than %s: swap them", r.GetTargetSnapshotId(), r.GetBaseSnapshotId())
	}
	return s.ranges(stream.Context(), base.GetName(), target, r.GetStartingOffset(), r.GetMaxResults(), func(capacity int64, list []*spec.BlockMetadata) error {
		return stream.Send(&spec.GetMetadataDeltaResponse{BlockMetadataType: spec.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: capacity, BlockMetadata: list})
	})
}

// ranges sends what differs between since ("": nothing) and target, from offset on,
// at most max ranges at a time; at least one message. Against nothing, what reads
// as zeros does not differ.
func (s *snapshotMetadata) ranges(ctx context.Context, since string, target *controlpb.Snapshot, offset int64, max int32, send func(int64, []*spec.BlockMetadata) error) error {
	capacity := int64(target.GetSizeBytes())
	switch {
	case max < 0:
		return invalid("at most %d results are wanted: must not be negative", max)
	case offset < 0 || offset > capacity:
		return outOfRange("the starting offset %d is not in the snapshot, which has %d bytes", offset, capacity)
	case max == 0 || max > rangesMax:
		max = rangesMax
	}
	client, err := s.driver.daemon.client(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx) // ends the stream below in any case
	defer cancel()
	changes, err := client.Volumes.Changes(ctx, &controlpb.ChangesRequest{
		Pool: target.GetPool(), Volume: target.GetVolume(), Since: since, Until: target.GetName(), OffsetBytes: uint64(offset) / sizeStep * sizeStep,
	})
	if err != nil {
		return err
	}
	var list []*spec.BlockMetadata
	sent := false
	flush := func() error {
		err := send(capacity, list)
		list, sent = nil, true
		return err
	}
	for {
		reply, err := changes.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		for _, change := range reply.GetChanges() {
			from, end := int64(change.GetOffsetBytes()), int64(change.GetOffsetBytes()+change.GetLengthBytes())
			if since == "" && change.GetZero() || end <= offset {
				continue
			}
			if n := len(list); n > 0 && list[n-1].ByteOffset+list[n-1].SizeBytes == from { // zeros beside data
				list[n-1].SizeBytes = end - list[n-1].ByteOffset
				continue
			}
			if len(list) == int(max) {
				if err := flush(); err != nil {
					return err
				}
			}
			list = append(list, &spec.BlockMetadata{ByteOffset: from, SizeBytes: end - from})
		}
	}
	if len(list) > 0 || !sent {
		return flush()
	}
	return nil
}
