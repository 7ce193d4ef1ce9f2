package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// vias are the words of --via.
var vias = []struct {
	word string
	via  controlpb.Via
}{
	{"auto", controlpb.Via_VIA_UNSPECIFIED},
	{"ublk", controlpb.Via_VIA_UBLK},
	{"nbd", controlpb.Via_VIA_NBD},
	{"fuse", controlpb.Via_VIA_FUSE},
}

func viaWord(via controlpb.Via) string {
	for _, v := range vias {
		if v.via == via && via != controlpb.Via_VIA_UNSPECIFIED {
			return v.word
		}
	}
	return "?"
}

// isSourcePath tells a file from a volume: pool and volume names begin with neither.
func isSourcePath(name string) bool {
	return filepath.IsAbs(name) || strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../")
}

// sourceArg is what the daemon is asked for: paths are made absolute.
func (s *session) sourceArg(name string) (string, error) {
	if !isSourcePath(name) {
		return name, nil
	}
	paths, err := s.paths([]string{name})
	if err != nil {
		return "", err
	}
	return paths[0], nil
}

func newAttachCommand() *cobra.Command {
	var via string
	var queues, depth uint32
	var readOnly bool
	c, _ := controlCommand(&cobra.Command{
		Use: "attach [flags] VOLUME | VOLUME@SNAPSHOT | /FILE | NBD-URI", Short: "Make a block device of a volume",
		Long: `Attach makes a block device of a volume, on the host of the daemon, and prints its
path. What is attached already is left as it is, and its path printed. A snapshot is
read-only. A file is told from a volume by its path: /FILE or ./FILE.

The device is served by the daemon and outlives it: when the daemon is restarted,
upgraded or killed, requests wait, and the next daemon goes on with them. There is
also a name for it, /dev/ashlar/POOL/VOLUME.

--via says through which driver of the kernel:
  ublk   ublk_drv (Linux 6.0): the fastest; grows in use from Linux 6.16 on
  nbd    the nbd driver, over sockets of the daemon's own
  fuse   a loop device on a file of a FUSE mount: for kernels with neither
  auto   the first of these that works here, except ublk on kernels known to break` + controlHelp,
		Example: `  device=$(ashlar attach vm1)
  mkfs.ext4 $device
  ashlar attach vm1@monday --via nbd
  ashlar attach ./disk.img --read-only`,
		Args: exactly("VOLUME"),
	}, func(s *session, args []string) error {
		request := &controlpb.AttachRequest{Queues: queues, Depth: depth, ReadOnly: readOnly}
		words := make([]string, 0, len(vias))
		for _, v := range vias {
			words = append(words, v.word)
			if v.word == via {
				request.Via = v.via
			}
		}
		if err := oneOf("via", via, words...); err != nil {
			return err
		}
		var err error
		if request.Source, err = s.sourceArg(args[0]); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		d, err := client.Devices.Attach(s.ctx, request)
		if err != nil {
			return err
		}
		if !s.json() && d.GetWhy() != "" && via == "auto" {
			s.note("%s", d.GetWhy())
		}
		return s.say(d, "%s", d.GetPath())
	}, completeSources)
	flags := c.Flags()
	flags.StringVar(&via, "via", "auto", "driver: auto, ublk, nbd, fuse")
	flags.Uint32Var(&queues, "queues", 0, "hardware queues, or connections of nbd; of fuse at most one per reactor (default as suits)")
	flags.Uint32Var(&depth, "depth", 0, "requests in flight per queue (default as suits)")
	flags.BoolVar(&readOnly, "read-only", false, "refuse writes")
	completeWords(c, "via", "auto", "ublk", "nbd", "fuse")
	return c
}

func newDetachCommand() *cobra.Command {
	var force bool
	var keeper string
	c, _ := controlCommand(&cobra.Command{
		Use: "detach [flags] DEVICE | VOLUME", Short: "Remove a block device",
		Long: `Detach removes a block device that nobody uses, after what was written to it is at
the volume. One that is mounted, or part of another device, is refused; the message
names where.

--force gives up what was written and not synced, where it cannot be written back,
and removes a device whose volume is gone. It never removes one that is mounted.` + orphanHelp + ` A
device that has no server is removed at once, unless work waits in it that the next
daemon would do: then it takes --force, and what waits ends with an error. One that
another daemon serves is refused.` + controlHelp,
		Example: `  ashlar detach /dev/ublkb0
  ashlar detach vm1`,
		Args: exactly("DEVICE"),
	}, func(s *session, args []string) error {
		name, err := s.sourceArg(args[0])
		if err != nil {
			return err
		}
		var d *controlpb.Device
		client, err := s.client()
		if err == nil {
			var r *controlpb.DetachResponse
			r, err = client.Devices.Detach(s.ctx, &controlpb.DetachRequest{Name: name, Force: force})
			d = r.GetDevice()
		}
		if o := s.orphans(err, keeper); o != nil {
			d, err = s.detachOrphan(o, name, force)
		}
		if err != nil {
			return err
		}
		return s.say(d, "%s: %s is detached", d.GetPath(), d.GetSource())
	}, completeDevices)
	c.Flags().BoolVar(&force, "force", false, "give up what cannot be written back")
	addKeeperFlag(c, &keeper)
	return c
}

func newDevicesCommand() *cobra.Command {
	var support bool
	var keeper string
	c, _ := controlCommand(&cobra.Command{
		Use: "devices [flags]", Short: "List what is attached",
		Long: `Devices lists the block devices of the daemon's host that Ashlar made: what they
show, through which driver, since when, and whether they serve. STATE is online;
waiting while requests wait for a daemon or a source that is away; or failed.

--support lists the drivers instead, and what each lacks here.` + orphanHelp + ` What
nobody serves is "waiting: no server".` + controlHelp,
		Example: `  ashlar devices
  ashlar devices --support`,
		Args: noArguments,
	}, func(s *session, _ []string) error {
		var l *controlpb.ListDevicesResponse
		client, err := s.client()
		if err == nil {
			l, err = client.Devices.List(s.ctx, new(controlpb.ListDevicesRequest))
		}
		if o := s.orphans(err, keeper); o != nil {
			l, err = s.listOrphans(o)
		}
		if err != nil {
			return err
		}
		if support {
			return list(s, l.GetSupport(), "ways to attach", []string{"VIA", "AVAILABLE", "REASON"}, func(v *controlpb.ViaSupport) []string {
				word := "yes"
				if !v.GetAvailable() {
					word = "no"
				}
				return []string{viaWord(v.GetVia()), word, v.GetReason()}
			})
		}
		return list(s, l.GetDevices(), "devices are attached", deviceHead, deviceRow)
	})
	c.Flags().BoolVar(&support, "support", false, "list the drivers, and what each lacks here")
	addKeeperFlag(c, &keeper)
	return c
}

// addKeeperFlag adds --fuse-keeper.
func addKeeperFlag(c *cobra.Command, keeper *string) {
	c.Flags().StringVar(keeper, "fuse-keeper", "", "without a daemon: another socket of a fuse-keeper, as that of ashlar serve")
	_ = c.MarkFlagFilename("fuse-keeper", "sock") // fails for an unknown flag only
}

var deviceHead = []string{"DEVICE", "SOURCE", "VIA", ">SIZE", "MODE", "STATE", "SINCE", "USED"}

func deviceRow(d *controlpb.Device) []string {
	mode := "rw"
	if d.GetReadOnly() {
		mode = "ro"
	}
	state := strings.ToLower(strings.TrimPrefix(d.GetState().String(), "DEVICE_STATE_"))
	if d.GetReason() != "" {
		state += ": " + d.GetReason()
	}
	var used []string
	used = append(used, d.GetMounts()...)
	used = append(used, d.GetHolders()...)
	return []string{d.GetPath(), d.GetSource(), viaWord(d.GetVia()), humane(d.GetSizeBytes()), mode, state, when(d.GetAttached()), strings.Join(used, " ")}
}

// completeSources offers volumes, and files to what looks like a path.
func completeSources(s *session, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if isSourcePath(typed) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	if strings.Contains(typed, "@") {
		return completeSnapshots(s, args, typed)
	}
	return completeVolumes(s, args, typed)
}

var completeDevices = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	l, err := c.Devices.List(ctx, new(controlpb.ListDevicesRequest))
	if err != nil {
		return nil, fmt.Errorf("devices: %w", err)
	}
	return namesOf(l.GetDevices(), (*controlpb.Device).GetPath), nil
})
