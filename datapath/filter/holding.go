package filter

import "github.com/ashlar-storage/ashlar/datapath"

// holding is what a filter that keeps requests waiting says of itself: it does
// not take data in Submit, though the device below may.
func holding(below datapath.Device) datapath.Info {
	info := below.Info()
	info.Features &^= datapath.FeatureImmediate
	return info
}
