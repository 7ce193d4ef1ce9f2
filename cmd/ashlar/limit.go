package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// limitFlags are how much a volume may do, as far as it was said.
type limitFlags struct {
	command   *cobra.Command
	iops      uint64
	bandwidth units.Size
}

func (l *limitFlags) add(c *cobra.Command) {
	l.command = c
	c.Flags().Uint64Var(&l.iops, "iops", 0, "requests a second it may do (0: no limit)")
	c.Flags().Var(&l.bandwidth, "bandwidth", "bytes a second it may read and write, such as 100MiB (0: no limit)")
}

// message is what was said, over what there is; nil for no limits.
func (l *limitFlags) message(now *controlpb.Limits) *controlpb.Limits {
	m := &controlpb.Limits{Iops: now.GetIops(), BandwidthBytes: now.GetBandwidthBytes()}
	if l.command.Flags().Changed("iops") {
		m.Iops = l.iops
	}
	if l.command.Flags().Changed("bandwidth") {
		m.BandwidthBytes = uint64(l.bandwidth)
	}
	if m.GetIops() == 0 && m.GetBandwidthBytes() == 0 {
		return nil
	}
	return m
}

func limitsText(l *controlpb.Limits) string {
	var parts []string
	if n := l.GetIops(); n > 0 {
		parts = append(parts, fmt.Sprintf("%d requests a second", n))
	}
	if n := l.GetBandwidthBytes(); n > 0 {
		parts = append(parts, humane(n)+" a second")
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

func newVolumeLimitCommand() *cobra.Command {
	var pool string
	var limits limitFlags
	c, s := controlCommand(&cobra.Command{
		Use: "limit [flags] NAME [--iops N] [--bandwidth SIZE]", Short: "Limit how much a volume may do",
		Long: `Limit changes how much all clients of a volume together may do: at once, under load,
and for good. What is not named stays as it is; 0 is no limit. A flush is never
held back, and counts as nothing.`,
		Example: `  ashlar volume limit vm1 --iops 500 --bandwidth 50MiB
  ashlar volume limit vm1 --iops 0 --bandwidth 0`,
		Args: exactly("NAME"),
	}, func(s *session, args []string) error {
		if !limits.command.Flags().Changed("iops") && !limits.command.Flags().Changed("bandwidth") {
			return usagef("--iops and --bandwidth are missing: name what to change (0: no limit)")
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		now, err := client.Volumes.Get(s.ctx, &controlpb.GetVolumeRequest{Pool: pool, Name: args[0]})
		if err != nil {
			return err
		}
		v, err := client.Volumes.SetLimits(s.ctx, &controlpb.SetLimitsRequest{Pool: now.GetPool(), Name: now.GetName(), Limits: limits.message(now.GetLimits())})
		if err != nil {
			return err
		}
		if v.GetLimits() == nil {
			return s.say(v, "volume %s has no limits", v.GetName())
		}
		return s.say(v, "volume %s is limited to %s", v.GetName(), limitsText(v.GetLimits()))
	}, completeVolumes)
	addPoolFlag(c, s, &pool, poolOfVolume)
	limits.add(c)
	return c
}
