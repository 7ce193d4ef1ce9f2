package csi

import (
	"context"
	"maps"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// Labels of volumes and snapshots. They are what the driver must know of a volume
// and cannot ask the kernel.
const (
	labelName       = Name + "/name"       // what the orchestrator calls it; everything the driver made has it
	labelSource     = Name + "/source"     // id of the snapshot or volume it is a copy of
	labelParameters = Name + "/parameters" // fingerprint of its parameters
	labelEncrypted  = Name + "/encrypted"  // "true": it has LUKS
	labelBlank      = Name + "/blank"      // "true": nobody has used it yet, so a half-made filesystem may be made again
	labelStaged     = Name + "/staged"     // "true": it was attached by NodeStageVolume
	labelClone      = Name + "/clone"      // of a snapshot: the volume that is being made from it; nobody else sees it
	labelGroup      = Name + "/group"      // of a snapshot: name of the group it belongs to
)

// relabel changes labels of a volume; "" removes one. The caller has the lock of
// the volume.
func relabel(ctx context.Context, c *control.Client, v *controlpb.Volume, change map[string]string) (*controlpb.Volume, error) {
	labels := maps.Clone(v.GetLabels())
	if labels == nil {
		labels = map[string]string{}
	}
	same := true
	for key, value := range change {
		same = same && labels[key] == value
		if value == "" {
			delete(labels, key)
		} else {
			labels[key] = value
		}
	}
	if same {
		return v, nil
	}
	return c.Volumes.SetLabels(ctx, &controlpb.SetLabelsRequest{Pool: v.GetPool(), Name: v.GetName(), Labels: labels})
}
