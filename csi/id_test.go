package csi

import (
	"strings"
	"testing"
)

func TestIDsAreReadAsTheyWereWritten(t *testing.T) {
	long := strings.Repeat("n", 253)
	for _, node := range []string{"node-1", "ip-10-0-0-1.eu-central-1.compute.internal", long} {
		v := VolumeID{node, strings.Repeat("p", poolMax), "pvc-" + strings.Repeat("a", 36)}
		text := v.String()
		if len(text) > idMax {
			t.Errorf("the id %s has %d bytes", text, len(text))
		}
		back, err := ParseVolumeID(text)
		if err != nil || !onNode(back.Node, node) || back.Pool != v.Pool || back.Volume != v.Volume {
			t.Errorf("%s is read as %+v, %v", text, back, err)
		}
		if onNode(back.Node, "node-2") {
			t.Errorf("%s is on node-2", text)
		}
		if again := back.String(); again != text {
			t.Errorf("%s is written again as %s", text, again)
		}
		s := SnapshotID{node, v.Pool, v.Volume, "snapshot-" + strings.Repeat("b", 36)}
		if text := s.String(); len(text) > idMax {
			t.Errorf("the id %s has %d bytes", text, len(text))
		} else if back, err := ParseSnapshotID(text); err != nil || back.Snapshot != s.Snapshot || back.Source().Volume != v.Volume {
			t.Errorf("%s is read as %+v, %v", text, back, err)
		}
		g := GroupID{node, v.Pool, s.Snapshot}
		if back, err := ParseGroupID(g.String()); err != nil || back.Group != g.Group {
			t.Errorf("%s is read as %+v, %v", g, back, err)
		}
	}
}

func TestWhatIsNoIDIsRefused(t *testing.T) {
	for _, id := range []string{
		"", "v1", "v1/n/p", "v1/n/p/v/x", "v2/n/p/v", "s1/n/p/v", "v1//p/v", "v1/n//v", "v1/n/p/", "v1/n/p/..", "v1/n/p/-v", "v1/n-/p/v", "v1/~/p/v",
		"v1/~0123/p/v", "v1/n/p/v\x00", "v1/n/p/" + strings.Repeat("v", idMax), "v1/n/p/é", "reallyfakevolumeid",
	} {
		if got, err := ParseVolumeID(id); err == nil {
			t.Errorf("%q is read as %+v", id, got)
		}
	}
	if _, err := ParseSnapshotID("v1/n/p/v"); err == nil {
		t.Error("a volume's id is read as a snapshot's")
	}
	if _, err := ParseGroupID("s1/n/p/v"); err == nil {
		t.Error("a snapshot's id is read as a group's")
	}
}

func TestNamesOfPoolsAreKeptOrHashed(t *testing.T) {
	kept := "pvc-7e4b3f7c-5d1c-4a3e-8f59-0a6a3a5d8f10"
	if got := nameOf(kept, volumeNameMax); got != kept {
		t.Errorf("%s becomes %s", kept, got)
	}
	seen := map[string]string{}
	for _, name := range []string{"größe", "a b", "a/b", "../../etc", "", strings.Repeat("x", 41), strings.Repeat("x", 42), "csi-already-like-a-hash", "-v"} {
		got := nameOf(name, volumeNameMax)
		if !validName(got, volumeNameMax) || got == name {
			t.Errorf("%q becomes %q", name, got)
		}
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q both become %s", name, other, got)
		}
		seen[got] = name
	}
}

func FuzzParseVolumeID(f *testing.F) {
	for _, id := range []string{"v1/node-1/default/pvc-1", "v1/~0123456789abcdef/p/v", "v1/n/p", "s1/n/p/v/s", "g1/n/p/g", "\xff"} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, id string) {
		if v, err := ParseVolumeID(id); err == nil && v.String() != id {
			t.Errorf("%q is written again as %q", id, v)
		}
		if s, err := ParseSnapshotID(id); err == nil && s.String() != id {
			t.Errorf("%q is written again as %q", id, s)
		}
		if g, err := ParseGroupID(id); err == nil && g.String() != id {
			t.Errorf("%q is written again as %q", id, g)
		}
		for _, max := range []int{volumeNameMax, snapshotNameMax} {
			if got := nameOf(id, max); !validName(got, max) {
				t.Errorf("%q becomes %q", id, got)
			}
		}
	})
}
