package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/internal/load"
	"github.com/ashlar-storage/ashlar/internal/units"
)

// options are the flags of one run.
type options struct {
	uri        string
	device     string
	pools      string
	poll       string
	spin       time.Duration
	op         string
	readShare  int
	block      units.Size
	size       units.Size
	depth      int
	jobs       int
	flushEvery int
	ramp       time.Duration
	runtime    time.Duration
	cpus       string
	structured bool
	json       bool
	seed       uint64
}

const (
	runtimeMax = time.Hour
	drainMax   = replyMax + 2*wakeUp // after the end of a run; then the run failed
	spinMax    = time.Millisecond
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return
		}
		fmt.Fprintln(os.Stderr, "devperf:", err)
		os.Exit(1)
	}
}

func parse(arguments []string) (options, load.Pattern, error) {
	o := options{block: 4096}
	f := flag.NewFlagSet("devperf", flag.ContinueOnError)
	f.Usage = func() {
		fmt.Fprint(f.Output(), "usage: devperf --uri nbd+unix:///EXPORT?socket=PATH [flags]\n"+
			"       devperf --device null:SIZE|mem:SIZE|PATH [flags]\n"+
			"       devperf --device volume:NAME --pool DISK[,DISK...] [flags]\n\n"+
			"Loads an NBD export, or a device in this process without any export, with batched\n"+
			"requests and prints what it sustained. randwrite, write and randrw overwrite it.\n\n")
		f.PrintDefaults()
	}
	f.StringVar(&o.uri, "uri", "", "the export: nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT")
	f.StringVar(&o.device, "device", "", "the device: null:SIZE, mem:SIZE, the path of a file or disk, or volume:NAME")
	f.StringVar(&o.pools, "pool", "", "of volume:NAME: the disks of its pool, which no daemon has open")
	f.StringVar(&o.poll, "poll", "auto", "how the reactors of --device wait: auto, busy or off")
	f.DurationVar(&o.spin, "spin", 100*time.Microsecond, "on --uri: look for replies so long before sleeping until one comes; 0 sleeps at once")
	f.StringVar(&o.op, "op", "randread", "randread, randwrite, randrw, read, write, or none: stay connected and idle")
	f.IntVar(&o.readShare, "read-percent", 50, "share of reads of randrw")
	f.Var(&o.block, "block", "length of a request")
	f.Var(&o.size, "size", "use only so much of the export (default all)")
	f.IntVar(&o.depth, "depth", 32, "requests in flight per connection")
	f.IntVar(&o.jobs, "connections", 1, "connections, or queues of a device, each with a thread of its own")
	f.IntVar(&o.flushEvery, "flush-every", 0, "a flush after so many writes (default none)")
	f.DurationVar(&o.ramp, "ramp", time.Second, "load before the measurement")
	f.DurationVar(&o.runtime, "runtime", 5*time.Second, "measurement")
	f.StringVar(&o.cpus, "cpus", "", "CPUs to run on, such as 1 or 2,3 (default any)")
	f.BoolVar(&o.structured, "structured", false, "negotiate structured replies")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.Uint64Var(&o.seed, "seed", 1, "replays the offsets")
	if err := f.Parse(arguments); err != nil {
		return o, load.Pattern{}, err
	}
	p := load.Pattern{
		Random: strings.HasPrefix(o.op, "rand"), BlockBytes: int(min(uint64(o.block), load.BlockBytesMax+1)),
		Depth: o.depth, Jobs: o.jobs, FlushEvery: o.flushEvery, Seed: o.seed, SizeBytes: uint64(o.size),
	}
	switch o.op {
	case "randread", "read":
		p.ReadPercent = 100
	case "randwrite", "write":
	case "randrw":
		p.ReadPercent = o.readShare
	case "none":
		p.ReadPercent = 100
	default:
		return o, p, fmt.Errorf("op %q: want randread, randwrite, randrw, read, write or none", o.op)
	}
	switch {
	case f.NArg() > 0:
		return o, p, fmt.Errorf("unexpected argument %q; the export is given by --uri", f.Arg(0))
	case o.uri == "" && o.device == "":
		return o, p, errors.New("no export: give --uri nbd+unix:///EXPORT?socket=PATH, or --device")
	case o.uri != "" && o.device != "":
		return o, p, errors.New("--uri and --device: one load has one of them")
	case o.pools != "" && !strings.HasPrefix(o.device, "volume:"):
		return o, p, errors.New("--pool belongs to --device volume:NAME")
	case o.poll != "auto" && o.poll != "busy" && o.poll != "off":
		return o, p, fmt.Errorf("poll %q: want auto, busy or off", o.poll)
	case o.spin < 0 || o.spin > spinMax:
		return o, p, fmt.Errorf("spin %v: want 0 to %v", o.spin, spinMax)
	case o.runtime <= 0 || o.runtime > runtimeMax:
		return o, p, fmt.Errorf("runtime %v: want above 0 and at most %v", o.runtime, runtimeMax)
	case o.ramp < 0 || o.ramp > runtimeMax:
		return o, p, fmt.Errorf("ramp %v: want 0 to %v", o.ramp, runtimeMax)
	}
	return o, p, nil
}

// open opens what is to be loaded.
func open(o options, cpus []int) (target, error) {
	if o.device == "" {
		return openNBD(o.uri, o.structured, o.spin)
	}
	var pools []string
	if o.pools != "" {
		pools = strings.Split(o.pools, ",")
	}
	return openDevice(o.device, pools, o.poll, cpus)
}

func run(arguments []string) (err error) {
	o, p, err := parse(arguments)
	if err != nil {
		return err
	}
	cpus, err := parseCPUs(o.cpus)
	if err != nil {
		return err
	}
	t, err := open(o, cpus)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	if err := p.Check(t.Size()); err != nil {
		return err
	}
	// On one CPU the runtime would have one processor: its own work would stop the
	// drivers, each of which has a thread, and the client be measured instead of the server.
	if n := p.Jobs + 2; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
	report, err := measure(t, p, cpus, o)
	if err != nil {
		return err
	}
	if o.json {
		return json.NewEncoder(os.Stdout).Encode(report)
	}
	fmt.Printf("%s %v x %d, %d connections: %.0f IOPS, %.1f MB/s, p50 %.1f us, p99 %.1f us, p99.9 %.1f us, client CPU %.2f s in %.2f s\n",
		o.op, o.block, p.Depth, p.Jobs, report.IOPS, report.BytesPerSecond/1e6,
		report.LatencyP50, report.LatencyP99, report.LatencyP999, report.CPUSeconds, report.Seconds)
	return nil
}

// measure runs every job on a thread of its own and joins what they measured.
func measure(t target, p load.Pattern, cpus []int, o options) (load.Report, error) {
	drivers := make([]driver, 0, p.Jobs)
	defer func() {
		for _, d := range drivers {
			_ = d.Close() // the run is over, its outcome known
		}
	}()
	for i := range p.Jobs {
		d, err := t.Open(p, i)
		if err != nil {
			return load.Report{}, err
		}
		drivers = append(drivers, d)
	}
	begin := time.Now().Add(o.ramp)
	s := schedule{begin: begin, end: begin.Add(o.runtime)}
	meters, failures := make([]*load.Meter, p.Jobs), make([]error, p.Jobs)
	var jobs sync.WaitGroup
	for i, d := range drivers {
		meters[i] = new(load.Meter)
		jobs.Add(1)
		go func() { // ends after s.end, or with its connection
			defer jobs.Done()
			if failures[i] = pinThread(cpus); failures[i] != nil {
				return
			}
			if o.op == "none" {
				time.Sleep(time.Until(s.begin))
				meters[i].Begin(s.begin)
				time.Sleep(time.Until(s.end))
				meters[i].End(s.end)
				return
			}
			failures[i] = d.Run(load.NewGenerator(p, i, t.Size()), meters[i], s)
		}()
	}
	finished := make(chan struct{})
	go func() { // ends with the jobs
		jobs.Wait()
		close(finished)
	}()
	var before, after float64
	for _, at := range []struct {
		when time.Time
		cpu  *float64
	}{{s.begin, &before}, {s.end, &after}} {
		select {
		case <-time.After(time.Until(at.when)):
		case <-finished:
		}
		*at.cpu = cpuSeconds()
	}
	select {
	case <-finished:
	case <-time.After(drainMax):
		return load.Report{}, fmt.Errorf("requests in flight were not answered within %v", drainMax)
	}
	if err := errors.Join(failures...); err != nil {
		return load.Report{}, err
	}
	return load.Summarize(p, meters, after-before), nil
}

func parseCPUs(list string) ([]int, error) {
	if list == "" {
		return nil, nil
	}
	var cpus []int
	for _, field := range strings.Split(list, ",") {
		cpu, err := strconv.Atoi(field)
		if err != nil || cpu < 0 {
			return nil, fmt.Errorf("cpus %q: want numbers such as 0 or 2,3", list)
		}
		cpus = append(cpus, cpu)
	}
	return cpus, nil
}
