package csi

import (
	"context"
	"slices"
	"strings"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// prezeroed are the extended options of mke2fs that spare it the zeros of inode tables
// and journal, and the discard before (mke2fs(8); the first since e2fsprogs 1.47). The
// kernel does not write the zeros either when it mounts what was made so.
const prezeroed = "assume_storage_prezeroed=1,nodiscard"

// formatOptions gives the options of mkfs for the filesystem on a device: the user's,
// and what a volume that reads as zeros from end to end makes possible. A blank one, which
// is no copy of another, does when it has no cluster allocated and no layer below it. A
// mkfs that was cut leaves some, and a snapshot of that has them instead of the volume; so
// does LUKS, under which the zeros would not read as such either. Then mkfs does as it
// always does.
func (s *staging) formatOptions(ctx context.Context, device string) ([]string, error) {
	if !s.blank() || s.readOnly || s.encrypted() {
		return s.mkfsOptions, nil
	}
	v, err := s.client.Volumes.Get(ctx, &controlpb.GetVolumeRequest{Pool: s.volume.GetPool(), Name: s.volume.GetName()})
	if err != nil {
		return nil, err
	}
	if v.GetAllocatedBytes() > 0 || v.GetSnapshotCount() > 0 || v.GetParent() != "" || v.GetDepth() > 1 {
		return s.mkfsOptions, nil
	}
	switch s.fsType {
	case "xfs":
		if !slices.Contains(s.mkfsOptions, "-K") {
			return append(slices.Clone(s.mkfsOptions), "-K"), nil
		}
	case "ext4":
		// A dry run tells whether this mke2fs knows them.
		if _, err := s.driver.node.command(ctx, nil, "mkfs.ext4", "-n", "-q", "-F", "-E", prezeroed, device); err == nil {
			return withExtended(s.mkfsOptions, prezeroed), nil
		}
	}
	return s.mkfsOptions, nil
}

// withExtended adds extended options before those that are there, which so have the
// last word: of several -E mke2fs takes the last only.
func withExtended(options []string, extended string) []string {
	options = slices.Clone(options)
	for i, o := range slices.Backward(options) {
		switch {
		case i > 0 && options[i-1] == "-E":
			options[i] = extended + "," + o
			return options
		case strings.HasPrefix(o, "-E") && len(o) > len("-E"):
			options[i] = "-E" + extended + "," + o[len("-E"):]
			return options
		}
	}
	return append(options, "-E", extended)
}
