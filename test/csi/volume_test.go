package csi

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// slowCall is after how long a call that is repeated is told of.
const slowCall = 20 * time.Second

// again repeats a call as an orchestrator does, while its error says that it may
// help.
func again[R any](w *world, call func() (R, error)) (R, error) {
	began, told := time.Now(), time.Now()
	for deadline := began.Add(callLimit); ; time.Sleep(20 * time.Millisecond) {
		reply, err := call()
		if time.Since(told) > slowCall {
			told = time.Now()
			w.t.Logf("after %v: %v", time.Since(began).Round(time.Second), err)
		}
		switch status.Code(err) {
		case codes.OK:
			w.succeeded.Add(1)
		case codes.Unavailable, codes.Aborted, codes.Canceled, codes.DeadlineExceeded:
			if time.Now().Before(deadline) {
				continue
			}
		}
		return reply, err
	}
}

// volume is one as its user knows it.
type volume struct {
	w          *world
	name       string
	id         string
	context    map[string]string
	capability *spec.VolumeCapability
	parameters map[string]string
	staging    string
	target     string
}

func mountCapability(fs string) *spec.VolumeCapability {
	return &spec.VolumeCapability{
		AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{FsType: fs}},
		AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func blockCapability() *spec.VolumeCapability {
	return &spec.VolumeCapability{
		AccessType: &spec.VolumeCapability_Block{Block: &spec.VolumeCapability_BlockVolume{}},
		AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// volume gives one that is not made yet.
func (w *world) volume(name string, c *spec.VolumeCapability) *volume {
	return &volume{w: w, name: name, capability: c, staging: w.path("kubelet/staging/" + name), target: w.path("kubelet/pods/" + name)}
}

func (v *volume) create(size int64, source *spec.VolumeContentSource) error {
	reply, err := again(v.w, func() (*spec.CreateVolumeResponse, error) {
		return v.w.CreateVolume(v.w.t.Context(), &spec.CreateVolumeRequest{
			Name: v.name, CapacityRange: &spec.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*spec.VolumeCapability{v.capability},
			Parameters: v.parameters, VolumeContentSource: source,
		})
	})
	v.id, v.context = reply.GetVolume().GetVolumeId(), reply.GetVolume().GetVolumeContext()
	return err
}

func (v *volume) stage() error {
	if err := os.MkdirAll(v.staging, 0o755); err != nil { // the kubelet does
		return err
	}
	_, err := again(v.w, func() (*spec.NodeStageVolumeResponse, error) {
		return v.w.NodeStageVolume(v.w.t.Context(), &spec.NodeStageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability, VolumeContext: v.context})
	})
	return err
}

func (v *volume) publish(target string, readOnly bool) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	_, err := again(v.w, func() (*spec.NodePublishVolumeResponse, error) {
		return v.w.NodePublishVolume(v.w.t.Context(), &spec.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: target, VolumeCapability: v.capability, Readonly: readOnly, VolumeContext: v.context})
	})
	return err
}

func (v *volume) unpublish(target string) error {
	_, err := again(v.w, func() (*spec.NodeUnpublishVolumeResponse, error) {
		return v.w.NodeUnpublishVolume(v.w.t.Context(), &spec.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: target})
	})
	return err
}

func (v *volume) unstage() error {
	_, err := again(v.w, func() (*spec.NodeUnstageVolumeResponse, error) {
		return v.w.NodeUnstageVolume(v.w.t.Context(), &spec.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	})
	return err
}

func (v *volume) delete() error {
	_, err := again(v.w, func() (*spec.DeleteVolumeResponse, error) {
		return v.w.DeleteVolume(v.w.t.Context(), &spec.DeleteVolumeRequest{VolumeId: v.id})
	})
	return err
}

func (v *volume) snapshot(name string) (*spec.Snapshot, error) {
	reply, err := again(v.w, func() (*spec.CreateSnapshotResponse, error) {
		return v.w.CreateSnapshot(v.w.t.Context(), &spec.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id})
	})
	return reply.GetSnapshot(), err
}

func (w *world) deleteSnapshot(id string) error {
	_, err := again(w, func() (*spec.DeleteSnapshotResponse, error) {
		return w.DeleteSnapshot(w.t.Context(), &spec.DeleteSnapshotRequest{SnapshotId: id})
	})
	return err
}

// expand grows the volume, and on its node what is on it.
func (v *volume) expand(to int64) error {
	r := &spec.CapacityRange{RequiredBytes: to}
	if _, err := again(v.w, func() (*spec.ControllerExpandVolumeResponse, error) {
		return v.w.ControllerExpandVolume(v.w.t.Context(), &spec.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: r, VolumeCapability: v.capability})
	}); err != nil {
		return err
	}
	_, err := again(v.w, func() (*spec.NodeExpandVolumeResponse, error) {
		return v.w.NodeExpandVolume(v.w.t.Context(), &spec.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, StagingTargetPath: v.staging, CapacityRange: r, VolumeCapability: v.capability})
	})
	return err
}

// must fails t on the first error.
func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// use creates, stages and publishes.
func (v *volume) use(size int64, source *spec.VolumeContentSource) error {
	if err := v.create(size, source); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := v.stage(); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	if err := v.publish(v.target, false); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
}

// release unpublishes and unstages.
func (v *volume) release() error {
	if err := v.unpublish(v.target); err != nil {
		return fmt.Errorf("unpublish: %w", err)
	}
	if err := v.unstage(); err != nil {
		return fmt.Errorf("unstage: %w", err)
	}
	return nil
}

// drop releases and deletes.
func (v *volume) drop() error {
	if err := v.release(); err != nil {
		return err
	}
	if err := v.delete(); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	return nil
}

// pattern is size bytes that only one seed gives.
func pattern(seed string, size int) []byte {
	key := sha256.Sum256([]byte(seed))
	random := rand.NewChaCha8(key)
	b := make([]byte, size)
	_, _ = random.Read(b) // never fails
	return b
}

// write writes a pattern to a file of the volume, or to the device, durably.
func (v *volume) write(seed string, size int) error {
	path := v.target
	if v.capability.GetMount() != nil {
		path = filepath.Join(v.target, "file")
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(pattern(seed, size), 0)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

// read wants what write wrote.
func (v *volume) read(seed string, size int) error {
	path := v.target
	if v.capability.GetMount() != nil {
		path = filepath.Join(v.target, "file")
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // read-only
	b := make([]byte, size)
	if _, err := io.ReadFull(f, b); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if !bytes.Equal(b, pattern(seed, size)) {
		return fmt.Errorf("%s does not hold what was written", path)
	}
	return nil
}

// counter reads or writes one number at the begin of a device, past the page cache
// of the writer.
func counter(f *os.File, n *uint64, write bool) error {
	var b [8]byte
	if write {
		binary.LittleEndian.PutUint64(b[:], *n)
		if _, err := f.WriteAt(b[:], 0); err != nil {
			return err
		}
		return f.Sync()
	}
	_, err := f.ReadAt(b[:], 0)
	*n = binary.LittleEndian.Uint64(b[:])
	return err
}

func fromSnapshot(id string) *spec.VolumeContentSource {
	return &spec.VolumeContentSource{Type: &spec.VolumeContentSource_Snapshot{Snapshot: &spec.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *spec.VolumeContentSource {
	return &spec.VolumeContentSource{Type: &spec.VolumeContentSource_Volume{Volume: &spec.VolumeContentSource_VolumeSource{VolumeId: id}}}
}
