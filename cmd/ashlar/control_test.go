package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

var rewrite = flag.Bool("rewrite", false, "renew the outputs in testdata/*.txt")

// TestControlScripts runs the command lines in testdata/*.txt against a daemon
// that knows the answers of this file. A script has command lines, each followed
// by ---- and what happened: the calls the daemon saw, standard output, standard
// error marked with !, and the exit code unless it is 0. What stands after <<< is
// typed on a terminal.
func TestControlScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	d := startDaemon(t)
	for _, path := range scripts {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var renewed strings.Builder
			for i, step := range parseScript(string(text)) {
				got := d.run(t, step.command)
				if got != step.output && !*rewrite {
					t.Errorf("%s\n---- got\n%s---- want\n%s", step.command, got, step.output)
				}
				if i > 0 {
					renewed.WriteString("\n")
				}
				renewed.WriteString(step.command + "\n----\n" + got)
			}
			if *rewrite {
				if err := os.WriteFile(path, []byte(renewed.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

type step struct{ command, output string }

// parseScript splits a script: a line before ---- is a command.
func parseScript(text string) []step {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	var steps []step
	for i := 0; i < len(lines); i++ {
		if i+1 < len(lines) && lines[i+1] == "----" {
			steps = append(steps, step{command: lines[i]})
			i++
			continue
		}
		if len(steps) > 0 {
			steps[len(steps)-1].output += lines[i] + "\n"
		}
	}
	for i := range steps[:max(len(steps)-1, 0)] {
		steps[i].output = strings.TrimSuffix(steps[i].output, "\n") // the line between steps
	}
	return steps
}

// words splits a command line at spaces outside of single quotes.
func words(line string) []string {
	var list []string
	var word strings.Builder
	quoted, any := false, false
	for _, r := range line + " " {
		switch {
		case r == '\'':
			quoted, any = !quoted, true
		case r == ' ' && !quoted:
			if any {
				list = append(list, word.String())
			}
			word.Reset()
			any = false
		default:
			word.WriteRune(r)
			any = true
		}
	}
	return list
}

// fakeDaemon answers calls from a table.
type fakeDaemon struct {
	address string
	dir     string
	silent  atomic.Bool // it answers Observe.Stats no more

	mu    sync.Mutex
	calls []string
}

func startDaemon(t *testing.T) *fakeDaemon {
	t.Helper()
	d := &fakeDaemon{dir: t.TempDir()}
	path := filepath.Join(d.dir, "control.sock")
	d.address = "unix://" + path
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnknownServiceHandler(d.handle))
	done := make(chan struct{})
	go func() { // ends with Stop
		defer close(done)
		_ = server.Serve(l) // the error of a listener that was closed
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	t.Setenv(serverVariable, d.address)
	return d
}

// run runs a command line and tells what happened.
func (d *fakeDaemon) run(t *testing.T, line string) string {
	t.Helper()
	line, typed, terminal := strings.Cut(line, " <<< ")
	d.mu.Lock()
	d.calls = nil
	d.mu.Unlock()
	fakeClock.Lock()
	clear(fakeClock.samples) // each command sees the same node
	fakeClock.Unlock()
	args := words(line)
	if len(args) == 0 || args[0] != "ashlar" {
		t.Fatalf("%q is no command of ashlar", line)
	}
	old := inputIsTerminal
	inputIsTerminal = func(io.Reader) bool { return terminal }
	defer func() { inputIsTerminal = old }()
	var out, errs bytes.Buffer
	code := execute(args[1:], strings.NewReader(typed+"\n"), &out, &errs)
	var b strings.Builder
	d.mu.Lock()
	for _, c := range d.calls {
		b.WriteString(c + "\n")
	}
	d.mu.Unlock()
	b.Write(out.Bytes())
	if out.Len() > 0 && !bytes.HasSuffix(out.Bytes(), []byte("\n")) {
		b.WriteString("(no end of line)\n")
	}
	for l := range strings.Lines(errs.String()) {
		b.WriteString("! " + strings.TrimSuffix(l, "\n") + "\n")
	}
	if code != 0 {
		fmt.Fprintf(&b, "exit %d\n", code)
	}
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer(d.address, "SERVER", cwd, "CWD").Replace(b.String())
}

func (d *fakeDaemon) handle(_ any, stream grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(stream)
	name := strings.TrimPrefix(strings.ReplaceAll(full, "/", "."), ".ashlar.control.v1.")
	descriptor, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName("ashlar.control.v1." + name))
	if err != nil {
		return status.Error(codes.Unimplemented, full)
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(descriptor.(protoreflect.MethodDescriptor).Input().FullName())
	if err != nil {
		return err
	}
	request := kind.New().Interface()
	if err := stream.RecvMsg(request); err != nil {
		return err
	}
	b, err := json.Marshal(given(objectOf(request)))
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.calls = append(d.calls, "call "+name+" "+string(b))
	d.mu.Unlock()
	if e := d.failure(request); e != nil {
		return e
	}
	if d.silent.Load() && name == "Observe.Stats" {
		return status.Error(codes.Unavailable, "shut down")
	}
	answer := answers[name]
	if answer == nil {
		return status.Error(codes.Unimplemented, "the fake has no answer to "+name)
	}
	for _, m := range answer(request) {
		if forever(request) && !descriptor.(protoreflect.MethodDescriptor).IsStreamingServer() {
			break
		}
		if err := stream.SendMsg(m); err != nil {
			return err
		}
	}
	if forever(request) {
		<-stream.Context().Done()
		return status.FromContextError(stream.Context().Err()).Err()
	}
	return nil
}

// forever says whether a call is never to end by itself.
func forever(request proto.Message) bool {
	return strings.Contains(fmt.Sprint(request), `"forever"`) || strings.Contains(fmt.Sprint(request), `"tank/waits"`)
}

// given is an object without what is at its default.
func given(o object) object {
	kept := object{}
	for _, m := range o {
		if v := reflect.ValueOf(m.value); v.IsValid() && !v.IsZero() && (v.Kind() != reflect.Map && v.Kind() != reflect.Slice || v.Len() > 0) {
			kept = append(kept, m)
		}
	}
	return kept
}

// failure fails requests about things whose name says how.
func (d *fakeDaemon) failure(request proto.Message) error {
	text := fmt.Sprint(request)
	for name, e := range map[string]error{
		"missing":  control.Errorf(control.ErrNotFound, "volume", "missing", ""),
		"nopool":   control.Errorf(control.ErrNotFound, "pool", "nopool", ""),
		"taken":    &control.Error{Reason: control.ErrExists, Kind: "volume", Name: "taken", Message: "volume taken: already exists, as large as asked for", SameSpec: true},
		"busy":     control.Errorf(control.ErrInUse, "volume", "busy", "volume busy: 2 clients have it open"),
		"parent":   control.Errorf(control.ErrHasSnapshots, "volume", "parent", "volume parent: has 3 snapshots"),
		"fullpool": control.Errorf(control.ErrNoSpace, "pool", "fullpool", ""),
		"odd":      control.Errorf(control.ErrInvalid, "volume", "odd", "volume odd: size 4097 is no multiple of 4096"),
		"rotten":   control.Errorf(control.ErrCorrupt, "volume", "rotten", ""),
		"occupied": control.Errorf(control.ErrForeign, "device", "/dev/occupied", "device /dev/occupied: holds an ext4 file system"),
		"newer":    status.Error(codes.Unimplemented, "unknown method"),
	} {
		if strings.Contains(text, `"`+name+`"`) || strings.Contains(text, "/"+name+`"`) {
			return e
		}
	}
	return nil
}

var (
	day     = time.Date(2026, 11, 21, 8, 30, 0, 0, time.UTC)
	tank    = "tank"
	created = timestamppb.New(day)

	tankPool = &controlpb.Pool{
		Name: tank, Uuid: "5f1c2a34-0000-4000-8000-000000000001", State: controlpb.PoolState_POOL_STATE_ONLINE,
		Devices: []*controlpb.PoolDevice{
			{Index: 0, Uuid: "5f1c2a34-0000-4000-8000-00000000000a", Path: "/dev/vdb", SizeBytes: 1 << 40},
			{Index: 1, Uuid: "5f1c2a34-0000-4000-8000-00000000000b", Path: "/dev/vdc", SizeBytes: 1 << 40},
		},
		Created: created, FormatVersion: 1,
		TotalBytes: 2 << 40, AllocatedBytes: 700<<30 + 12345678, MetadataBytes: 1 << 30, FreeBytes: 1347<<30 - 12345678,
		ReservedBytes: 100 << 30, ReserveBytes: 41 << 30, AvailableBytes: 1206<<30 - 12345678, ProvisionedBytes: 5 << 40, OverProvisionPercent: 400,
		VolumeCount: 2, SnapshotCount: 3, DirtyRegionCount: 7,
		Journal: &controlpb.Journal{SizeBytes: 256 << 20, UsedBytes: 3 << 20, GroupCount: 99},
	}
	brokenPool = &controlpb.Pool{
		Name: "attic", State: controlpb.PoolState_POOL_STATE_UNAVAILABLE, Reason: "1 device missing: /dev/vdz",
		Devices: []*controlpb.PoolDevice{{Index: 0, Path: "/dev/vdz", SizeBytes: 1 << 30, Missing: true}},
	}
	vm1 = &controlpb.Volume{
		Name: "vm1", Uuid: "5f1c2a34-0000-4000-8000-000000000011", Pool: tank, SizeBytes: 100 << 30, Labels: map[string]string{"app": "web", "tier": "1"},
		Created: created, SnapshotCount: 2, OpenCount: 1, Depth: 3, AllocatedBytes: 12<<30 + 1,
		Uris: []string{"nbd://node1:10809/vm1", "nbd+unix:///vm1?socket=/run/ashlar/nbd.sock"},
	}
	vm2    = &controlpb.Volume{Name: "vm2", Pool: tank, SizeBytes: 1 << 40, Thick: true, Parent: "vm1@monday", Depth: 1, Created: created}
	monday = &controlpb.Snapshot{
		Volume: "vm1", Name: "monday", Pool: tank, SizeBytes: 50 << 30, Created: created, Clones: []string{"vm2"}, AllocatedBytes: 3 << 29, Labels: map[string]string{"kept": "yes"},
	}
	tuesday = &controlpb.Snapshot{Volume: "vm1", Name: "tuesday", Pool: tank, SizeBytes: 100 << 30, Created: timestamppb.New(day.AddDate(0, 0, 1)), OpenCount: 1}
)

func job(kind controlpb.JobKind, state controlpb.JobState, target string, done uint64) *controlpb.Job {
	j := &controlpb.Job{Id: "tank/7", Kind: kind, State: state, Pool: tank, Target: target, DoneBytes: done, TotalBytes: 4 << 30, Started: created}
	if state != controlpb.JobState_JOB_STATE_RUNNING {
		j.Ended = timestamppb.New(day.Add(90 * time.Second))
	}
	return j
}

const (
	jobRunning = controlpb.JobState_JOB_STATE_RUNNING
	jobDone    = controlpb.JobState_JOB_STATE_DONE
	jobFailed  = controlpb.JobState_JOB_STATE_FAILED
	jobStopped = controlpb.JobState_JOB_STATE_CANCELED
	jobMerge   = controlpb.JobKind_JOB_KIND_MERGE
	jobDelete  = controlpb.JobKind_JOB_KIND_DELETE
	jobScrub   = controlpb.JobKind_JOB_KIND_SCRUB
)

func withID(j *controlpb.Job, id string) *controlpb.Job { j.Id = id; return j }

func noted(j *controlpb.Job) *controlpb.Job { j.Note = "two clones stand on it"; return j }

func withName(p *controlpb.Pool, name string) *controlpb.Pool {
	p = proto.CloneOf(p)
	p.Name = name
	return p
}

// answers are the messages that answer a request.
var answers = map[string]func(proto.Message) []proto.Message{
	"Pools.Create": func(r proto.Message) []proto.Message {
		return one(withName(tankPool, r.(*controlpb.CreatePoolRequest).GetName()))
	},
	"Pools.Get": func(r proto.Message) []proto.Message {
		return one(withName(tankPool, r.(*controlpb.GetPoolRequest).GetName()))
	},
	"Pools.Grow":      always(tankPool),
	"Pools.AddDevice": always(tankPool),
	"Pools.Open":      always(tankPool),
	"Pools.Close":     always(new(controlpb.ClosePoolResponse)),
	"Pools.Destroy":   always(new(controlpb.DestroyPoolResponse)),
	"Pools.List":      always(&controlpb.ListPoolsResponse{Pools: []*controlpb.Pool{brokenPool, tankPool}}),
	"Pools.Scrub": func(r proto.Message) []proto.Message {
		return one(withID(job(jobScrub, jobRunning, tank, 0), r.(*controlpb.ScrubPoolRequest).GetName()+"/8"))
	},
	"Pools.StopScrub": always(job(jobScrub, jobStopped, tank, 1<<30)),
	"Pools.Scan": func(r proto.Message) []proto.Message {
		if slices.Contains(r.(*controlpb.ScanPoolsRequest).GetPaths(), "/empty") {
			return one(&controlpb.ScanPoolsResponse{Failures: []*controlpb.ScanFailure{{Path: "/empty/a", Message: "permission denied"}}})
		}
		return one(&controlpb.ScanPoolsResponse{Pools: []*controlpb.FoundPool{
			{Name: "attic", Devices: []*controlpb.PoolDevice{{Path: "/dev/vdy"}, {Path: "/dev/vdz", Missing: true}}, Created: created},
			{Name: "cellar", Uuid: "5f1c2a34-0000-4000-8000-000000000002", Devices: []*controlpb.PoolDevice{{Path: "/dev/vdx"}}, FormatVersion: 1},
			{Name: tank, Devices: []*controlpb.PoolDevice{{Path: "/dev/vdb"}, {Path: "/dev/vdc"}}, Open: true},
		}})
	},
	"Volumes.Create": always(vm1), "Volumes.Get": always(vm1), "Volumes.Resize": always(vm1), "Volumes.Clone": always(vm2),
	"Volumes.SetLimits": func(r proto.Message) []proto.Message {
		v := proto.CloneOf(vm1)
		v.Limits = r.(*controlpb.SetLimitsRequest).GetLimits()
		return one(v)
	},
	"Snapshots.CreateGroup": func(r proto.Message) []proto.Message {
		reply := &controlpb.CreateGroupResponse{}
		for _, volume := range r.(*controlpb.CreateGroupRequest).GetVolumes() {
			s := proto.CloneOf(monday)
			s.Volume, s.Name = volume, r.(*controlpb.CreateGroupRequest).GetName()
			reply.Snapshots = append(reply.Snapshots, s)
		}
		return one(reply)
	},
	"Volumes.List": func(r proto.Message) []proto.Message {
		if len(r.(*controlpb.ListVolumesRequest).GetLabels()) > 0 {
			return one(new(controlpb.ListVolumesResponse))
		}
		return one(&controlpb.ListVolumesResponse{Volumes: []*controlpb.Volume{vm1, vm2}})
	},
	"Volumes.Delete": func(r proto.Message) []proto.Message {
		name := strings.TrimSuffix(r.(*controlpb.DeleteVolumeRequest).GetName(), "-that-takes-long")
		state, done := jobRunning, uint64(0)
		if name == "small" {
			state, done = jobDone, 4<<30
		}
		return one(withID(job(jobDelete, state, name, done), name))
	},
	"Volumes.Map": always(&controlpb.VolumeMap{
		Volume: "vm1", Pool: tank, SizeBytes: 100 << 30, MappedBytes: 40 << 30, ExclusiveBytes: 12 << 30, SharedBytes: 28 << 30, ReclaimableBytes: 30 << 30,
		Snapshots: []*controlpb.Snapshot{monday, tuesday},
	}),
	"Volumes.Changes": func(r proto.Message) []proto.Message {
		if r.(*controlpb.ChangesRequest).GetSince() == "tuesday" {
			return one(&controlpb.ChangesResponse{SizeBytes: 100 << 30, NextBytes: 100 << 30})
		}
		return []proto.Message{
			&controlpb.ChangesResponse{SizeBytes: 100 << 30, Changes: []*controlpb.Change{{OffsetBytes: 0, LengthBytes: 4096}, {OffsetBytes: 1 << 20, LengthBytes: 1 << 17, Zero: true}}, NextBytes: 1 << 30},
			&controlpb.ChangesResponse{SizeBytes: 100 << 30, Changes: []*controlpb.Change{{OffsetBytes: 99 << 30, LengthBytes: 8192}}, NextBytes: 100 << 30},
		}
	},
	"Snapshots.Create": always(monday), "Snapshots.Revert": always(vm1),
	"Snapshots.List": always(&controlpb.ListSnapshotsResponse{Snapshots: []*controlpb.Snapshot{monday, tuesday}}),
	"Snapshots.Delete": func(r proto.Message) []proto.Message {
		j := job(jobMerge, jobRunning, "vm1@monday", 0)
		switch r.(*controlpb.DeleteSnapshotRequest).GetVolume() {
		case "base":
			return one(noted(j))
		case "late": // which the report tells, not the answer
			return one(withID(j, "tank/waits"))
		}
		return one(j)
	},
	"Jobs.List": func(r proto.Message) []proto.Message {
		if r.(*controlpb.ListJobsRequest).GetPool() == "cellar" {
			return one(&controlpb.ListJobsResponse{Jobs: []*controlpb.Job{noted(job(jobMerge, jobRunning, "base@monday", 0))}})
		}
		jobs := []*controlpb.Job{withID(job(jobScrub, jobRunning, tank, 1<<30), "tank/8")}
		if !r.(*controlpb.ListJobsRequest).GetRunning() {
			failed := withID(job(jobMerge, jobFailed, "vm1@old", 5), "tank/6")
			failed.Error = "no space left in the pool"
			unknown := withID(job(jobDelete, jobDone, "vm9", 9), "tank/5")
			unknown.TotalBytes = 0
			jobs = append([]*controlpb.Job{unknown, failed}, jobs...)
		}
		return one(&controlpb.ListJobsResponse{Jobs: jobs})
	},
	"Jobs.Watch": func(r proto.Message) []proto.Message {
		id := r.(*controlpb.WatchJobRequest).GetId()
		if id == "tank/waits" {
			return one(noted(withID(job(jobMerge, jobRunning, "late@monday", 0), id)))
		}
		if id == "forever" {
			return one(withID(job(jobMerge, jobRunning, "vm1@monday", 1<<30), id))
		}
		begun, ended := withID(job(jobMerge, jobRunning, "vm1@monday", 1<<30), id), withID(job(jobMerge, jobDone, "vm1@monday", 4<<30), id)
		switch id {
		case "tank/6":
			ended.State, ended.Error = jobFailed, "no space left in the pool"
		case "tank/8", "scratch/8":
			begun.Kind, ended.Kind = jobScrub, jobScrub
			begun.Target, _, _ = strings.Cut(id, "/")
			begun.Pool, ended.Pool, ended.Target = begun.Target, begun.Target, begun.Target
			if begun.Target == "scratch" {
				ended.DamagedBlocks = 3
			}
		case "tank/9":
			begun.Kind, ended.Kind, ended.State = jobScrub, jobScrub, jobStopped
		}
		return []proto.Message{begun, ended}
	},
	"Events.Watch": func(proto.Message) []proto.Message {
		return []proto.Message{
			&controlpb.Event{Sequence: 1, Time: created, Kind: controlpb.EventKind_EVENT_KIND_SPACE_LOW, Pool: tank, Message: "the pool is 80 % full"},
			&controlpb.Event{
				Sequence: 2, Time: timestamppb.New(day.Add(1500 * time.Millisecond)), Kind: controlpb.EventKind_EVENT_KIND_CORRUPT, Pool: tank,
				Volume: "vm1", OffsetBytes: 4096, Device: "/dev/vdb", AddressBytes: 1 << 30, Message: "a block failed its checksum twice",
			},
		}
	},
}

func always(m proto.Message) func(proto.Message) []proto.Message {
	return func(proto.Message) []proto.Message { return one(m) }
}

func one(m proto.Message) []proto.Message { return []proto.Message{m} }

func TestNoDaemonIsOneSentence(t *testing.T) {
	address := "unix://" + filepath.Join(t.TempDir(), "none.sock")
	t.Setenv(serverVariable, "unix:///not/this/one")
	var out, errs bytes.Buffer
	code := execute([]string{"pool", "list", "--server", address}, strings.NewReader(""), &out, &errs)
	want := "ashlar: cannot reach the daemon at " + address + ": is `ashlar serve` running? (--server / ASHLAR_SERVER)\n"
	if code != exitFailure || errs.String() != want || out.Len() > 0 {
		t.Errorf("exit code %d, %q, want %q", code, errs.String(), want)
	}
	out.Reset()
	if code := execute([]string{"__complete", "pool", "status", "--server", address, ""}, strings.NewReader(""), &out, io.Discard); code != 0 || out.String() != ":4\n" {
		t.Errorf("completion: exit code %d, %q", code, &out)
	}
}

// TestInterrupt: an interrupt is how following ends; a job goes on without us.
func TestInterrupt(t *testing.T) {
	d := startDaemon(t)
	for _, tt := range []struct {
		args []string
		sign string // that it runs
		code int
		want string
	}{
		{[]string{"events", "--follow", "--pool", "forever"}, "space-low", exitOK, ""},
		{[]string{"job", "watch", "forever"}, "merge vm1@monday", exitFailure, "interrupted; job forever goes on in the daemon"},
		{[]string{"volume", "delete", "forever-that-takes-long", "--yes", "--wait"}, "merge vm1@monday", exitFailure, "interrupted; job forever goes on in the daemon"},
		{[]string{"volume", "show", "forever"}, "", exitFailure, "canceled"},
	} {
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		c := command(t, tt.args...)
		c.Stdout, c.Stderr = write, write
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		_ = write.Close() // the command has its own
		var said strings.Builder
		buffer := make([]byte, 4096)
		for asked := tt.sign != ""; !asked; time.Sleep(time.Millisecond) { // nothing is said before the answer
			d.mu.Lock()
			asked = slices.Contains(d.calls, `call Volumes.Get {"name":"forever"}`)
			d.mu.Unlock()
		}
		for !strings.Contains(said.String(), tt.sign) {
			n, err := read.Read(buffer)
			if err != nil {
				t.Fatalf("%q ended with %q", tt.args, &said)
			}
			said.Write(buffer[:n])
		}
		if err := c.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(read)
		if err != nil {
			t.Fatal(err)
		}
		_ = read.Close() // read to its end
		if code := exitCode(t, c.Wait()); code != tt.code || !strings.Contains(string(rest), tt.want) {
			t.Errorf("%q: exit code %d, want %d\n%s%s", tt.args, code, tt.code, &said, rest)
		}
	}
}

// TestChangesThatEndEarlyAreNoList: a reader of the JSON must notice.
func TestChangesThatEndEarlyAreNoList(t *testing.T) {
	s := &session{cmd: newVolumeChangesCommand(), output: "json"}
	var out bytes.Buffer
	s.cmd.SetOut(&out)
	sent := false
	err := s.writeChanges("vm1", `a"b`, "", func() (*controlpb.ChangesResponse, error) {
		if sent {
			return nil, control.Errorf(control.ErrUnavailable, "", "", "gone")
		}
		sent = true
		return &controlpb.ChangesResponse{Changes: []*controlpb.Change{{LengthBytes: 4096}}}, nil
	})
	if err == nil || json.Valid(out.Bytes()) || !strings.Contains(out.String(), `"since": "a\"b"`) {
		t.Errorf("%v, %s", err, &out)
	}
}
