package csi

import (
	"slices"

	spec "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// accessModes are those of a volume that is on one node.
var accessModes = []spec.VolumeCapability_AccessMode_Mode{
	spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	spec.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	spec.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	spec.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
}

// checkCapability says what is wrong with a capability.
func checkCapability(c *spec.VolumeCapability) error {
	mode := c.GetAccessMode().GetMode()
	switch {
	case c == nil:
		return missing("volume capability")
	case c.GetMount() == nil && c.GetBlock() == nil:
		return invalid("the volume capability has no access type: want block or mount")
	case !slices.Contains(accessModes, mode):
		return invalid("access mode %v: a volume is on one node only, which leaves SINGLE_NODE_WRITER, …_READER_ONLY, …_SINGLE_WRITER and …_MULTI_WRITER", mode)
	}
	if fs := c.GetMount().GetFsType(); fs != "" && filesystems[fs] == 0 {
		return invalid("filesystem %q: must be ext4 or xfs", fs)
	}
	return nil
}

// checkCapabilities says what is wrong with one of them, or with all together, and
// which filesystem they ask for; "" when they leave it open, or are block.
func checkCapabilities(list []*spec.VolumeCapability) (fsType string, mounted bool, err error) {
	if len(list) == 0 {
		return "", false, missing("volume capabilities")
	}
	for _, c := range list {
		if err := checkCapability(c); err != nil {
			return "", false, err
		}
		if c.GetMount() == nil {
			continue
		}
		mounted = true
		fs := c.GetMount().GetFsType()
		if fs != "" && fsType != "" && fs != fsType {
			return "", false, invalid("the volume capabilities ask for both %s and %s", fsType, fs)
		}
		if fs != "" {
			fsType = fs
		}
	}
	return fsType, mounted, nil
}

// readOnly says whether nobody may write through a capability.
func readOnly(c *spec.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() == spec.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
}

// Sizes of volumes, bytes.
const (
	sizeDefault = 1 << 30 // of a request that leaves it open
	sizeMin     = 1 << 20
	sizeMax     = 1 << 48 // bound of a volume in a pool
	sizeStep    = 4096
)

// sizeOf is the size a volume must have for a range: at least least, or the
// default when the range does not say.
func sizeOf(r *spec.CapacityRange, least uint64) (uint64, error) {
	if r == nil {
		return max(least, sizeDefault), nil
	}
	required, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case required < 0 || limit < 0:
		return 0, outOfRange("the size is negative: %d to %d bytes", required, limit)
	case required == 0 && limit == 0:
		return 0, outOfRange("the size is 0: want at least %d bytes", sizeMin)
	case limit > 0 && limit < required:
		return 0, outOfRange("the size is at least %d and at most %d bytes, which none is", required, limit)
	case required > sizeMax:
		return 0, outOfRange("a size of %d bytes: must be at most %d", required, int64(sizeMax))
	}
	size := uint64(required)
	if required == 0 {
		size = min(sizeDefault, uint64(limit)/sizeStep*sizeStep)
	}
	size = max(size, least, sizeMin)
	size = (size + sizeStep - 1) / sizeStep * sizeStep
	if limit > 0 && size > uint64(limit) {
		return 0, outOfRange("at most %d bytes: the volume needs %d", limit, size)
	}
	return size, nil
}

func outOfRange(format string, args ...any) error {
	return status.Errorf(codes.OutOfRange, format, args...)
}

// fits says whether a size is one that a range asks for.
func fits(size uint64, r *spec.CapacityRange) bool {
	return size >= uint64(max(r.GetRequiredBytes(), 0)) && (r.GetLimitBytes() <= 0 || size <= uint64(r.GetLimitBytes()))
}

// usable is the size of a volume as its user sees it: LUKS has some of it.
func usable(v *controlpb.Volume) uint64 {
	if v.GetLabels()[labelEncrypted] != "" {
		return v.GetSizeBytes() - min(luksHeader, v.GetSizeBytes())
	}
	return v.GetSizeBytes()
}

// provisioned is the size of the volume for a usable one.
func provisioned(size uint64, encrypted bool) uint64 {
	if encrypted {
		return size + luksHeader
	}
	return size
}
