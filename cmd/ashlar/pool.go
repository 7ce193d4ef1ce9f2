package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/units"
)

func newPoolCommand() *cobra.Command {
	return groupCommand("pool", "Make, look at and care for pools",
		`A pool is one or several disks or files that hold volumes. What is written to a
volume is spread over all devices of its pool; a pool does not keep copies, so it
needs every one of them.`,
		newPoolCreateCommand(), newPoolListCommand(), newPoolStatusCommand(), newPoolGrowCommand(), newPoolAddDeviceCommand(),
		newPoolScanCommand(), newPoolImportCommand(), newPoolCloseCommand(), newPoolScrubCommand(), newPoolDestroyCommand(),
		newPoolCheckCommand(), // works without a daemon
	)
}

func newPoolCreateCommand() *cobra.Command {
	var size units.Size
	var force bool
	c, _ := controlCommand(&cobra.Command{
		Use:   "create [flags] NAME [DEVICE|FILE...]",
		Short: "Make a pool of devices or files",
		Long: `Create makes a pool of block devices or files and opens it, now and whenever the
daemon starts. Devices that hold anything recognizable are refused without --force.

With --size, files that do not exist are made, sparse. Without a DEVICE or FILE
the daemon makes one file in its data directory: good for a first try.`,
		Example: `  ashlar pool create tank /dev/vdb /dev/vdc
  ashlar pool create test --size 10GiB               # a file in the daemon's data directory
  ashlar pool create test --size 10GiB /srv/a.img    # a file of one's own`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("NAME is missing")
			}
			if len(args) == 1 && size == 0 {
				return usagef("a pool needs a DEVICE or FILE, or --size for a file that the daemon makes")
			}
			return noEmpty(args)
		},
	}, func(s *session, args []string) error {
		paths, err := s.paths(args[1:])
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		p, err := client.Pools.Create(s.ctx, &controlpb.CreatePoolRequest{Name: args[0], Paths: paths, FileSizeBytes: uint64(size), Force: force})
		if err != nil {
			return err
		}
		return s.say(p, "pool %s is made: %s, %s available", p.GetName(), humane(p.GetTotalBytes()), humane(p.GetAvailableBytes()))
	}, completeNothing, completeFiles)
	c.Flags().Var(&size, "size", "make files that do not exist, sparse, of this size")
	c.Flags().BoolVar(&force, "force", false, "overwrite what the devices hold, even another pool")
	return c
}

func newPoolListCommand() *cobra.Command {
	c, _ := controlCommand(&cobra.Command{
		Use: "list [flags]", Aliases: []string{"ls"}, Short: "List the pools", Args: noArguments,
		Example: "  ashlar pool list",
	}, asking(func(s *session, client *control.Client, _ []string) error {
		l, err := client.Pools.List(s.ctx, new(controlpb.ListPoolsRequest))
		if err != nil {
			return err
		}
		return list(s, l.GetPools(), "pools", []string{"NAME", "STATE", ">SIZE", ">ALLOCATED", ">AVAILABLE", ">FULL", ">PROVISIONED", ">VOLUMES", ">SNAPSHOTS"},
			func(p *controlpb.Pool) []string {
				if p.GetState() == controlpb.PoolState_POOL_STATE_UNAVAILABLE {
					return []string{p.GetName(), word(p.GetState()), "", "", "", "", "", "", ""}
				}
				return []string{p.GetName(), word(p.GetState()), humane(p.GetTotalBytes()), humane(p.GetAllocatedBytes()), humane(p.GetAvailableBytes()),
					full(p), humane(p.GetProvisionedBytes()), count(p.GetVolumeCount()), count(p.GetSnapshotCount())}
			})
	}))
	return c
}

// full is how much of a pool volumes cannot get any more.
func full(p *controlpb.Pool) string {
	return percent(p.GetTotalBytes()-min(p.GetAvailableBytes(), p.GetTotalBytes()), p.GetTotalBytes())
}

func newPoolStatusCommand() *cobra.Command {
	c, _ := controlCommand(&cobra.Command{
		Use: "status [flags] [NAME]", Aliases: []string{"show"}, Short: "Show a pool, its devices and its jobs",
		Long: `Status shows a pool, or every pool, with its space, its devices and the jobs that
run in it. With --output json a pool has its running jobs as "jobs".`,
		Example: "  ashlar pool status tank",
		Args:    func(_ *cobra.Command, args []string) error { return atMostOne(args) },
	}, asking(func(s *session, client *control.Client, args []string) error {
		var pools []*controlpb.Pool
		if len(args) == 1 {
			p, err := client.Pools.Get(s.ctx, &controlpb.GetPoolRequest{Name: args[0]})
			if err != nil {
				return err
			}
			pools = append(pools, p)
		} else {
			l, err := client.Pools.List(s.ctx, new(controlpb.ListPoolsRequest))
			if err != nil {
				return err
			}
			pools = l.GetPools()
		}
		l, err := client.Jobs.List(s.ctx, &controlpb.ListJobsRequest{Running: true})
		if err != nil {
			return err
		}
		jobs := make(map[string][]*controlpb.Job)
		for _, j := range l.GetJobs() {
			jobs[j.GetPool()] = append(jobs[j.GetPool()], j)
		}
		if s.json() {
			all := make([]object, 0, len(pools))
			for _, p := range pools {
				all = append(all, append(objectOf(p), member{"jobs", objectsOf(jobs[p.GetName()])}))
			}
			if len(args) == 1 {
				return writeJSON(s.out(), all[0])
			}
			return writeJSON(s.out(), object{{"items", all}})
		}
		if len(pools) == 0 {
			s.note("no pools")
		}
		for i, p := range pools {
			if i > 0 {
				fmt.Fprintln(s.out())
			}
			if err := writePool(s.out(), p, jobs[p.GetName()]); err != nil {
				return err
			}
		}
		return nil
	}), completePools)
	return c
}

func atMostOne(args []string) error {
	if len(args) > 1 {
		return usagef("%q is too much: want one name", args[1])
	}
	return noEmpty(args)
}

func writePool(out io.Writer, p *controlpb.Pool, jobs []*controlpb.Job) error {
	var f facts
	f.add("name", "%s", p.GetName())
	if p.GetUuid() != "" {
		f.add("uuid", "%s", p.GetUuid())
	}
	state := word(p.GetState())
	if p.GetReason() != "" {
		state += ": " + p.GetReason()
	}
	f.add("state", "%s", state)
	if p.GetState() != controlpb.PoolState_POOL_STATE_UNAVAILABLE {
		addSpace(&f, p)
	}
	if err := f.write(out); err != nil {
		return err
	}
	fmt.Fprintln(out)
	if err := writeDevices(out, p.GetDevices()); err != nil || len(jobs) == 0 {
		return err
	}
	fmt.Fprintln(out)
	return writeJobs(out, jobs)
}

// addSpace adds what only an open pool knows.
func addSpace(f *facts, p *controlpb.Pool) {
	f.add("created", "%s, format %d", when(p.GetCreated()), p.GetFormatVersion())
	f.add("size", "%s", humane(p.GetTotalBytes()))
	f.add("allocated", "%s, and %s of metadata", humane(p.GetAllocatedBytes()), humane(p.GetMetadataBytes()))
	f.add("free", "%s, of it %s reserved for thick volumes and %s for the pool itself", humane(p.GetFreeBytes()), humane(p.GetReservedBytes()), humane(p.GetReserveBytes()))
	f.add("available", "%s, %s full", humane(p.GetAvailableBytes()), full(p))
	provisioned := humane(p.GetProvisionedBytes()) + ", " + percent(p.GetProvisionedBytes(), p.GetTotalBytes())
	if p.GetOverProvisionPercent() > 0 {
		provisioned += fmt.Sprintf(" of at most %d %%", p.GetOverProvisionPercent())
	}
	f.add("provisioned", "%s", strings.TrimSuffix(provisioned, ", "))
	f.add("volumes", "%d, with %d snapshots", p.GetVolumeCount(), p.GetSnapshotCount())
	if j := p.GetJournal(); j != nil {
		f.add("journal", "%s of %s used, %d groups written, %d dirty regions", humane(j.GetUsedBytes()), humane(j.GetSizeBytes()), j.GetGroupCount(), p.GetDirtyRegionCount())
	}
}

func writeDevices(out io.Writer, devices []*controlpb.PoolDevice) error {
	t := newTable(">DEVICE", "PATH", ">SIZE", "STATE", "UUID")
	for _, d := range devices {
		t.add(count(d.GetIndex()), d.GetPath(), humane(d.GetSizeBytes()), deviceState(d), d.GetUuid())
	}
	return t.write(out)
}

func deviceState(d *controlpb.PoolDevice) string {
	if d.GetMissing() {
		return "missing"
	}
	return "present"
}

func newPoolGrowCommand() *cobra.Command {
	var size units.Size
	c, _ := controlCommand(&cobra.Command{
		Use: "grow [flags] NAME", Short: "Use what the devices of a pool have grown by",
		Long: `Grow takes into use what the devices of a pool have become larger by. With --size
it first makes each file of the pool that large.`,
		Example: `  ashlar pool grow tank
  ashlar pool grow test --size 20GiB`,
		Args: exactly("NAME"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		p, err := client.Pools.Grow(s.ctx, &controlpb.GrowPoolRequest{Name: args[0], FileSizeBytes: uint64(size)})
		if err != nil {
			return err
		}
		return s.sayPool(p)
	}), completePools)
	c.Flags().Var(&size, "size", "first make each file of the pool this large")
	return c
}

func (s *session) sayPool(p *controlpb.Pool) error {
	return s.say(p, "pool %s has %s, %s available", p.GetName(), humane(p.GetTotalBytes()), humane(p.GetAvailableBytes()))
}

func newPoolAddDeviceCommand() *cobra.Command {
	var size units.Size
	var force bool
	c, _ := controlCommand(&cobra.Command{
		Use: "add-device [flags] NAME DEVICE|FILE", Short: "Make one more device or file part of a pool",
		Long: `Add-device makes a block device or a file part of a pool, for good: a device cannot
be taken out again. With --size, a file that does not exist is made, sparse.`,
		Example: "  ashlar pool add-device tank /dev/vdd",
		Args:    exactly("NAME", "DEVICE|FILE"),
	}, func(s *session, args []string) error {
		paths, err := s.paths(args[1:])
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		p, err := client.Pools.AddDevice(s.ctx, &controlpb.AddDeviceRequest{Name: args[0], Path: paths[0], FileSizeBytes: uint64(size), Force: force})
		if err != nil {
			return err
		}
		return s.sayPool(p)
	}, completePools, completeFiles)
	c.Flags().Var(&size, "size", "make the file, sparse, of this size if it does not exist")
	c.Flags().BoolVar(&force, "force", false, "overwrite what the device holds, even another pool")
	return c
}

func newPoolScanCommand() *cobra.Command {
	c, _ := controlCommand(&cobra.Command{
		Use: "scan [flags] [DEVICE|FILE|DIRECTORY...]", Short: "Find pools by the signatures on devices",
		Long: `Scan looks for the signatures of pools and changes nothing. Without arguments it
looks at the block devices of the node and at the daemon's data directory. With
--output json, paths that could not be read are "failures" beside "items".`,
		Example: "  ashlar pool scan\n  ashlar pool scan /srv/pools",
	}, func(s *session, args []string) error {
		paths, err := s.paths(args)
		if err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		r, err := client.Pools.Scan(s.ctx, &controlpb.ScanPoolsRequest{Paths: paths})
		if err != nil {
			return err
		}
		if s.json() {
			return writeJSON(s.out(), append(itemsOf(r.GetPools()), member{"failures", objectsOf(r.GetFailures())}))
		}
		for _, f := range r.GetFailures() {
			s.note("%s: %s", f.GetPath(), f.GetMessage())
		}
		return list(s, r.GetPools(), "pools found", []string{"NAME", "STATE", "DEVICES", "CREATED", "UUID"}, func(p *controlpb.FoundPool) []string {
			return []string{p.GetName(), foundState(p), devicePaths(p), when(p.GetCreated()), p.GetUuid()}
		})
	}, completeFiles)
	return c
}

// foundState says whether a pool that was found can be imported.
func foundState(p *controlpb.FoundPool) string {
	missing := 0
	for _, d := range p.GetDevices() {
		if d.GetMissing() {
			missing++
		}
	}
	switch {
	case p.GetOpen():
		return "open"
	case missing > 0:
		return fmt.Sprintf("%d of %d devices missing", missing, len(p.GetDevices()))
	}
	return "closed"
}

func devicePaths(p *controlpb.FoundPool) string {
	var paths []string
	for _, d := range p.GetDevices() {
		if !d.GetMissing() {
			paths = append(paths, d.GetPath())
		}
	}
	return strings.Join(paths, " ")
}

func newPoolImportCommand() *cobra.Command {
	r := new(controlpb.OpenPoolRequest)
	c, _ := controlCommand(&cobra.Command{
		Use: "import [flags] [DEVICE|FILE|DIRECTORY...]", Aliases: []string{"open"}, Short: "Open a pool that exists on its devices",
		Long: `Import opens a pool that exists on its devices, now and whenever the daemon starts.
Without arguments it looks at the block devices of the node and at the daemon's
data directory. When there are several pools, --name says which.

A pool with missing devices can be opened only with --read-only; what lies on them
cannot be read then.`,
		Example: `  ashlar pool import /dev/vdb /dev/vdc
  ashlar pool import --name tank`,
	}, func(s *session, args []string) (err error) {
		request := proto.CloneOf(r)
		if request.Paths, err = s.paths(args); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		p, err := client.Pools.Open(s.ctx, request)
		if err != nil {
			return s.nameHint(args, request, err)
		}
		return s.say(p, "pool %s is %s: %s, %d volumes", p.GetName(), word(p.GetState()), humane(p.GetTotalBytes()), p.GetVolumeCount())
	}, completeFiles)
	c.Flags().StringVar(&r.Name, "name", "", "the pool's name or uuid")
	c.Flags().BoolVar(&r.ReadOnly, "read-only", false, "write nothing; devices may be missing")
	return c
}

// nameHint is err of an import, with a word about --name where the one path given is
// no file but may well be a name.
func (s *session) nameHint(args []string, r *controlpb.OpenPoolRequest, err error) error {
	if len(args) != 1 || r.GetName() != "" || strings.Contains(args[0], "/") || !s.unix() || errors.Is(err, control.ErrUnavailable) {
		return err
	}
	if _, statErr := os.Stat(args[0]); !errors.Is(statErr, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%w; if %s is the name of a pool, give --name %s", err, args[0], args[0])
}

func newPoolCloseCommand() *cobra.Command {
	var disconnect bool
	c, _ := controlCommand(&cobra.Command{
		Use: "close [flags] NAME", Short: "Give up a pool; its devices keep it",
		Long: `Close drains the exports of a pool and gives up its devices, so that they can be
moved or checked. The daemon forgets the pool; import brings it back.`,
		Example: "  ashlar pool close tank",
		Args:    exactly("NAME"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		done, err := client.Pools.Close(s.ctx, &controlpb.ClosePoolRequest{Name: args[0], Disconnect: disconnect})
		if err != nil {
			return err
		}
		return s.say(done, "pool %s is closed; its devices keep it", args[0])
	}), completePools)
	c.Flags().BoolVar(&disconnect, "disconnect", false, "also when clients have its volumes open")
	return c
}

func newPoolScrubCommand() *cobra.Command {
	var rate units.Bandwidth
	var stop, wait bool
	c, _ := controlCommand(&cobra.Command{
		Use: "scrub [flags] NAME", Short: "Read everything in a pool and verify it",
		Long: `Scrub reads everything in a pool and verifies its checksums, from where the last
scrub was stopped. It goes on in the daemon; --wait stays to its end, and then
ends with exit code 1 if damage was found. Events name each damaged block.`,
		Example: `  ashlar pool scrub tank --rate 200MiB/s --wait
  ashlar pool scrub tank --stop`,
		Args: exactly("NAME"),
	}, asking(func(s *session, client *control.Client, args []string) error {
		if stop {
			j, err := client.Pools.StopScrub(s.ctx, &controlpb.StopScrubRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return s.say(j, "scrub of pool %s is stopped at %s of %s; the next one goes on there", args[0], humane(j.GetDoneBytes()), humane(j.GetTotalBytes()))
		}
		j, err := client.Pools.Scrub(s.ctx, &controlpb.ScrubPoolRequest{Name: args[0], RateBytes: uint64(rate)})
		if err != nil {
			return err
		}
		return s.finish(j, wait, "scrub of pool "+args[0])
	}), completePools)
	c.Flags().Var(&rate, "rate", "bytes to read a second, such as 100MiB/s (default the daemon's)")
	c.Flags().BoolVar(&stop, "stop", false, "stop the scrub that runs; its place is kept")
	addWaitFlag(c, &wait)
	for _, other := range []string{"rate", "wait"} {
		c.MarkFlagsMutuallyExclusive("stop", other)
	}
	return c
}

func newPoolDestroyCommand() *cobra.Command {
	var yes, volumes bool
	c, _ := controlCommand(&cobra.Command{
		Use: "destroy [flags] NAME", Short: "Erase a pool and all that is in it",
		Long: `Destroy erases a pool. One with volumes is refused without --volumes, and one
whose volumes clients have open in any case. Files in the daemon's data directory
are removed; other devices and files stay, without the signature of a pool.`,
		Example: "  ashlar pool destroy test --volumes --yes",
		Args:    exactly("NAME"),
	}, func(s *session, args []string) error {
		what := "destroy pool " + args[0]
		if volumes {
			what += " with all its volumes and snapshots"
		}
		if err := s.confirm(yes, what); err != nil {
			return err
		}
		client, err := s.client()
		if err != nil {
			return err
		}
		done, err := client.Pools.Destroy(s.ctx, &controlpb.DestroyPoolRequest{Name: args[0], Volumes: volumes})
		if err != nil {
			return err
		}
		return s.say(done, "pool %s is destroyed", args[0])
	}, completePools)
	addYesFlag(c, &yes)
	c.Flags().BoolVar(&volumes, "volumes", false, "also when it has volumes, and with them")
	return c
}
