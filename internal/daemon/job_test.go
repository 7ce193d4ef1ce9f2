package daemon

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// TestAJobThatWaitsSaysWhy deletes a snapshot that a clone stands on. The job cannot
// end before the clone is gone, and tells so: in its answer, in the list, to whoever
// watches it; and no more once it goes on.
func TestAJobThatWaitsSaysWhy(t *testing.T) {
	for name, stands := range map[string]struct{ prepare, remove func(n *testNode) error }{
		"clone": {
			func(n *testNode) error {
				_, err := n.client.Volumes.Clone(t.Context(), &controlpb.CloneVolumeRequest{SourceVolume: "w", SourceSnapshot: "g", Name: "k"})
				return err
			},
			func(n *testNode) error {
				_, err := n.client.Volumes.Delete(t.Context(), &controlpb.DeleteVolumeRequest{Name: "k"})
				return err
			},
		},
		"revert": {
			func(n *testNode) error {
				if _, err := n.client.Snapshots.Create(t.Context(), &controlpb.CreateSnapshotRequest{Volume: "w", Name: "later"}); err != nil {
					return err
				}
				_, err := n.client.Snapshots.Revert(t.Context(), &controlpb.RevertSnapshotRequest{Volume: "w", Name: "g"})
				return err
			},
			func(n *testNode) error {
				_, err := n.client.Snapshots.Delete(t.Context(), &controlpb.DeleteSnapshotRequest{Volume: "w", Name: "later"})
				return err
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nil, nil)
			n.volume("w", mib)
			c := n.dial("w")
			if err := c.Write(t.Context(), make([]byte, 4096), 0, 0); err != nil {
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			n.closedVolumes()
			if _, err := n.client.Snapshots.Create(t.Context(), &controlpb.CreateSnapshotRequest{Volume: "w", Name: "g"}); err != nil {
				t.Fatal(err)
			}
			if err := stands.prepare(n); err != nil {
				t.Fatal(err)
			}
			j, err := n.client.Snapshots.Delete(t.Context(), &controlpb.DeleteSnapshotRequest{Volume: "w", Name: "g"})
			if err != nil || j.GetNote() == "" || j.GetState() != controlpb.JobState_JOB_STATE_RUNNING {
				t.Fatalf("%v, %v", j, err)
			}
			l, err := n.client.Jobs.List(t.Context(), &controlpb.ListJobsRequest{Running: true})
			if err != nil || len(l.GetJobs()) != 1 || l.GetJobs()[0].GetNote() != j.GetNote() {
				t.Fatalf("%v, %v", l, err)
			}
			watch, err := n.client.Jobs.Watch(t.Context(), &controlpb.WatchJobRequest{Id: j.GetId(), Interval: durationpb.New(time.Millisecond)})
			if err != nil {
				t.Fatal(err)
			}
			if seen, err := watch.Recv(); err != nil || seen.GetNote() != j.GetNote() {
				t.Fatalf("%v, %v", seen, err)
			}
			if err := stands.remove(n); err != nil {
				t.Fatal(err)
			}
			if ended, err := n.client.WaitJob(t.Context(), j.GetId(), nil); err != nil || ended.GetState() != controlpb.JobState_JOB_STATE_DONE || ended.GetNote() != "" {
				t.Errorf("%v, %v", ended, err)
			}
		})
	}
}
