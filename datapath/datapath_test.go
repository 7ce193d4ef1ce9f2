package datapath_test

import (
	"errors"
	"math"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/ashlar-storage/ashlar/datapath"
)

func TestValidateNeverLetsARequestPastTheEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		edge := rapid.OneOf(rapid.Uint64(), rapid.Uint64Range(0, 1<<20), rapid.Uint64Range(math.MaxUint64-1<<20, math.MaxUint64))
		i := datapath.Info{Size: edge.Draw(t, "size"), MinIO: 1 << rapid.Uint32Range(0, 12).Draw(t, "MinIO"), ReadOnly: rapid.Bool().Draw(t, "read-only")}
		r := datapath.Request{
			Op:     datapath.Op(rapid.Uint8Range(0, uint8(datapath.OpCount)-1).Draw(t, "op")),
			Offset: edge.Draw(t, "offset"), Length: edge.Draw(t, "length"),
		}
		if r.Op == datapath.OpFlush {
			r.Offset, r.Length = 0, 0
		}
		end := r.Offset + r.Length
		inside := end >= r.Offset && end <= i.Size
		aligned := r.Offset%uint64(i.MinIO) == 0 && r.Length%uint64(i.MinIO) == 0
		writes := r.Op == datapath.OpWrite || r.Op == datapath.OpDiscard || r.Op == datapath.OpWriteZeroes
		want := datapath.StatusOK
		switch {
		case r.Op == datapath.OpFlush:
		case writes && i.ReadOnly:
			want = datapath.StatusReadOnly
		case !inside && (r.Op == datapath.OpWrite || r.Op == datapath.OpWriteZeroes):
			want = datapath.StatusNoSpace
		case !inside || !aligned:
			want = datapath.StatusInvalid
		}
		if got := datapath.Validate(&i, &r); got != want {
			t.Fatalf("%s %d+%d on %+v: %s, want %s", r.Op, r.Offset, r.Length, i, got, want)
		}
	})
}

func TestPiecesCoverARangeAndEndAtBoundaries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		boundary := uint64(1) << rapid.Uint32Range(0, 22).Draw(t, "boundary")
		offset, length := rapid.Uint64Range(0, 1<<40).Draw(t, "offset"), rapid.Uint64Range(0, boundary*20).Draw(t, "length")
		end := offset + length
		for length > 0 {
			n := datapath.PieceLength(offset, length, boundary)
			if n == 0 || n > length || offset/boundary != (offset+n-1)/boundary {
				t.Fatalf("piece %d+%d of %d", offset, n, length)
			}
			offset, length = offset+n, length-n
			if length > 0 && offset%boundary != 0 {
				t.Fatalf("a piece ends at %d", offset)
			}
		}
		if offset != end {
			t.Fatalf("pieces end at %d, not at %d", offset, end)
		}
	})
}

func TestStatusesHaveNamesAndErrnos(t *testing.T) {
	seen := map[string]bool{}
	for s := datapath.StatusOK; s <= datapath.StatusCorrupt; s++ {
		name := s.String()
		if name == "" || seen[name] {
			t.Errorf("status %d is called %q", s, name)
		}
		seen[name] = true
		if (s == datapath.StatusOK) != (s.Errno() == 0) || (s == datapath.StatusOK) != (s.Err() == nil) {
			t.Errorf("%s: errno %d, error %v", s, s.Errno(), s.Err())
		}
		if s != datapath.StatusCorrupt && datapath.StatusOfErrno(s.Errno()) != s {
			t.Errorf("%s comes back from its errno as %s", s, datapath.StatusOfErrno(s.Errno()))
		}
		if s != datapath.StatusOK && !errors.Is(s.Err(), s.Errno()) {
			t.Errorf("%v is not %v", s.Err(), s.Errno())
		}
	}
	if !errors.Is(datapath.StatusNoSpace.Err(), unix.ENOSPC) {
		t.Error("no space is not ENOSPC")
	}
	for _, errno := range []unix.Errno{unix.EBADF, unix.EFAULT, unix.ENXIO, unix.ETIMEDOUT} {
		if s := datapath.StatusOfErrno(errno); s != datapath.StatusIO {
			t.Errorf("%v is %s", errno, s)
		}
	}
	if s := datapath.Status(200); s.String() != "status(200)" || s.Errno() != unix.EIO {
		t.Errorf("status 200 is %s, %v", s, s.Errno())
	}
}

func TestOperationsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for op := datapath.Op(0); op < datapath.OpCount; op++ {
		if seen[op.String()] || op.String() == "" {
			t.Errorf("operation %d is called %q", op, op)
		}
		seen[op.String()] = true
	}
	if got := datapath.OpCount.String(); got != "op(7)" {
		t.Errorf("got %q", got)
	}
}

func TestInfoHasFeatures(t *testing.T) {
	i := datapath.Info{Features: datapath.FeatureFlush | datapath.FeatureFUA}
	if !i.Has(datapath.FeatureFlush|datapath.FeatureFUA) || i.Has(datapath.FeatureFlush|datapath.FeatureDiscard) {
		t.Error("wrong")
	}
}
