package main

import (
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func newSnapshotCommand() *cobra.Command {
	return groupCommand("snapshot", "Keep volumes as they are, and go back",
		`A snapshot is a volume as it was at one point in the order of its writes. It is
taken at once and under load, costs no space until the volume is written to, and
is exported read-only as VOLUME@SNAPSHOT.`,
		newSnapshotCreateCommand(), newSnapshotGroupCommand(), newSnapshotListCommand(), newSnapshotRevertCommand(), newSnapshotDeleteCommand())
}

// snapshotName is the name of a snapshot on its node.
func snapshotName(p *controlpb.Snapshot) string { return p.GetVolume() + "@" + p.GetName() }

func newSnapshotCreateCommand() *cobra.Command {
	var pool string
	var pairs []string
	c, s := controlCommand(&cobra.Command{
		Use: "create [flags] VOLUME@SNAPSHOT | VOLUME SNAPSHOT", Short: "Keep a volume as it is now",
		Long: `Create keeps a volume as it is now. Writes that completed before are in the
snapshot; for a file system that is in use this is as if the power had failed, so
freeze it first (fsfreeze) if its files must be whole.`,
		Example: "  ashlar snapshot create vm1@monday",
		Args:    snapshotArgs,
	}, func(s *session, args []string) error {
		volume, snapshot, _ := splitSnapshot(args...) // checked with the arguments
		labels, err := labels(pairs)
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		p, err := client.Snapshots.Create(s.ctx, &controlpb.CreateSnapshotRequest{Pool: pool, Volume: volume, Name: snapshot, Labels: labels})
		if err != nil {
			return err
		}
		return s.say(p, "snapshot %s: %s in pool %s", snapshotName(p), humane(p.GetSizeBytes()), p.GetPool())
	}, completeNewSnapshot, completeNothing)
	addPoolFlag(c, s, &pool, poolOfVolume)
	c.Flags().StringArrayVar(&pairs, "label", nil, "KEY=VALUE to keep with it (repeatable)")
	return c
}

func newSnapshotGroupCommand() *cobra.Command {
	var pool string
	var pairs []string
	c, s := controlCommand(&cobra.Command{
		Use: "create-group [flags] SNAPSHOT VOLUME...", Short: "Keep several volumes as they are at one moment",
		Long: `Create-group keeps several volumes of one pool as they are at one point in the order
of the writes of all of them: for data of one program that lies on several volumes.
All of the snapshots are made, under one name, or none.`,
		Example: "  ashlar snapshot create-group monday db-data db-log",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef("name the snapshot, and the volumes to keep")
			}
			return nil
		},
	}, func(s *session, args []string) error {
		labels, err := labels(pairs)
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		r, err := client.Snapshots.CreateGroup(s.ctx, &controlpb.CreateGroupRequest{Pool: pool, Name: args[0], Volumes: args[1:], Labels: labels})
		if err != nil {
			return err
		}
		var lines []string
		for _, p := range r.GetSnapshots() {
			lines = append(lines, "snapshot "+snapshotName(p)+": "+humane(p.GetSizeBytes())+" in pool "+p.GetPool())
		}
		return s.say(r, "%s", strings.Join(lines, "\n"))
	}, completeNothing, completeVolumes)
	addPoolFlag(c, s, &pool, poolOfVolume)
	c.Flags().StringArrayVar(&pairs, "label", nil, "KEY=VALUE to keep with each (repeatable)")
	return c
}

func newSnapshotListCommand() *cobra.Command {
	var pool string
	c, s := controlCommand(&cobra.Command{
		Use: "list [flags] [VOLUME]", Aliases: []string{"ls"}, Short: "List snapshots, oldest first",
		Example: "  ashlar snapshot list vm1",
		Args:    func(_ *cobra.Command, args []string) error { return atMostOne(args) },
	}, asking(func(s *session, client *control.Client, args []string) error {
		request := &controlpb.ListSnapshotsRequest{Pool: pool}
		if len(args) == 1 {
			request.Volume = args[0]
		}
		l, err := client.Snapshots.List(s.ctx, request)
		if err != nil {
			return err
		}
		return list(s, l.GetSnapshots(), "snapshots", snapshotHead, snapshotRow)
	}), completeVolumes)
	addPoolFlag(c, s, &pool, "only those in this pool")
	return c
}

var snapshotHead = []string{"SNAPSHOT", "POOL", ">SIZE", ">ALLOCATED", ">OPEN", "CREATED", "CLONES", "LABELS"}

func snapshotRow(p *controlpb.Snapshot) []string {
	return []string{snapshotName(p), p.GetPool(), humane(p.GetSizeBytes()), humane(p.GetAllocatedBytes()), count(p.GetOpenCount()), when(p.GetCreated()),
		strings.Join(p.GetClones(), " "), labelList(p.GetLabels())}
}

func writeSnapshots(out io.Writer, all []*controlpb.Snapshot) error {
	t := newTable(snapshotHead...)
	for _, p := range all {
		t.add(snapshotRow(p)...)
	}
	return t.write(out)
}

func newSnapshotRevertCommand() *cobra.Command {
	var pool string
	var yes bool
	c, s := controlCommand(&cobra.Command{
		Use: "revert [flags] VOLUME@SNAPSHOT | VOLUME SNAPSHOT", Short: "Make a volume what a snapshot of it is",
		Long: `Revert makes a volume that no client has open what a snapshot of it is. What was
written since is lost, unless a later snapshot has it; all snapshots stay.`,
		Example: "  ashlar snapshot revert vm1@monday --yes",
		Args:    snapshotArgs,
	}, func(s *session, args []string) error {
		volume, snapshot, _ := splitSnapshot(args...) // checked with the arguments
		if err := s.confirm(yes, "revert volume "+volume+" to "+snapshot+", losing what was written since"); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		v, err := client.Snapshots.Revert(s.ctx, &controlpb.RevertSnapshotRequest{Pool: pool, Volume: volume, Name: snapshot})
		if err != nil {
			return err
		}
		return s.say(v, "volume %s is as it was at %s", v.GetName(), snapshot)
	}, completeSnapshots, completeSnapshotsOf)
	addPoolFlag(c, s, &pool, poolOfVolume)
	addYesFlag(c, &yes)
	return c
}

func newSnapshotDeleteCommand() *cobra.Command {
	var pool string
	var wait, yes bool
	c, s := controlCommand(&cobra.Command{
		Use: "delete [flags] VOLUME@SNAPSHOT | VOLUME SNAPSHOT", Aliases: []string{"rm"}, Short: "Delete a snapshot",
		Long: `Delete removes a snapshot that no client has open. The volume, its other snapshots
and clones stay as they are; what none of them needs is given back by a job. While
two or more of them stand on it, such as the volume and a clone, the job waits until
all but one of them are deleted: it says so, and --wait does not wait for that.`,
		Example: "  ashlar snapshot delete vm1@monday --yes --wait",
		Args:    snapshotArgs,
	}, func(s *session, args []string) error {
		volume, snapshot, _ := splitSnapshot(args...) // checked with the arguments
		name := volume + "@" + snapshot
		if err := s.confirm(yes, "delete snapshot "+name); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		j, err := client.Snapshots.Delete(s.ctx, &controlpb.DeleteSnapshotRequest{Pool: pool, Volume: volume, Name: snapshot})
		if err != nil {
			return err
		}
		return s.finish(j, wait, "snapshot "+name+" is deleted")
	}, completeSnapshots, completeSnapshotsOf)
	addPoolFlag(c, s, &pool, poolOfVolume)
	addWaitFlag(c, &wait)
	addYesFlag(c, &yes)
	return c
}
