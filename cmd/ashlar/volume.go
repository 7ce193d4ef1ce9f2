package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/units"
)

func newVolumeCommand() *cobra.Command {
	return groupCommand("volume", "Make and look after volumes",
		`A volume is a block device in a pool. It takes space when it is written to, up to
its size; a thick one has its space reserved. The daemon exports every volume
under its name, over NBD.`,
		newVolumeCreateCommand(), newVolumeListCommand(), newVolumeShowCommand(), newVolumeResizeCommand(), newVolumeLimitCommand(), newVolumeDeleteCommand(),
		newVolumeCloneCommand(), newVolumeMapCommand(), newVolumeChangesCommand())
}

// poolOfVolume explains --pool where a volume exists.
const poolOfVolume = "the pool it is in, when several have a volume of that name"

func newVolumeCreateCommand() *cobra.Command {
	var size units.Size
	var pool string
	var thick bool
	var limits limitFlags
	var pairs []string
	c, s := controlCommand(&cobra.Command{
		Use: "create [flags] NAME --size SIZE", Short: "Make an empty volume",
		Example: `  ashlar volume create vm1 --size 100GiB
  ashlar volume create db --size 1TiB --pool tank --thick --label app=postgres`,
		Args: exactly("NAME"),
	}, func(s *session, args []string) error {
		if err := sizeGiven(s, size); err != nil {
			return err
		}
		labels, err := labels(pairs)
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		v, err := client.Volumes.Create(s.ctx, &controlpb.CreateVolumeRequest{Pool: pool, Name: args[0], SizeBytes: uint64(size), Thick: thick, Labels: labels, Limits: limits.message(nil)})
		if err != nil {
			return err
		}
		return s.sayVolume(v)
	}, completeNothing)
	limits.add(c)
	c.Flags().Var(&size, "size", "how large it is, such as 10GiB; a multiple of 4KiB")
	addPoolFlag(c, s, &pool, "the pool to make it in (default the only one)")
	c.Flags().BoolVar(&thick, "thick", false, "reserve its space now")
	c.Flags().StringArrayVar(&pairs, "label", nil, "KEY=VALUE to keep with it (repeatable)")
	return c
}

// sizeGiven says what is wrong with the --size of a volume that needs one.
func sizeGiven(s *session, size units.Size) error {
	if size == 0 && !s.cmd.Flags().Changed("size") {
		return usagef("--size is missing: how large is the volume to be")
	}
	return sizeOfVolume(s, size)
}

// sizeOfVolume refuses a --size of nothing.
func sizeOfVolume(s *session, size units.Size) error {
	if size == 0 && s.cmd.Flags().Changed("size") {
		return usagef("--size is 0: a volume has 4KiB or more")
	}
	return nil
}

// sayVolume prints a volume that was made or changed, and where clients reach it.
func (s *session) sayVolume(v *controlpb.Volume) error {
	text := fmt.Sprintf("volume %s: %s in pool %s", v.GetName(), humane(v.GetSizeBytes()), v.GetPool())
	for _, u := range v.GetUris() {
		text += "\n  " + u
	}
	return s.say(v, "%s", text)
}

func newVolumeListCommand() *cobra.Command {
	var pool string
	var pairs []string
	c, s := controlCommand(&cobra.Command{
		Use: "list [flags]", Aliases: []string{"ls"}, Short: "List the volumes", Args: noArguments,
		Example: `  ashlar volume list
  ashlar volume list --label app=postgres --output json`,
	}, func(s *session, _ []string) error {
		labels, err := labels(pairs)
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		l, err := client.Volumes.List(s.ctx, &controlpb.ListVolumesRequest{Pool: pool, Labels: labels})
		if err != nil {
			return err
		}
		return list(s, l.GetVolumes(), "volumes", []string{"NAME", "POOL", ">SIZE", ">ALLOCATED", ">SNAPSHOTS", ">OPEN", "PARENT", "LABELS"},
			func(v *controlpb.Volume) []string {
				return []string{v.GetName(), v.GetPool(), humane(v.GetSizeBytes()), humane(v.GetAllocatedBytes()), count(v.GetSnapshotCount()),
					count(v.GetOpenCount()), v.GetParent(), labelList(v.GetLabels())}
			})
	})
	addPoolFlag(c, s, &pool, "only those in this pool")
	c.Flags().StringArrayVar(&pairs, "label", nil, "only those with this KEY=VALUE (repeatable)")
	completeFlag(c, s, "label", completeLabels)
	return c
}

func newVolumeShowCommand() *cobra.Command {
	var pool string
	c, s := controlCommand(&cobra.Command{
		Use: "show [flags] NAME", Short: "Show a volume and where clients reach it",
		Example: "  ashlar volume show vm1",
		Args:    exactly("NAME"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		v, err := client.Volumes.Get(s.ctx, &controlpb.GetVolumeRequest{Pool: pool, Name: args[0]})
		if err != nil {
			return err
		}
		return s.one(v, func(out io.Writer) error { return writeVolume(out, v) })
	}), completeVolumes)
	addPoolFlag(c, s, &pool, poolOfVolume)
	return c
}

func writeVolume(out io.Writer, v *controlpb.Volume) error {
	var f facts
	f.add("name", "%s", v.GetName())
	f.add("pool", "%s", v.GetPool())
	f.add("uuid", "%s", v.GetUuid())
	kind := "thin"
	if v.GetThick() {
		kind = "thick"
	}
	f.add("size", "%s, %s", humane(v.GetSizeBytes()), kind)
	f.add("allocated", "%s, %s", humane(v.GetAllocatedBytes()), percent(v.GetAllocatedBytes(), v.GetSizeBytes()))
	f.add("created", "%s", when(v.GetCreated()))
	if v.GetParent() != "" {
		f.add("parent", "%s", v.GetParent())
	}
	f.add("snapshots", "%d", v.GetSnapshotCount())
	f.add("layers", "%d", v.GetDepth())
	f.add("open", "%d", v.GetOpenCount())
	f.add("limits", "%s", limitsText(v.GetLimits()))
	if len(v.GetLabels()) > 0 {
		f.add("labels", "%s", labelList(v.GetLabels()))
	}
	for i, u := range v.GetUris() {
		name := "uri"
		if i > 0 {
			name = ""
		}
		f.add(name, "%s", u)
	}
	return f.write(out)
}

func newVolumeResizeCommand() *cobra.Command {
	var pool string
	var size units.Size
	c, s := controlCommand(&cobra.Command{
		Use: "resize [flags] NAME --size SIZE", Short: "Make a volume larger",
		Long: `Resize makes a volume larger; it cannot become smaller. Clients see the new size at
once if they can, and otherwise when they connect again.`,
		Example: "  ashlar volume resize vm1 --size 200GiB",
		Args:    exactly("NAME"),
	}, func(s *session, args []string) error {
		if err := sizeGiven(s, size); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		v, err := client.Volumes.Resize(s.ctx, &controlpb.ResizeVolumeRequest{Pool: pool, Name: args[0], SizeBytes: uint64(size)})
		if err != nil {
			return err
		}
		return s.sayVolume(v)
	}, completeVolumes)
	c.Flags().Var(&size, "size", "how large it is to be; a multiple of 4KiB")
	addPoolFlag(c, s, &pool, poolOfVolume)
	return c
}

func newVolumeDeleteCommand() *cobra.Command {
	var pool string
	var snapshots, wait, yes bool
	c, s := controlCommand(&cobra.Command{
		Use: "delete [flags] NAME", Aliases: []string{"rm"}, Short: "Delete a volume",
		Long: `Delete removes a volume that no client has open; its space is given back by a job.
One with snapshots is refused without --snapshots. Clones of its snapshots stay.`,
		Example: "  ashlar volume delete vm1 --snapshots --yes --wait",
		Args:    exactly("NAME"),
	}, func(s *session, args []string) error {
		what := "delete volume " + args[0]
		if snapshots {
			what += " with all its snapshots"
		}
		if err := s.confirm(yes, what); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		j, err := client.Volumes.Delete(s.ctx, &controlpb.DeleteVolumeRequest{Pool: pool, Name: args[0], Snapshots: snapshots})
		if err != nil {
			return err
		}
		return s.finish(j, wait, "volume "+args[0]+" is deleted")
	}, completeVolumes)
	addPoolFlag(c, s, &pool, poolOfVolume)
	c.Flags().BoolVar(&snapshots, "snapshots", false, "also when it has snapshots, and with them")
	addWaitFlag(c, &wait)
	addYesFlag(c, &yes)
	return c
}

func newVolumeCloneCommand() *cobra.Command {
	var pool string
	var size units.Size
	var thick bool
	var limits limitFlags
	var pairs []string
	c, s := controlCommand(&cobra.Command{
		Use: "clone [flags] VOLUME@SNAPSHOT NAME", Short: "Make a volume that begins as a snapshot",
		Long: `Clone makes a volume that begins as a snapshot is. It costs no space until one of
them is written to, and the snapshot may be deleted later.`,
		Example: "  ashlar volume clone golden@v3 vm7",
		Args: func(c *cobra.Command, args []string) error {
			if err := exactly("VOLUME@SNAPSHOT", "NAME")(c, args); err != nil {
				return err
			}
			return snapshotArgs(c, args[:1])
		},
	}, func(s *session, args []string) error {
		volume, snapshot, _ := splitSnapshot(args[0]) // checked with the arguments
		if err := sizeOfVolume(s, size); err != nil {
			return err
		}
		labels, err := labels(pairs)
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		v, err := client.Volumes.Clone(s.ctx, &controlpb.CloneVolumeRequest{
			Pool: pool, SourceVolume: volume, SourceSnapshot: snapshot, Name: args[1], SizeBytes: uint64(size), Thick: thick, Labels: labels,
			Limits: limits.message(nil),
		})
		if err != nil {
			return err
		}
		return s.sayVolume(v)
	}, completeSnapshots, completeNothing)
	limits.add(c)
	c.Flags().Var(&size, "size", "how large it is to be (default as the snapshot)")
	addPoolFlag(c, s, &pool, poolOfVolume)
	c.Flags().BoolVar(&thick, "thick", false, "reserve its space now")
	c.Flags().StringArrayVar(&pairs, "label", nil, "KEY=VALUE to keep with it (repeatable)")
	return c
}

func newVolumeMapCommand() *cobra.Command {
	var pool string
	c, s := controlCommand(&cobra.Command{
		Use: "map [flags] NAME", Short: "Show what of a volume is allocated, shared and reclaimable",
		Long: `Map shows where the bytes of a volume are: mapped, what a read finds; exclusive,
what only the volume itself has; shared, what snapshots or clones need too;
reclaimable, what comes back when the volume and its snapshots are deleted.`,
		Example: "  ashlar volume map vm1",
		Args:    exactly("NAME"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		m, err := client.Volumes.Map(s.ctx, &controlpb.MapVolumeRequest{Pool: pool, Name: args[0]})
		if err != nil {
			return err
		}
		return s.one(m, func(out io.Writer) error { return writeMap(out, m) })
	}), completeVolumes)
	addPoolFlag(c, s, &pool, poolOfVolume)
	return c
}

func writeMap(out io.Writer, m *controlpb.VolumeMap) error {
	var f facts
	f.add("volume", "%s in pool %s", m.GetVolume(), m.GetPool())
	f.add("size", "%s", humane(m.GetSizeBytes()))
	f.add("mapped", "%s, %s", humane(m.GetMappedBytes()), percent(m.GetMappedBytes(), m.GetSizeBytes()))
	f.add("exclusive", "%s", humane(m.GetExclusiveBytes()))
	f.add("shared", "%s", humane(m.GetSharedBytes()))
	f.add("reclaimable", "%s", humane(m.GetReclaimableBytes()))
	if err := f.write(out); err != nil || len(m.GetSnapshots()) == 0 {
		return err
	}
	fmt.Fprintln(out)
	return writeSnapshots(out, m.GetSnapshots())
}

func newVolumeChangesCommand() *cobra.Command {
	var pool, since, until string
	c, s := controlCommand(&cobra.Command{
		Use: "changes [flags] NAME", Short: "List the blocks of a volume that have changed",
		Long: `Changes lists the runs of blocks that differ between a snapshot and a later one, or
the volume now, in the order of their offsets. Without --since, what is allocated.
Offsets and lengths are bytes; a run of kind zero reads as zeros now.

With --output json: {"volume", "since", "until", "size_bytes", "items": [{"offset_bytes",
"length_bytes", "zero"}]}.`,
		Example: "  ashlar volume changes vm1 --since monday --until tuesday",
		Args:    exactly("NAME"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		stream, err := client.Volumes.Changes(s.ctx, &controlpb.ChangesRequest{Pool: pool, Volume: args[0], Since: since, Until: until})
		if err != nil {
			return err
		}
		return s.writeChanges(args[0], since, until, stream.Recv)
	}), completeVolumes)
	addPoolFlag(c, s, &pool, poolOfVolume)
	c.Flags().StringVar(&since, "since", "", "the snapshot to compare with (default an empty volume)")
	c.Flags().StringVar(&until, "until", "", "a later snapshot (default the volume now)")
	completeFlag(c, s, "since", completeSnapshotsOf)
	completeFlag(c, s, "until", completeSnapshotsOf)
	return c
}

// writeChanges prints changes as they come: a large volume has millions. A list
// that ends early must not pass for a whole one: the JSON is then not closed.
func (s *session) writeChanges(volume, since, until string, next func() (*controlpb.ChangesResponse, error)) error {
	out := s.out()
	var runs, changed, size uint64
	for first := true; ; first = false {
		r, err := next()
		ended := errors.Is(err, io.EOF)
		if err != nil && !ended {
			return err
		}
		if first {
			size = r.GetSizeBytes()
			if err := s.beginChanges(out, volume, since, until, size); err != nil {
				return err
			}
		}
		var b strings.Builder
		for _, c := range r.GetChanges() {
			kind := "data"
			if c.GetZero() {
				kind = "zero"
			}
			switch {
			case !s.json():
				fmt.Fprintf(&b, "%16d  %16d  %s\n", c.GetOffsetBytes(), c.GetLengthBytes(), kind)
			case runs > 0:
				b.WriteString(",")
				fallthrough
			default:
				fmt.Fprintf(&b, "\n    {\"offset_bytes\": %d, \"length_bytes\": %d, \"zero\": %v}", c.GetOffsetBytes(), c.GetLengthBytes(), c.GetZero())
			}
			runs, changed = runs+1, changed+c.GetLengthBytes()
		}
		if _, err := io.WriteString(out, b.String()); err != nil {
			return err
		}
		if ended {
			break
		}
	}
	if s.json() {
		end := "\n  ]\n}\n"
		if runs == 0 {
			end = "]\n}\n"
		}
		_, err := io.WriteString(out, end)
		return err
	}
	s.note("%d runs, %s of %s", runs, humane(changed), humane(size))
	return nil
}

func (s *session) beginChanges(out io.Writer, volume, since, until string, size uint64) error {
	if !s.json() {
		_, err := fmt.Fprintf(out, "%16s  %16s  %s\n", "OFFSET", "LENGTH", "KIND")
		return err
	}
	var b strings.Builder
	b.WriteString("{\n")
	for _, m := range []member{{"volume", volume}, {"since", since}, {"until", until}, {"size_bytes", size}} {
		value, err := json.Marshal(m.value)
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "  %q: %s,\n", m.name, value)
	}
	b.WriteString("  \"items\": [")
	_, err := io.WriteString(out, b.String())
	return err
}
