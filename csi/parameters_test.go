package csi

import (
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestParametersAreRead(t *testing.T) {
	p, err := parseParameters(map[string]string{
		"pool": "fast", "fsType": "xfs", "encrypted": "true", "thick": "true", "via": "nbd", "mkfsOptions": "-m 0", "iopsLimit": "10k", "bandwidthLimit": "100MiB",
		"csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/whatever": "x",
	}, map[string]string{"iopsLimit": "5k"})
	if err != nil {
		t.Fatal(err)
	}
	if p.pool != "fast" || p.fsType != "xfs" || !p.encrypted || !p.thick || p.via != "nbd" || p.mkfsOptions != "-m 0" || len(p.labels) != 1 {
		t.Errorf("read as %+v", p)
	}
	if p.limits.GetIops() != 5000 || p.limits.GetBandwidthBytes() != 100*mib {
		t.Errorf("the limits are %v", p.limits)
	}
	if c := p.context(); c[keyEncrypted] != "true" || c[keyFSType] != "xfs" || c[keyVia] != "nbd" || c[keyMkfsOptions] != "-m 0" {
		t.Errorf("the context is %v", c)
	}
}

func TestWrongParametersAreRefused(t *testing.T) {
	for key, value := range map[string]string{
		"pool": "no such/name", "fsType": "btrfs", "encrypted": "perhaps", "thick": "2", "via": "usb", "iopsLimit": "many", "bandwidthLimit": "fast",
		"mkfsOptions": strings.Repeat("x", mkfsOptionsMax+1), "fstype": "ext4", "replicas": "3",
	} {
		_, err := parseParameters(map[string]string{key: value}, nil)
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
	_, err := parseParameters(map[string]string{"replicas": "3"}, nil)
	for _, known := range knownParameters {
		if !strings.Contains(err.Error(), known) {
			t.Errorf("%q does not name %s", err, known)
		}
	}
	if _, err := parseParameters(map[string]string{"pool": strings.Repeat("p", poolMax+1)}, nil); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a long name of a pool: %v", err)
	}
	if _, err := parseLimits(nil, map[string]string{"fsType": "ext4"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a parameter that cannot change: %v", err)
	}
}

func TestLimitsThatAreNotNamedStay(t *testing.T) {
	now := &controlpb.Limits{Iops: 7, BandwidthBytes: 8}
	if l, err := parseLimits(now, map[string]string{"iopsLimit": "9"}); err != nil || l.GetIops() != 9 || l.GetBandwidthBytes() != 8 {
		t.Errorf("%v, %v", l, err)
	}
	if l, err := parseLimits(now, map[string]string{"iopsLimit": "0", "bandwidthLimit": "0"}); err != nil || l != nil {
		t.Errorf("%v, %v", l, err)
	}
}

func TestSizes(t *testing.T) {
	for _, tt := range []struct {
		required, limit int64
		least           uint64
		want            uint64
		code            codes.Code
	}{
		{0, 0, 0, 0, codes.OutOfRange},
		{-1, 0, 0, 0, codes.OutOfRange},
		{1, -1, 0, 0, codes.OutOfRange},
		{2, 1, 0, 0, codes.OutOfRange},
		{1, 0, 0, sizeMin, codes.OK},
		{1, mib, 2 * mib, 0, codes.OutOfRange},
		{mib + 1, 0, 0, mib + sizeStep, codes.OK},
		{mib + 1, mib + 1, 0, 0, codes.OutOfRange},
		{0, 10 * mib, 0, 10 * mib, codes.OK},
		{0, 10 * gib, 0, sizeDefault, codes.OK},
		{sizeMax, 0, 0, sizeMax, codes.OK},
		{sizeMax + 1, 0, 0, 0, codes.OutOfRange},
		{1 << 62, 0, 0, 0, codes.OutOfRange},
	} {
		got, err := sizeOf(&spec.CapacityRange{RequiredBytes: tt.required, LimitBytes: tt.limit}, tt.least)
		if status.Code(err) != tt.code || got != tt.want {
			t.Errorf("%d to %d, at least %d: %d, %v; want %d, %v", tt.required, tt.limit, tt.least, got, err, tt.want, tt.code)
		}
	}
	if got, err := sizeOf(nil, 300*mib); err != nil || got != sizeDefault {
		t.Errorf("no range: %d, %v", got, err)
	}
}

func TestCapabilitiesOfOneNodeOnly(t *testing.T) {
	mode := func(m spec.VolumeCapability_AccessMode_Mode) *spec.VolumeCapability {
		c := mountCapability("")
		c.AccessMode.Mode = m
		return c
	}
	for _, m := range accessModes {
		if err := checkCapability(mode(m)); err != nil {
			t.Errorf("%v: %v", m, err)
		}
	}
	for name, c := range map[string]*spec.VolumeCapability{
		"none": nil, "no type": {AccessMode: blockCapability().AccessMode}, "no mode": mode(0), "btrfs": mountCapability("btrfs"),
		"many writers": mode(spec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER), "many readers": mode(spec.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY),
	} {
		if err := checkCapability(c); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := checkCapabilities([]*spec.VolumeCapability{mountCapability("ext4"), mountCapability("xfs")}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("two filesystems: %v", err)
	}
	if fs, mounted, err := checkCapabilities([]*spec.VolumeCapability{blockCapability(), mountCapability("xfs")}); err != nil || fs != "xfs" || !mounted {
		t.Errorf("block and mount: %q, %t, %v", fs, mounted, err)
	}
}
