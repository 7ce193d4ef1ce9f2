package control

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/authority"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake answers every method of the API.
type fake struct {
	mu sync.Mutex // taken by a test only when a server runs that may be in a call
	// answer gives the messages of the answer to a request, and how it ends.
	answer   func(ctx context.Context, method protoreflect.MethodDescriptor, request proto.Message) ([]proto.Message, error)
	requests []proto.Message
}

func (f *fake) handle(_ any, stream grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(stream)
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(full, "/"), "/", ".")))
	if err != nil {
		return status.Error(codes.Unimplemented, full)
	}
	method := d.(protoreflect.MethodDescriptor)
	request := newMessage(method.Input())
	if err := stream.RecvMsg(request); err != nil {
		return err
	}
	f.mu.Lock()
	f.requests = append(f.requests, request)
	answerer := f.answer
	f.mu.Unlock()
	answer, err := answerer(stream.Context(), method, request)
	for _, m := range answer {
		if err := stream.SendMsg(m); err != nil {
			return err
		}
	}
	return err
}

func newMessage(d protoreflect.MessageDescriptor) proto.Message {
	t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		panic(err)
	}
	return t.New().Interface()
}

// fill sets every field of a message to something that is not its zero.
func fill(m protoreflect.Message) {
	switch v := m.Interface().(type) {
	case *timestamppb.Timestamp:
		v.Seconds, v.Nanos = 1_800_000_000, 7
		return
	case *durationpb.Duration:
		v.Seconds = 90
		return
	}
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString("key").MapKey(), protoreflect.ValueOfString("value"))
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).List().AppendMutable().Message())
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f))
		case f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).Message())
		default:
			m.Set(f, scalar(f))
		}
	}
}

func scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("the " + string(f.Name()))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(f.Enum().Values().Len() - 1))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(1<<62 + uint64(f.Number()))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(1.5 + float64(f.Number()))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(1<<31 + uint32(f.Number()))
	}
	panic("no value for a field of kind " + f.Kind().String())
}

// filled answers each method with one filled message.
func filled(_ context.Context, method protoreflect.MethodDescriptor, _ proto.Message) ([]proto.Message, error) {
	m := newMessage(method.Output())
	fill(m.ProtoReflect())
	return []proto.Message{m}, nil
}

func (f *fake) start(t *testing.T, l net.Listener, options ...grpc.ServerOption) *grpc.Server {
	t.Helper()
	server := grpc.NewServer(append(options, grpc.UnknownServiceHandler(f.handle))...)
	done := make(chan struct{})
	go func() { // ends with Stop
		defer close(done)
		_ = server.Serve(l) // the error of a listener that was closed
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	return server
}

// dialFake is a client of f over memory.
func dialFake(t *testing.T, f *fake, o Options) (*Client, *grpc.Server) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := f.start(t, l)
	o.Dialer = l.DialContext
	return dialed(t, "unix:///the/daemon", o), server
}

func dialed(t *testing.T, address string, o Options) *Client {
	t.Helper()
	c, err := Dial(t.Context(), address, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // may be closed by the test
	return c
}

// calls are all methods of the API, by their names in control.proto.
func calls(c *Client) map[string]any {
	return map[string]any{
		"Pools.Create": c.Pools.Create, "Pools.List": c.Pools.List, "Pools.Get": c.Pools.Get, "Pools.Grow": c.Pools.Grow,
		"Pools.AddDevice": c.Pools.AddDevice, "Pools.Scan": c.Pools.Scan, "Pools.Open": c.Pools.Open, "Pools.Close": c.Pools.Close,
		"Pools.Scrub": c.Pools.Scrub, "Pools.StopScrub": c.Pools.StopScrub, "Pools.Destroy": c.Pools.Destroy,
		"Volumes.Create": c.Volumes.Create, "Volumes.List": c.Volumes.List, "Volumes.Get": c.Volumes.Get,
		"Volumes.Resize": c.Volumes.Resize, "Volumes.Delete": c.Volumes.Delete, "Volumes.Clone": c.Volumes.Clone,
		"Volumes.Map": c.Volumes.Map, "Volumes.Changes": c.Volumes.Changes, "Volumes.SetLabels": c.Volumes.SetLabels,
		"Snapshots.Create": c.Snapshots.Create, "Snapshots.List": c.Snapshots.List, "Snapshots.Revert": c.Snapshots.Revert,
		"Snapshots.Delete": c.Snapshots.Delete, "Snapshots.CreateGroup": c.Snapshots.CreateGroup, "Volumes.SetLimits": c.Volumes.SetLimits,
		"Devices.Attach": c.Devices.Attach, "Devices.Detach": c.Devices.Detach, "Devices.List": c.Devices.List, "Observe.Stats": c.Observe.Stats,
		"Jobs.List": c.Jobs.List, "Jobs.Watch": c.Jobs.Watch,
		"Events.Watch": c.Events.Watch,
		"Node.Info":    c.Node.Info, "Node.Health": c.Node.Health,
	}
}

func methods() map[string]protoreflect.MethodDescriptor {
	all := make(map[string]protoreflect.MethodDescriptor)
	services := controlpb.File_control_controlpb_control_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			m := services.Get(i).Methods().Get(j)
			all[string(services.Get(i).Name()+"."+m.Name())] = m
		}
	}
	return all
}

func TestEveryCallCarriesAllFieldsBothWays(t *testing.T) {
	f := &fake{answer: filled}
	c, _ := dialFake(t, f, Options{Timeout: time.Minute})
	all := calls(c)
	if len(all) != len(methods()) {
		t.Errorf("%d methods are called, the API has %d", len(all), len(methods()))
	}
	for name, method := range methods() {
		request, want := newMessage(method.Input()), newMessage(method.Output())
		fill(request.ProtoReflect())
		fill(want.ProtoReflect())
		got, err := call(t.Context(), all[name], request)
		if err != nil || len(got) != 1 || !proto.Equal(got[0], want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, want)
		}
		if received := f.requests[len(f.requests)-1]; !proto.Equal(received, request) {
			t.Errorf("%s: the server has %v, want %v", name, received, request)
		}
	}
}

// TestFieldsFollowTheRules holds control.proto to the rules in its head.
func TestFieldsFollowTheRules(t *testing.T) {
	messages := controlpb.File_control_controlpb_control_proto.Messages()
	for i := range messages.Len() {
		for j := range messages.Get(i).Fields().Len() {
			f := messages.Get(i).Fields().Get(j)
			name := string(f.Name())
			counts := strings.HasSuffix(name, "_count") || slices.Contains([]string{"damaged_blocks", "sequence", "after", "iops", "count", "counts", "errors", "bytes", "merges", "turns", "enters"}, name)
			if f.Kind() == protoreflect.Uint64Kind && !counts && !strings.HasSuffix(name, "_bytes") && !strings.HasSuffix(name, "_ns") {
				t.Errorf("%s is a 64-bit number and neither bytes nor nanoseconds nor a count", f.FullName())
			}
		}
	}
}

func TestErrorsReachTheCallerWithReasonNameAndRemedy(t *testing.T) {
	f := new(fake)
	c, _ := dialFake(t, f, Options{})
	for reason := ErrNotFound; reason < ErrPrecondition; reason++ {
		sent := Errorf(reason, "volume", "vm1", "")
		f.answer = func(context.Context, protoreflect.MethodDescriptor, proto.Message) ([]proto.Message, error) {
			return nil, sent
		}
		for name, method := range map[string]any{"call": c.Volumes.Get, "stream": c.Volumes.Changes} {
			request := proto.Message(&controlpb.GetVolumeRequest{})
			if name == "stream" {
				request = &controlpb.ChangesRequest{}
			}
			_, err := call(t.Context(), method, request)
			var e *Error
			if !errors.As(err, &e) || !errors.Is(err, reason) || e.Kind != "volume" || e.Name != "vm1" || e.Message != sent.Message || e.Remedy != sent.Remedy {
				t.Errorf("%s, %v: got %#v, want %#v", name, reason, err, sent)
			}
			if !strings.Contains(err.Error(), "vm1") {
				t.Errorf("%v: no name in %q", reason, err)
			}
		}
	}
}

func TestDeadline(t *testing.T) {
	released := make(chan struct{})
	f := &fake{answer: func(ctx context.Context, _ protoreflect.MethodDescriptor, _ proto.Message) ([]proto.Message, error) {
		select {
		case <-ctx.Done():
		case <-released:
		}
		return nil, status.FromContextError(ctx.Err()).Err()
	}}
	c, _ := dialFake(t, f, Options{Timeout: 20 * time.Millisecond})
	defer close(released)
	_, err := c.Pools.List(t.Context(), nil)
	if !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "unix:///the/daemon") {
		t.Errorf("the timeout of the client: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := c.Pools.List(ctx, nil); !errors.Is(err, ErrTimeout) {
		t.Errorf("the deadline of the context: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	stream, err := c.Events.Watch(ctx, new(controlpb.WatchEventsRequest))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := stream.Recv(); !errors.Is(err, ErrCanceled) || !errors.Is(err, context.Canceled) {
		t.Errorf("a canceled stream: %v", err)
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close() // leaves the socket behind
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = tcp.Close() // nobody listens there now
	for _, tt := range []struct {
		address string
		o       Options
		want    string
	}{
		{"unix://" + filepath.Join(dir, "none.sock"), Options{}, "is `ashlar serve` running? (--server / ASHLAR_SERVER)"},
		{"unix:" + stale, Options{}, "is `ashlar serve` running? (--server / ASHLAR_SERVER)"},
		{tcp.Addr().String(), Options{TLS: new(tls.Config)}, "is `ashlar serve` running? (--server / ASHLAR_SERVER)"},
		{"unix:///denied", Options{Dialer: func(context.Context) (net.Conn, error) { return nil, os.ErrPermission }}, "permission denied; use a user who may open the socket"},
		{"unix:///broken", Options{Dialer: func(context.Context) (net.Conn, error) { return nil, errors.New("it rains") }}, "it rains; is `ashlar serve` running?"},
	} {
		_, err := Dial(t.Context(), tt.address, tt.o)
		if !errors.Is(err, ErrUnavailable) || !strings.HasPrefix(err.Error(), "cannot reach the daemon at "+tt.address+": ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.address, err, tt.want)
		}
	}
}

func TestDialGivesUpInTime(t *testing.T) {
	block := func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	if _, err := Dial(t.Context(), "unix:///slow", Options{Timeout: 10 * time.Millisecond, Dialer: block}); !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "unix:///slow") {
		t.Errorf("%v", err)
	}
}

func TestDaemonThatGoes(t *testing.T) {
	began := make(chan struct{}, 1)
	f := &fake{answer: func(ctx context.Context, _ protoreflect.MethodDescriptor, _ proto.Message) ([]proto.Message, error) {
		began <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := f.start(t, l)
	c := dialed(t, "unix://"+path, Options{})
	go func() { <-began; server.Stop() }() // ends with the call below
	if _, err = c.Pools.List(t.Context(), nil); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "the daemon at unix://"+path) {
		t.Errorf("during a call: %v", err)
	}
	if _, err = c.Pools.List(t.Context(), nil); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "cannot reach the daemon at unix://"+path+": is `ashlar serve` running?") {
		t.Errorf("after it: %v", err)
	}

	// A daemon that comes back is found again.
	f.mu.Lock()
	f.answer = filled
	f.mu.Unlock()
	if l, err = net.Listen("unix", path); err != nil {
		t.Fatal(err)
	}
	f.start(t, l)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err = c.Pools.List(t.Context(), nil); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it came back: %v", err)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, tt := range []struct{ address, network, target string }{
		{"unix:///run/a.sock", "unix", "/run/a.sock"},
		{"unix:/run/a.sock", "unix", "/run/a.sock"},
		{"/run/a.sock", "unix", "/run/a.sock"},
		{"host:1", "tcp", "host:1"},
		{"[::1]:1", "tcp", "[::1]:1"},
		{"", "", ""}, {"unix:a.sock", "", ""}, {"unix://", "", ""}, {"host", "", ""}, {":1", "", ""}, {"host:", "", ""}, {"http://host", "", ""},
	} {
		network, target, err := ParseAddress(tt.address)
		if network != tt.network || target != tt.target || (err == nil) != (tt.network != "") || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %q %q %v", tt.address, network, target, err)
		}
	}
	for address, o := range map[string]Options{"host:1": {}, "unix:///a": {TLS: new(tls.Config)}, "": {}} {
		if _, err := Dial(t.Context(), address, o); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestWaitJob(t *testing.T) {
	job := func(s controlpb.JobState, done uint64) proto.Message {
		return &controlpb.Job{Id: "7", State: s, DoneBytes: done, Error: map[bool]string{true: "no luck"}[s == controlpb.JobState_JOB_STATE_FAILED]}
	}
	running, finished, failed := job(controlpb.JobState_JOB_STATE_RUNNING, 1), job(controlpb.JobState_JOB_STATE_DONE, 9), job(controlpb.JobState_JOB_STATE_FAILED, 3)
	for _, tt := range []struct {
		name    string
		answers []proto.Message
		err     error
		want    string
	}{
		{"ends well", []proto.Message{running, finished}, nil, ""},
		{"fails", []proto.Message{running, failed}, nil, "job 7 failed: no luck"},
		{"the stream ends too early", []proto.Message{running}, nil, "before the job ended"},
		{"there is none", nil, nil, "before the job ended"},
		{"unknown", nil, Errorf(ErrNotFound, "job", "7", ""), "job 7: not found; `ashlar job list` shows what there is"},
	} {
		f := &fake{answer: func(context.Context, protoreflect.MethodDescriptor, proto.Message) ([]proto.Message, error) {
			return tt.answers, tt.err
		}}
		c, _ := dialFake(t, f, Options{})
		seen := 0
		_, err := c.WaitJob(t.Context(), "7", func(j *controlpb.Job) {
			if !proto.Equal(j, tt.answers[seen]) {
				t.Errorf("%s: saw %v", tt.name, j)
			}
			seen++
		})
		if seen != len(tt.answers) || (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %d states, %v; want %q", tt.name, seen, err, tt.want)
		}
	}
}

// call runs a method of a service, with or without a stream.
func call(ctx context.Context, method any, request proto.Message) ([]proto.Message, error) {
	in := []reflect.Value{reflect.ValueOf(ctx), reflect.ValueOf(request)}
	out := reflect.ValueOf(method).Call(in)
	if err, _ := out[1].Interface().(error); err != nil {
		return nil, err
	}
	if m, ok := out[0].Interface().(proto.Message); ok {
		return []proto.Message{m}, nil
	}
	var all []proto.Message
	for {
		next := out[0].MethodByName("Recv").Call(nil)
		if err, _ := next[1].Interface().(error); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return all, err
		}
		all = append(all, next[0].Interface().(proto.Message))
	}
}

func TestMutualTLS(t *testing.T) {
	ours, theirs := authority.New(t, t.TempDir()), authority.New(t, t.TempDir())
	server, err := tls.LoadX509KeyPair(ours.Issue(t, "server", "127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	cert, key := ours.Issue(t, "client")
	clients, err := LoadTLS(cert, key, ours.File, "")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{answer: filled}
	f.start(t, l, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{server}, ClientCAs: clients.RootCAs, ClientAuth: tls.RequireAndVerifyClientCert})))
	load := func(a *authority.Authority, ca, name string) *tls.Config {
		t.Helper()
		cert, key := a.Issue(t, "client")
		config, err := LoadTLS(cert, key, ca, name)
		if err != nil {
			t.Fatal(err)
		}
		return config
	}
	c := dialed(t, l.Addr().String(), Options{TLS: clients})
	if _, err := c.Node.Info(t.Context(), nil); err != nil {
		t.Errorf("with a certificate: %v", err)
	}
	for _, tt := range []struct {
		name   string
		config *tls.Config
		want   string
	}{
		{"a certificate of another authority", load(theirs, ours.File, ""), "the daemon at " + l.Addr().String()},
		{"a daemon of another authority", load(ours, theirs.File, ""), "authentication handshake failed: tls: failed to verify certificate"},
		{"a daemon of another name", load(ours, ours.File, "elsewhere"), "elsewhere"},
	} {
		c, err := Dial(t.Context(), l.Addr().String(), Options{TLS: tt.config})
		if err == nil {
			_, err = c.Node.Info(t.Context(), nil) // with TLS 1.3 the server looks at the certificate after the client is done
			_ = c.Close()                          // unused
		}
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	for _, tt := range []struct{ cert, key, ca, want string }{
		{"none", key, ours.File, "none"},
		{cert, key, "none", "none"},
		{cert, key, key, "no certificate"},
	} {
		if _, err := LoadTLS(tt.cert, tt.key, tt.ca, ""); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v", tt, err)
		}
	}
}
