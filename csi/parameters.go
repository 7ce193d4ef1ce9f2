package csi

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// Keys of parameters of a StorageClass, and of the context of a volume.
const (
	keyPool        = "pool"
	keyFSType      = "fsType"
	keyEncrypted   = "encrypted"
	keyIOPS        = "iopsLimit"
	keyBandwidth   = "bandwidthLimit"
	keyVia         = "via"
	keyThick       = "thick"
	keyMkfsOptions = "mkfsOptions"
)

var (
	knownParameters   = []string{keyPool, keyFSType, keyEncrypted, keyIOPS, keyBandwidth, keyVia, keyThick, keyMkfsOptions}
	mutableParameters = []string{keyIOPS, keyBandwidth}
)

// orchestratorPrefix begins the keys that are the orchestrator's.
const orchestratorPrefix = "csi.storage.k8s.io/"

// metadataKeys are the orchestrator's keys that become labels of a volume.
var metadataKeys = []string{orchestratorPrefix + "pvc/name", orchestratorPrefix + "pvc/namespace", orchestratorPrefix + "pv/name"}

// mkfsOptionsMax bounds mkfsOptions: they go through the context of a volume,
// which has 4 KiB in all.
const mkfsOptionsMax = 1024

// filesystems are those that a volume can have, with the smallest device for each.
var filesystems = map[string]uint64{
	"ext4": 1 << 20,
	"xfs":  300 << 20, // mkfs.xfs makes no smaller ones since xfsprogs 5.19
}

const defaultFilesystem = "ext4"

// vias are the ways to make a block device of a volume.
var vias = map[string]controlpb.Via{
	"": controlpb.Via_VIA_UNSPECIFIED, "ublk": controlpb.Via_VIA_UBLK, "nbd": controlpb.Via_VIA_NBD, "fuse": controlpb.Via_VIA_FUSE,
}

// parameters are those of a volume.
type parameters struct {
	pool        string // "": the only one
	fsType      string // "": as the capability says, or the default
	via         string
	mkfsOptions string
	encrypted   bool
	thick       bool
	limits      *controlpb.Limits // nil: none
	labels      map[string]string // from the orchestrator
}

// parseParameters reads what a StorageClass says, and what a VolumeAttributesClass
// says in its place.
func parseParameters(given, mutable map[string]string) (p parameters, err error) {
	p.labels = map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		switch key {
		case keyPool:
			if p.pool = value; !validName(value, poolMax) {
				return p, invalid("parameter pool %q: must be the name of a pool, of 1 to %d letters, digits, '-', '_' and '.'", value, poolMax)
			}
		case keyFSType:
			if p.fsType = value; filesystems[value] == 0 {
				return p, invalid("parameter fsType %q: must be ext4 or xfs", value)
			}
		case keyVia:
			if _, ok := vias[value]; !ok {
				return p, invalid("parameter via %q: must be ublk, nbd or fuse", value)
			}
			p.via = value
		case keyMkfsOptions:
			if p.mkfsOptions = value; len(value) > mkfsOptionsMax {
				return p, invalid("parameter mkfsOptions has %d bytes: must be at most %d", len(value), mkfsOptionsMax)
			}
		case keyEncrypted, keyThick:
			yes, err := strconv.ParseBool(value)
			if err != nil {
				return p, invalid("parameter %s %q: must be true or false", key, value)
			}
			if key == keyThick {
				p.thick = yes
			} else {
				p.encrypted = yes
			}
		case keyIOPS, keyBandwidth:
		default:
			if !strings.HasPrefix(key, orchestratorPrefix) {
				return p, invalid("parameter %q is unknown; known are %s", key, strings.Join(knownParameters, ", "))
			}
			if slices.Contains(metadataKeys, key) {
				p.labels[key] = value
			}
		}
	}
	limits := map[string]string{}
	for _, key := range mutableParameters {
		if value, ok := given[key]; ok {
			limits[key] = value
		}
	}
	maps.Copy(limits, mutable)
	p.limits, err = parseLimits(nil, limits)
	return p, err
}

// parseLimits reads what a VolumeAttributesClass says. What it does not say stays
// as it is in now.
func parseLimits(now *controlpb.Limits, given map[string]string) (*controlpb.Limits, error) {
	l := &controlpb.Limits{Iops: now.GetIops(), BandwidthBytes: now.GetBandwidthBytes()}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		var err error
		switch key {
		case keyIOPS:
			l.Iops, err = units.ParseIOPS(given[key])
		case keyBandwidth:
			l.BandwidthBytes, err = units.ParseBandwidth(given[key])
		default:
			return nil, invalid("parameter %q cannot be changed; parameters of a VolumeAttributesClass are %s", key, strings.Join(mutableParameters, ", "))
		}
		if err != nil {
			return nil, invalid("parameter %s: %v", key, err)
		}
	}
	if l.Iops == 0 && l.BandwidthBytes == 0 {
		return nil, nil
	}
	return l, nil
}

// context is what the node needs to know.
func (p *parameters) context() map[string]string {
	c := map[string]string{}
	for key, value := range map[string]string{keyFSType: p.fsType, keyVia: p.via, keyMkfsOptions: p.mkfsOptions} {
		if value != "" {
			c[key] = value
		}
	}
	if p.encrypted {
		c[keyEncrypted] = "true"
	}
	return c
}

// fingerprint tells volumes of other parameters. Limits are not in it: they change.
func (p *parameters) fingerprint() string {
	return digest(strings.Join([]string{p.pool, p.fsType, p.via, p.mkfsOptions, strconv.FormatBool(p.encrypted), strconv.FormatBool(p.thick)}, "\x00"), 16)
}
