package csi

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestOnlyVolumesThatReadAsZerosAreFormattedWithoutZeroing(t *testing.T) {
	r := newRig(t, nil)
	id := r.create("v", gib, nil).GetVolumeId()
	client, err := r.driver.daemon.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var asked []string
	known := true // to this mke2fs
	r.driver.node.command = func(_ context.Context, _ []byte, name string, args ...string) ([]byte, error) {
		asked = append(asked, name+" "+strings.Join(args, " "))
		if !known {
			return nil, errors.New("exit status 1")
		}
		return nil, nil
	}
	user := []string{"-m", "1"}
	for _, tt := range []struct {
		name      string
		fsType    string
		options   []string
		allocated uint64
		depth     uint32
		labels    map[string]string
		readOnly  bool
		unknown   bool
		want      []string
	}{
		{name: "ext4", fsType: "ext4", want: []string{"-m", "1", "-E", prezeroed}},
		{name: "xfs", fsType: "xfs", want: []string{"-m", "1", "-K"}},
		{name: "xfs as the user has it", fsType: "xfs", options: []string{"-K"}, want: []string{"-K"}},
		{name: "ext4 with options", fsType: "ext4", options: []string{"-E", "a=1", "-E", "discard"}, want: []string{"-E", "a=1", "-E", prezeroed + ",discard"}},
		{name: "ext4 with an option joined", fsType: "ext4", options: []string{"-Ediscard", "-m", "2"}, want: []string{"-E" + prezeroed + ",discard", "-m", "2"}},
		{name: "an old mke2fs", fsType: "ext4", unknown: true, want: user},
		{name: "ext4 after a mkfs that was cut", fsType: "ext4", allocated: 4096, want: user},
		{name: "xfs after a mkfs that was cut", fsType: "xfs", allocated: 4096, want: user},
		{name: "a snapshot has what a cut mkfs left", fsType: "ext4", depth: 2, want: user},
		{name: "encrypted", fsType: "ext4", labels: map[string]string{labelBlank: "true", labelEncrypted: "true"}, want: user},
		{name: "a volume that was used", fsType: "ext4", labels: map[string]string{}, want: user},
		{name: "read only", fsType: "ext4", readOnly: true, want: user},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := r.daemon.volumes["default/v"]
			v.AllocatedBytes, v.Depth, known, asked = tt.allocated, tt.depth, !tt.unknown, nil
			s := &staging{driver: r.driver, client: client, fsType: tt.fsType, readOnly: tt.readOnly, mkfsOptions: user,
				volume: &controlpb.Volume{Pool: "default", Name: v.GetName(), Labels: map[string]string{labelBlank: "true"}}}
			if tt.options != nil {
				s.mkfsOptions = tt.options
			}
			if tt.labels != nil {
				s.volume.Labels = tt.labels
			}
			before := slices.Clone(s.mkfsOptions)
			got, err := s.formatOptions(t.Context(), "/dev/x")
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("options %q, %v, want %q", got, err, tt.want)
			}
			if !slices.Equal(before, s.mkfsOptions) {
				t.Errorf("the user's options became %q", s.mkfsOptions)
			}
			if slices.ContainsFunc(asked, func(c string) bool { return !strings.HasPrefix(c, "mkfs.ext4 -n ") }) {
				t.Errorf("ran %q", asked)
			}
		})
	}

	r.daemon.fail("Volumes/Get", status.Error(codes.Unavailable, "gone"))
	s := &staging{driver: r.driver, client: client, fsType: "ext4", path: t.TempDir(),
		volume: &controlpb.Volume{Pool: "default", Name: "v", Labels: map[string]string{labelBlank: "true"}}}
	if err := s.mount(t.Context(), "/dev/x"); status.Code(problem(err)) != codes.Unavailable {
		t.Errorf("volume %s: %v", id, err)
	}
}
