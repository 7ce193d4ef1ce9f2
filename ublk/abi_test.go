package ublk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// The command area of a reactor's ring holds an I/O command.
var _ [reactor.CommandSize - ioCommandSize]struct{}
var _ [ioCommandSize - reactor.CommandSize]struct{}

func TestNumbersAreThoseOfTheHeader(t *testing.T) {
	// _IOR('u', n, 32 bytes), _IOWR('u', n, 32 bytes), _IOWR('u', n, 16 bytes) of include/uapi/linux/ublk_cmd.h.
	for _, test := range []struct {
		name      string
		got, want uint32
	}{
		{"UBLK_U_CMD_GET_DEV_INFO", controlNumber(commandGetDevInfo, true), 0x80207502},
		{"UBLK_U_CMD_ADD_DEV", controlNumber(commandAddDev, true), 0xc0207504},
		{"UBLK_U_CMD_DEL_DEV", controlNumber(commandDelDev, true), 0xc0207505},
		{"UBLK_U_CMD_START_DEV", controlNumber(commandStartDev, true), 0xc0207506},
		{"UBLK_U_CMD_STOP_DEV", controlNumber(commandStopDev, true), 0xc0207507},
		{"UBLK_U_CMD_SET_PARAMS", controlNumber(commandSetParams, true), 0xc0207508},
		{"UBLK_U_CMD_GET_PARAMS", controlNumber(commandGetParams, true), 0x80207509},
		{"UBLK_U_CMD_START_USER_RECOVERY", controlNumber(commandStartUserRecovery, true), 0xc0207510},
		{"UBLK_U_CMD_END_USER_RECOVERY", controlNumber(commandEndUserRecovery, true), 0xc0207511},
		{"UBLK_U_CMD_GET_DEV_INFO2", controlNumber(commandGetDevInfo2, true), 0x80207512},
		{"UBLK_U_CMD_GET_FEATURES", controlNumber(commandGetFeatures, true), 0x80207513},
		{"UBLK_U_CMD_UPDATE_SIZE", controlNumber(commandUpdateSize, true), 0xc0207515},
		{"UBLK_U_CMD_QUIESCE_DEV", controlNumber(commandQuiesceDev, true), 0xc0207516},
		{"UBLK_U_IO_FETCH_REQ", ioNumber(commandFetchRequest, true), 0xc0107520},
		{"UBLK_U_IO_COMMIT_AND_FETCH_REQ", ioNumber(commandCommitAndFetch, true), 0xc0107521},
		{"UBLK_CMD_ADD_DEV", controlNumber(commandAddDev, false), 4},
		{"UBLK_IO_FETCH_REQ", ioNumber(commandFetchRequest, false), 0x20},
	} {
		if test.got != test.want {
			t.Errorf("%s is %#x, want %#x", test.name, test.got, test.want)
		}
	}
}

func TestStructuresComeBack(t *testing.T) {
	d := devInfo{queues: 1, depth: 2, state: StateQuiesced, ioMax: 4, device: 5, pid: -1, features: 1<<40 | 7, tag: tagMark | 8, uid: 9, gid: 10}
	var b [devInfoSize]byte
	d.encode(b[:])
	var back devInfo
	if back.decode(b[:]); back != d {
		t.Errorf("device %+v came back as %+v", d, back)
	}
	p := params{types: paramBasic | paramDiscard, attributes: 1, logical: 9, physical: 12, optimal: 13, smallest: 14, ioMax: 15, chunk: 16,
		size: 1 << 40, granularity: 17, discardMax: 18, writeZeroesMax: 19}
	var q [paramsSize]byte
	p.encode(q[:])
	var again params
	if again.decode(q[:]); again != p {
		t.Errorf("parameters %+v came back as %+v", p, again)
	}
	if n := binary.NativeEndian.Uint16(q[56:]); n != 1 {
		t.Errorf("%d segments of a discard", n)
	}
	var c [ioCommandSize]byte
	encodeIOCommand(&c, 0x0102, 0x0304, -5, 0x0807060504030201)
	want := binary.NativeEndian.AppendUint16(nil, 0x0102)
	want = binary.NativeEndian.AppendUint16(want, 0x0304)
	want = binary.NativeEndian.AppendUint32(want, 0xfffffffb)
	want = binary.NativeEndian.AppendUint64(want, 0x0807060504030201)
	if !bytes.Equal(c[:], want) {
		t.Errorf("command % x, want % x", c, want)
	}
	if got := ioOffset(3, 5); got != 0x80000000+3<<41+5<<25 {
		t.Errorf("offset %#x", got)
	}
}

func TestParametersFollowTheDevice(t *testing.T) {
	all := datapath.FeatureFlush | datapath.FeatureFUA | datapath.FeatureDiscard | datapath.FeatureWriteZeroes
	const blocks = ioMaxSectors
	for _, test := range []struct {
		name string
		info datapath.Info
		want params
	}{
		{"all features", datapath.Info{Size: 1 << 30, Features: all, MinIO: 1, PreferredIO: 4096},
			params{types: paramBasic | paramDiscard, attributes: attributeVolatileCache | attributeFUA, logical: 9, physical: 12, smallest: 12, optimal: 12,
				ioMax: blocks, size: 1 << 21, granularity: 4096, discardMax: 1 << 22, writeZeroesMax: 1 << 22}},
		{"plain, odd size", datapath.Info{Size: 1<<30 + 5000, MinIO: 4096, PreferredIO: 1 << 17},
			params{types: paramBasic, logical: 12, physical: 12, smallest: 12, optimal: 17, ioMax: blocks, size: 1<<21 + 8}},
		{"read-only", datapath.Info{Size: 4096, Features: all | datapath.FeatureRotational, MinIO: 512, ReadOnly: true},
			params{types: paramBasic, attributes: attributeReadOnly | attributeRotational | attributeVolatileCache | attributeFUA,
				logical: 9, physical: 12, smallest: 12, optimal: 12, ioMax: blocks, size: 8}},
		{"FUA without flush, small requests", datapath.Info{Size: 4096, Features: datapath.FeatureFUA | datapath.FeatureDiscard, MaxIO: 65537},
			params{types: paramBasic | paramDiscard, logical: 9, physical: 12, smallest: 12, optimal: 12, ioMax: 128, size: 8, granularity: 4096, discardMax: 1 << 22}},
	} {
		got, err := paramsOf(&test.info, ioMaxOf(&test.info, 0))
		if err != nil || got != test.want {
			t.Errorf("%s:\n got %+v, %v\nwant %+v", test.name, got, err, test.want)
		}
	}
	for name, info := range map[string]datapath.Info{
		"large blocks":   {Size: 1 << 30, MinIO: 8192},
		"odd blocks":     {Size: 1 << 30, MinIO: 520},
		"no block":       {Size: 511},
		"short requests": {Size: 1 << 30, MaxIO: 2048},
	} {
		if _, err := paramsOf(&info, ioMaxOf(&info, 0)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

const ioMaxSectors = ioMaxDefault >> sectorShift

func TestDescriptorsBecomeRequests(t *testing.T) {
	for _, test := range []struct {
		name string
		d    descriptor
		want datapath.Request
		ok   bool
	}{
		{"read", descriptor{kernelRead | 1<<8, 8, 16}, datapath.Request{Op: datapath.OpRead, Offset: 8192, Length: 4096}, true},
		{"write", descriptor{kernelWrite, 1, 3}, datapath.Request{Op: datapath.OpWrite, Offset: 1536, Length: 512}, true},
		{"write FUA", descriptor{kernelWrite | kernelFUA, 1, 3}, datapath.Request{Op: datapath.OpWrite, Flags: datapath.FlagFUA, Offset: 1536, Length: 512}, true},
		{"flush", descriptor{kernelFlush, 7, math.MaxUint64}, datapath.Request{Op: datapath.OpFlush}, true},
		{"discard", descriptor{kernelDiscard, 1 << 22, 0}, datapath.Request{Op: datapath.OpDiscard, Length: 2 << 30}, true},
		{"zeroes", descriptor{kernelWriteZeroes, 8, 8}, datapath.Request{Op: datapath.OpWriteZeroes, Offset: 4096, Length: 4096}, true},
		{"zeroes kept", descriptor{kernelWriteZeroes | kernelNoUnmap | kernelFUA, 8, 8},
			datapath.Request{Op: datapath.OpWriteZeroes, Flags: datapath.FlagNoUnmap | datapath.FlagFUA, Offset: 4096, Length: 4096}, true},
		{"unknown", descriptor{18, 8, 8}, datapath.Request{}, false},
	} {
		r := datapath.Request{Flags: 0xffff}
		if ok := test.d.requestOf(&r); ok != test.ok {
			t.Errorf("%s: %t", test.name, ok)
		} else if ok && (r.Op != test.want.Op || r.Flags != test.want.Flags || r.Offset != test.want.Offset || r.Length != test.want.Length) {
			t.Errorf("%s: %+v, want %+v", test.name, r, test.want)
		}
	}
}

// FuzzDescriptor holds that no memory content makes a request that Validate lets pass
// beyond the device.
func FuzzDescriptor(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0}, descriptorSize))
	f.Add(bytes.Repeat([]byte{0xff}, descriptorSize))
	f.Add(append([]byte{1, 0x20, 0, 0, 8, 0, 0, 0, 16}, make([]byte, 15)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < descriptorSize {
			return
		}
		var d descriptor
		d.decode(b)
		var r datapath.Request
		if !d.requestOf(&r) {
			return
		}
		info := datapath.Info{Size: 1 << 30, MinIO: 512}
		if datapath.Validate(&info, &r) != datapath.StatusOK || r.Op == datapath.OpFlush {
			return
		}
		if r.Offset>>sectorShift != binary.NativeEndian.Uint64(b[8:]) || r.Length>>sectorShift != uint64(binary.NativeEndian.Uint32(b[4:])) || r.Offset+r.Length > info.Size {
			t.Errorf("% x became %d bytes at %d", b, r.Length, r.Offset)
		}
	})
}

// FuzzDeviceStructures holds that what the driver writes is decoded without loss.
func FuzzDeviceStructures(f *testing.F) {
	f.Add(make([]byte, paramsSize))
	f.Add(bytes.Repeat([]byte{0xff}, paramsSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < paramsSize {
			return
		}
		var d, again devInfo
		d.decode(b)
		var e [devInfoSize]byte
		d.encode(e[:])
		if again.decode(e[:]); again != d {
			t.Errorf("%+v came back as %+v", d, again)
		}
		if i := infoOf(&d); !i.Ours && i.Tag != 0 {
			t.Errorf("a stranger's device has tag %x", i.Tag)
		}
		var p params
		p.decode(b)
		_ = takeable(&p, &datapath.Info{Size: 1 << 30}) // no panic
	})
}

func TestKnownBadKernelsAreRefused(t *testing.T) {
	for release, bad := range map[string]bool{
		"6.18.4": true, "6.18.4-arch1-1": true, "6.18.5": true, "6.18.5-200.fc43.x86_64": true, "6.18.6": false, "6.18.44": false,
		"6.18.3-arch1-1": false, "6.17.0-1015-azure": true, "6.17.0-1017-aws": true, "6.17.0-1018-azure": true, "6.17.0-1008-azure": false,
		"6.17.0-1019-azure": false, "6.17.0-5-generic": false, "6.17.0": false, "6.12.95+deb12-amd64": false,
		"6.18.5+deb14-amd64": true, "6.18.5_1": true, "6.18.50+deb14-amd64": false, "7.3.4+deb13-amd64": false, "": false, "-": false,
	} {
		err := checkKernel(release)
		var k *KernelError
		if errors.As(err, &k) != bad {
			t.Errorf("%q: %v", release, err)
		}
		if bad && len(k.Sources) == 0 {
			t.Errorf("%q: no source", release)
		}
	}
}

func TestTagsFitAndTellVolumesApart(t *testing.T) {
	if a, b := TagOf("a"), TagOf("b"); a == b || a >= 1<<tagBits || b >= 1<<tagBits {
		t.Errorf("tags %x, %x", a, b)
	}
	d := devInfo{tag: tagMark | uint64(TagOf("a"))}
	if i := infoOf(&d); !i.Ours || i.Tag != TagOf("a") {
		t.Errorf("device with a tag: %+v", i)
	}
	d.tag = 2 // ublksrv's UBLKSRV_F_NEED_EVENTFD
	if i := infoOf(&d); i.Ours || i.Tag != 0 {
		t.Errorf("device of another server: %+v", i)
	}
}
