package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

func (n *testNode) stats(volumes ...string) *controlpb.StatsResponse {
	n.t.Helper()
	reply, err := n.client.Observe.Stats(n.t.Context(), &controlpb.StatsRequest{Volumes: volumes})
	if err != nil {
		n.t.Fatal(err)
	}
	return reply
}

func volumeOf(t *testing.T, reply *controlpb.StatsResponse, name string) *controlpb.VolumeStats {
	t.Helper()
	i := slices.IndexFunc(reply.GetVolumes(), func(v *controlpb.VolumeStats) bool { return v.GetName() == name })
	if i < 0 {
		t.Fatalf("no counts of %s among %d volumes", name, len(reply.GetVolumes()))
	}
	return reply.GetVolumes()[i]
}

func operationOf(v *controlpb.VolumeStats, op string) *controlpb.OperationStats {
	for _, o := range v.GetOperations() {
		if o.GetOperation() == op {
			return o
		}
	}
	return nil
}

func checkHistogram(t *testing.T, what string, h *controlpb.Histogram) {
	t.Helper()
	if len(h.GetCounts()) != len(h.GetLowerNs()) || len(h.GetCounts()) != len(h.GetUpperNs()) {
		t.Fatalf("%s: %d counts, %d and %d bounds", what, len(h.GetCounts()), len(h.GetLowerNs()), len(h.GetUpperNs()))
	}
	sum, least, most := uint64(0), uint64(0), uint64(0)
	for i, n := range h.GetCounts() {
		if n == 0 || h.GetLowerNs()[i] >= h.GetUpperNs()[i] || i > 0 && h.GetLowerNs()[i] < h.GetUpperNs()[i-1] {
			t.Errorf("%s: bucket %d has %d in [%d, %d)", what, i, n, h.GetLowerNs()[i], h.GetUpperNs()[i])
		}
		sum += n
		least += n * h.GetLowerNs()[i]
		most += n * h.GetUpperNs()[i]
	}
	if sum != h.GetCount() || h.GetSumNs() < least || h.GetSumNs() > most {
		t.Errorf("%s: %d counted, %d in buckets; sum %d, by the buckets %d to %d", what, h.GetCount(), sum, h.GetSumNs(), least, most)
	}
}

// checkOperation wants an operation whose stages make up its latency.
func checkOperation(t *testing.T, o *controlpb.OperationStats) (stages []string) {
	t.Helper()
	checkHistogram(t, o.GetOperation(), o.GetLatency())
	sum := uint64(0)
	for _, s := range o.GetStages() {
		stages = append(stages, s.GetStage())
		sum += s.GetTime().GetSumNs()
		checkHistogram(t, o.GetOperation()+" "+s.GetStage(), s.GetTime())
		if n := s.GetTime().GetCount(); n == 0 || n > o.GetCount() {
			t.Errorf("%s: %d of %d came to %s", o.GetOperation(), n, o.GetCount(), s.GetStage())
		}
	}
	if sum != o.GetLatency().GetSumNs() {
		t.Errorf("%s: %d ns, the stages together %d", o.GetOperation(), o.GetLatency().GetSumNs(), sum)
	}
	return stages
}

// settled waits until the replies to count requests of an operation have been timed:
// a client may have one a moment before.
func (n *testNode) settled(volume, op string, count uint64) *controlpb.OperationStats {
	n.t.Helper()
	for deadline := time.Now().Add(serveWait); ; time.Sleep(time.Millisecond) {
		o := operationOf(volumeOf(n.t, n.stats(volume), volume), op)
		if o.GetCount() == count && o.GetLatency().GetCount() == count {
			return o
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s of %s: %d counted, %d timed, want %d", op, volume, o.GetCount(), o.GetLatency().GetCount(), count)
		}
	}
}

func TestStatsOfARunningNode(t *testing.T) {
	n := newNode(t, nil, func(c *ServeConfig) { c.Reactors.CPUs = []int{0, 0} })
	n.volume("data", 4*mib)
	n.volume("idle", 4*mib)
	c := n.dial("data")
	ctx := t.Context()
	block := bytes.Repeat([]byte("x"), 8192)
	for i := range uint64(8) {
		if err := c.Write(ctx, block, i*8192, 0); err != nil {
			t.Fatal(err)
		}
		if err := c.Read(ctx, make([]byte, 4096), i*4096, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	n.settled("data", "read", 8)
	n.settled("data", "write", 8)
	n.settled("data", "flush", 1)
	reply := n.stats()
	if !slices.IsSortedFunc(reply.GetVolumes(), func(a, b *controlpb.VolumeStats) int { return strings.Compare(a.GetName(), b.GetName()) }) || len(reply.GetVolumes()) != 2 {
		t.Errorf("volumes: %v", reply.GetVolumes())
	}
	idle := volumeOf(t, reply, "idle")
	if idle.GetPool() != "default" || idle.GetSizeBytes() != 4*mib || idle.GetOpenCount() != 0 || len(idle.GetOperations()) != 0 {
		t.Errorf("idle: %v", idle)
	}
	v := volumeOf(t, reply, "data")
	if v.GetPool() != "default" || v.GetSizeBytes() != 4*mib || v.GetOpenCount() != 1 || v.GetInFlight() != 0 || len(v.GetOperations()) != 3 {
		t.Errorf("data: pool %s, size %d, open %d, in flight %d, %d operations", v.GetPool(), v.GetSizeBytes(), v.GetOpenCount(), v.GetInFlight(), len(v.GetOperations()))
	}
	for op, want := range map[string]string{
		"write": "receive queue metadata device finish reply",
		"read":  "receive queue metadata device finish reply",
		"flush": "receive queue metadata commit reply",
	} {
		o := operationOf(v, op)
		if got := strings.Join(checkOperation(t, o), " "); got != want {
			t.Errorf("%s: stages %s, want %s", op, got, want)
		}
	}
	if w, r := operationOf(v, "write"), operationOf(v, "read"); w.GetBytes() != 8*8192 || r.GetBytes() != 8*4096 || w.GetErrors()+r.GetErrors() != 0 {
		t.Errorf("bytes written %d, read %d, errors %d", w.GetBytes(), r.GetBytes(), w.GetErrors()+r.GetErrors())
	}
	if len(reply.GetReactors()) != 2 || reply.GetCpuSeconds() <= 0 || reply.GetRssBytes() < mib || reply.GetStarted().AsTime().After(reply.GetTime().AsTime()) {
		t.Errorf("%d reactors, %v CPU seconds, %d bytes, started %v, now %v", len(reply.GetReactors()), reply.GetCpuSeconds(), reply.GetRssBytes(), reply.GetStarted(), reply.GetTime())
	}
	for i, r := range reply.GetReactors() {
		if r.GetIndex() != uint32(i) || !r.GetPinned() || r.GetCpu() != 0 || r.GetTurns() == 0 || r.GetEnters() == 0 || r.GetSleepNs() == 0 {
			t.Errorf("reactor %d: %v", i, r)
		}
	}

	// What is asked for, by any of its names.
	for _, name := range []string{"data", "default/data"} {
		if some := n.stats(name); len(some.GetVolumes()) != 1 || some.GetVolumes()[0].GetName() != "data" {
			t.Errorf("%s: %v", name, some.GetVolumes())
		}
	}
	if _, err := n.client.Observe.Stats(ctx, &controlpb.StatsRequest{Volumes: []string{"data", "none"}}); status.Code(errors.Unwrap(err)) != codes.NotFound && status.Code(err) != codes.NotFound {
		t.Errorf("a volume that is not there: %v", err)
	}
	if _, err := n.client.Observe.Stats(ctx, &controlpb.StatsRequest{Volumes: []string{"/dev/none"}}); err == nil {
		t.Error("a device that is not there has counts")
	}

	// Counts outlive the client, and end with the daemon.
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	n.closedVolumes()
	n.settled("data", "write", 8)
	before := n.stats().GetStarted().AsTime()
	n.stop()
	n.start()
	reply = n.stats()
	if v := volumeOf(t, reply, "data"); len(v.GetOperations()) != 0 || !reply.GetStarted().AsTime().After(before) {
		t.Errorf("after a restart: %v, since %v (before: %v)", v.GetOperations(), reply.GetStarted().AsTime(), before)
	}
}

func TestStatsOfFUASnapshotsAndErrors(t *testing.T) {
	onLayouts(t, func(t *testing.T, layout engine.Layout) {
		n := newNode(t, layout, nil)
		n.volume("data", mib)
		c := n.dial("data")
		ctx := t.Context()
		if err := c.Write(ctx, make([]byte, 4096), 0, 1); err != nil { // FUA
			t.Fatal(err)
		}
		stages := checkOperation(t, n.settled("data", "write", 1))
		if layout == nil && !slices.Contains(stages, "commit") {
			t.Errorf("a write with FUA has the stages %v", stages)
		}
		if _, err := n.client.Snapshots.Create(ctx, &controlpb.CreateSnapshotRequest{Volume: "data", Name: "s"}); err != nil {
			t.Fatal(err)
		}
		if len(n.stats().GetVolumes()) != 1 {
			t.Error("a snapshot that nobody read is listed")
		}
		s := n.dial("data@s")
		if err := s.Read(ctx, make([]byte, 4096), 0, 0); err != nil {
			t.Fatal(err)
		}
		checkOperation(t, n.settled("data@s", "read", 1))
		if err := errors.Join(s.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	})
}

func TestStatsUnderLoad(t *testing.T) {
	n := newNode(t, nil, nil)
	n.volume("data", 4*mib)
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for i := range 3 {
		c := n.dial("data")
		load.Go(func() {
			for at := uint64(0); ctx.Err() == nil; at = (at + 4096) % (4 * mib) {
				if err := errors.Join(c.Write(t.Context(), make([]byte, 4096), at, 0), c.Read(t.Context(), make([]byte, 4096), at, 0)); err != nil {
					t.Errorf("client %d: %v", i, err)
					return
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	last := uint64(0)
	began := time.Now()
	for time.Since(began) < 500*time.Millisecond || last == 0 && time.Since(began) < serveWait {
		v := volumeOf(t, n.stats(), "data")
		if v.GetInFlight() > 3 {
			t.Errorf("%d in flight of 3 clients", v.GetInFlight())
		}
		if o := operationOf(v, "write"); o != nil {
			checkOperation(t, o)
			if o.GetCount() < last {
				t.Errorf("writes went from %d to %d", last, o.GetCount())
			}
			last = o.GetCount()
		}
		if _, text := n.get("/metrics"); !strings.Contains(text, "export_request_seconds_count") && last > 0 {
			t.Error("no latencies among the metrics")
		}
	}
	cancel()
	load.Wait()
	if last == 0 {
		t.Error("no write was counted")
	}
}

// fixedObserver stands for package observe.
type fixedObserver struct{ threads []int }

func (o *fixedObserver) observe(reply *controlpb.StatsResponse, threads []int) {
	o.threads = threads
	reply.Disks = append(reply.Disks, &controlpb.DiskStats{Name: "sda"})
	reply.Reactors[0].OffCpu = &controlpb.Histogram{Count: 1}
}

func TestStatsJoinWhatTheKernelShows(t *testing.T) {
	r, err := reactor.Start(reactor.Config{Poll: reactor.PollOff})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	n := newNode(t, nil, nil)
	if got := n.stats().GetUnobserved(); len(got) > 0 && got[0].GetReason() == "" {
		t.Errorf("what is not seen has no reason: %v", got)
	}
	o := &fixedObserver{}
	e, err := engine.Open(engine.Config{DataDir: t.TempDir(), Reactors: []*reactor.Reactor{r}, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	s := &observeService{controller: &controller{engine: e, volumes: newVolumes(e, false, nil), reactors: []*reactor.Reactor{r}, observer: o, started: time.Now()}}
	reply, err := s.Stats(t.Context(), &controlpb.StatsRequest{})
	if err != nil || len(reply.GetDisks()) != 1 || reply.GetReactors()[0].GetOffCpu().GetCount() != 1 || len(o.threads) != 1 || o.threads[0] != r.Stats().Thread {
		t.Errorf("%v, %v, threads %v", reply, err, o.threads)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if reply, err := s.Stats(t.Context(), &controlpb.StatsRequest{}); err != nil || len(reply.GetVolumes()) != 0 || len(reply.GetReactors()) != 1 {
		t.Errorf("after the engine closed: %v, %v", reply, err)
	}
}

func TestSlowRequestsAreLoggedWithTheirStages(t *testing.T) {
	var log testenv.Output
	n := newNode(t, nil, func(c *ServeConfig) {
		c.SlowIO = time.Nanosecond // everything
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	n.volume("data", mib)
	c := n.dial("data")
	const count = 3 * slowBurst
	for range count {
		if err := c.Write(t.Context(), make([]byte, 4096), 8192, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	n.settled("data", "write", count)
	var text string
	slow := regexp.MustCompile(`(?m)^export_slow_requests_total\{export="data",op="write"\} (\d+)`)
	for deadline := time.Now().Add(serveWait); ; time.Sleep(time.Millisecond) {
		_, text = n.get("/metrics")
		if m := slow.FindStringSubmatch(text); m != nil && m[1] == "60" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("slow requests: %v", slow.FindStringSubmatch(text))
		}
	}
	if !strings.Contains(text, "export_slow_request_threshold_seconds 1e-09") || !strings.Contains(text, "export_slow_requests_dropped_total 0") {
		t.Error("threshold and drops are not among the metrics")
	}
	exemplar := regexp.MustCompile(`export_request_seconds_bucket\{export="data",op="write",le="[^"]+"\} \d+ # \{trace_id="([0-9a-f]{32})"\}`)
	open := n.openMetrics()
	id := exemplar.FindStringSubmatch(open)
	if id == nil {
		t.Fatal("no exemplar in the OpenMetrics text")
	}
	n.stop()
	lines := regexp.MustCompile(`(?m)^.*msg="slow request".*$`).FindAllString(log.String(), -1)
	if len(lines) < slowBurst || len(lines) > slowBurst+slowRate*int(serveWait/time.Second) {
		t.Errorf("%d lines about %d slow requests", len(lines), count)
	}
	want := regexp.MustCompile(`level=WARN msg="slow request" volume=data op=write offset=8192 length=4096 status=\S+ total=\S+ stages.receive=\S+ stages.queue=\S+ stages.metadata=\S+ stages.device=\S+ stages.finish=\S+ stages.reply=\S+ trace_id=[0-9a-f]{32}`)
	if !want.MatchString(lines[0]) {
		t.Errorf("a line about a slow request: %s", lines[0])
	}
}

func TestSlowLogCountsWhatItLeavesOut(t *testing.T) {
	var log testenv.Output
	l := startSlowLog(time.Hour, slog.New(slog.NewTextHandler(&log, nil)), nil)
	defer l.stop()
	now := time.Now()
	allowed := 0
	for range slowBurst + 10 {
		if l.allowed(now) {
			allowed++
		}
	}
	if allowed != slowBurst {
		t.Errorf("%d lines at once, want %d", allowed, slowBurst)
	}
	if !l.allowed(now.Add(time.Second / slowRate)) {
		t.Error("no line after the time of one")
	}
	if l.exemplars("none", 0) != nil {
		t.Error("an exemplar of nothing")
	}
	var off *slowLog
	off.stop()
	if off.taking() != nil || off.exemplars("", 0) != nil || startSlowLog(0, nil, nil) != nil {
		t.Error("a slow log that is off does something")
	}
}

// openMetrics is /metrics in the text form of OpenMetrics.
func (n *testNode) openMetrics() string {
	n.t.Helper()
	request, err := http.NewRequestWithContext(n.t.Context(), http.MethodGet, "http://"+n.addresses.HTTP.String()+"/metrics", nil)
	if err != nil {
		n.t.Fatal(err)
	}
	request.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }() // read to its end
	b, err := io.ReadAll(response.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

func TestDevicesOfOneNameAreCountedTogether(t *testing.T) {
	r, err := reactor.Start(reactor.Config{Poll: reactor.PollOff})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	e, err := engine.Open(engine.Config{DataDir: t.TempDir(), Reactors: []*reactor.Reactor{r}, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}()
	v := newVolumes(e, false, nil)
	d := &devices{engine: e, volumes: v}
	path := testenv.SparseFile(t, filepath.Join(t.TempDir(), "disk.img"), mib)
	source, err := d.source(path)
	if err != nil {
		t.Fatal(err)
	}
	read := func(device datapath.Device) {
		t.Helper()
		done := make(chan datapath.Status, 1)
		request := &datapath.Request{Op: datapath.OpRead, Length: 4096, Buf: make([]byte, 4096), Done: func(r *datapath.Request) { done <- r.Status }}
		var queue datapath.Queue
		if err := r.Run(func(r *reactor.Reactor) {
			var err error
			if queue, err = device.OpenQueue(r, 1); err != nil {
				t.Error(err)
				return
			}
			queue.Submit(request)
		}); err != nil {
			t.Fatal(err)
		}
		if s := <-done; s != datapath.StatusOK {
			t.Error(s)
		}
		if err := r.Run(func(*reactor.Reactor) {
			if err := queue.Close(); err != nil {
				t.Error(err)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	count := func() uint64 {
		s := v.snapshots()[path]
		if s == nil {
			return 0
		}
		return s.Op(datapath.OpRead).Count
	}
	var open []datapath.Device
	for i := range uint64(2) {
		device, err := source.open(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, device)
		read(device)
		if n := count(); n != i+1 {
			t.Errorf("%d reads, want %d", n, i+1)
		}
	}
	if err := open[0].Close(); err != nil {
		t.Error(err)
	}
	read(open[1])
	if n := count(); n != 3 {
		t.Errorf("%d reads after one of two devices closed, want 3", n)
	}
	s := &observeService{controller: &controller{engine: e, volumes: v}}
	if reply, err := s.Stats(t.Context(), &controlpb.StatsRequest{Volumes: []string{path}}); err != nil || len(reply.GetVolumes()) != 1 || reply.GetVolumes()[0].GetPool() != "" {
		t.Errorf("%v, %v", reply, err)
	}
	if err := open[1].Close(); err != nil {
		t.Error(err)
	}
	if n := count(); n != 0 {
		t.Errorf("%d reads of a file that nobody has any more", n)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := source.open(t.Context(), true); err == nil {
		t.Error("a file that is gone was opened")
	}
}

func TestStatsHaveTheKernelsSideOrSayWhyNot(t *testing.T) {
	n := newNode(t, nil, func(c *ServeConfig) { c.Observe = []string{"disks", "reactors"} })
	n.volume("data", mib)
	c := n.dial("data")
	if err := errors.Join(c.Write(t.Context(), make([]byte, 4096), 0, 1), c.Close()); err != nil { // FUA
		t.Fatal(err)
	}
	why := func(reply *controlpb.StatsResponse, what string) string {
		for _, u := range reply.GetUnobserved() {
			if u.GetWhat() == what {
				return u.GetReason()
			}
		}
		return ""
	}
	for deadline := time.Now().Add(serveWait); ; time.Sleep(10 * time.Millisecond) {
		reply := n.stats()
		disks := len(reply.GetDisks()) > 0 || why(reply, "disks") != ""
		reactors := reply.GetReactors()[0].GetWakeup() != nil || why(reply, "reactors") != ""
		if disks && reactors {
			t.Logf("%d disks; unobserved: %v", len(reply.GetDisks()), reply.GetUnobserved())
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d disks, %v, unobserved: %v", len(reply.GetDisks()), reply.GetReactors()[0], reply.GetUnobserved())
		}
	}
}
