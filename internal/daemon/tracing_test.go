package daemon

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// spanCollector is an OpenTelemetry collector that keeps what it gets.
type spanCollector struct {
	collector.UnimplementedTraceServiceServer

	mu     sync.Mutex
	spans  map[string]*tracepb.Span // by name
	refuse bool
}

func (c *spanCollector) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse {
		return nil, status.Error(codes.PermissionDenied, "not today")
	}
	for _, resource := range r.GetResourceSpans() {
		service := ""
		for _, a := range resource.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				c.spans[service+": "+span.GetName()] = span
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func (c *spanCollector) span(name string) *tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.spans[name]
}

// startCollector serves a collector on loopback until the test ends.
func startCollector(t *testing.T) (c *spanCollector, address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c = &spanCollector{spans: map[string]*tracepb.Span{}}
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, c)
	done := make(chan struct{})
	go func() { // ends with Stop
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return c, l.Addr().String()
}

func TestControlOperationsAndSlowRequestsAreTraced(t *testing.T) {
	checkLeaks(t)
	c, address := startCollector(t)
	var log testenv.Output
	n := newNode(t, nil, func(c *ServeConfig) {
		c.OTLPEndpoint, c.SlowIO = address, time.Nanosecond
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	n.volume("data", mib)
	if _, err := n.client.Volumes.Get(t.Context(), &controlpb.GetVolumeRequest{Name: "none"}); err == nil {
		t.Error("a volume that is not there was found")
	}
	client := n.dial("data")
	if err := errors.Join(client.Write(t.Context(), make([]byte, 4096), 4096, 0), client.Close()); err != nil {
		t.Fatal(err)
	}
	n.stop() // which sends what is left
	created := c.span("ashlar: ashlar.control.v1.Volumes/Create")
	if created == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		t.Fatalf("no span of the creation among %v", c.spans)
	}
	if created.GetKind() != tracepb.Span_SPAN_KIND_SERVER || created.GetEndTimeUnixNano() <= created.GetStartTimeUnixNano() {
		t.Errorf("%v", created)
	}
	if failed := c.span("ashlar: ashlar.control.v1.Volumes/Get"); failed == nil {
		t.Error("no span of a call that failed")
	}
	slow := c.span("ashlar: request write")
	device := c.span("ashlar: device")
	if slow == nil || device == nil {
		t.Fatal("no spans of a slow request and its stages")
	}
	if !bytes.Equal(device.GetTraceId(), slow.GetTraceId()) || !bytes.Equal(device.GetParentSpanId(), slow.GetSpanId()) ||
		device.GetStartTimeUnixNano() < slow.GetStartTimeUnixNano() || device.GetEndTimeUnixNano() > slow.GetEndTimeUnixNano() {
		t.Errorf("the stage %v is not in the request %v", device, slow)
	}
	if !strings.Contains(log.String(), "trace_id="+hex.EncodeToString(slow.GetTraceId())) {
		t.Error("the trace id of the log is another")
	}
}

func TestTracingNamesItsCollectorByTheEnvironment(t *testing.T) {
	checkLeaks(t)
	c, address := startCollector(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+address)
	x, err := startTracing(t.Context(), "", "v", quiet())
	if err != nil {
		t.Fatal(err)
	}
	_, span := x.tracer().Start(t.Context(), "try")
	span.End()
	x.stop()
	if c.span("ashlar: try") == nil {
		t.Error("the span did not arrive")
	}
	t.Setenv("OTEL_SDK_DISABLED", "true")
	if off, err := startTracing(t.Context(), "", "v", quiet()); off != nil || err != nil {
		t.Errorf("disabled: %v, %v", off, err)
	}
}

func TestTracingIsOffUnlessACollectorIsNamed(t *testing.T) {
	for _, variable := range tracingVariables {
		t.Setenv(variable, "")
	}
	x, err := startTracing(t.Context(), "", "v", quiet())
	if x != nil || err != nil {
		t.Fatalf("%v, %v", x, err)
	}
	if len(x.serverOptions()) != 0 || x.tracer() != nil {
		t.Error("tracing that is off does something")
	}
	x.stop()
	for _, bad := range []string{"nowhere", "http://", "ftp://host:1", "host:1\x00", "http://host", ":"} {
		if _, err := startTracing(t.Context(), bad, "v", quiet()); err == nil || !strings.Contains(err.Error(), "give HOST:PORT") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestACollectorThatTakesNothingIsLoggedOnce(t *testing.T) {
	checkLeaks(t)
	c, address := startCollector(t)
	c.refuse = true
	var log testenv.Output
	x, err := startTracing(t.Context(), address, "v", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	try := func() {
		t.Helper()
		_, span := x.tracer().Start(t.Context(), "try")
		span.End()
		if err := x.provider.ForceFlush(t.Context()); err != nil {
			t.Error(err)
		}
	}
	try()
	try()
	c.mu.Lock()
	c.refuse = false
	c.mu.Unlock()
	try()
	x.stop()
	if lost, again := strings.Count(log.String(), "spans are lost"), strings.Count(log.String(), "takes spans again"); lost != 1 || again != 1 {
		t.Errorf("%d lines about lost spans, %d about their end:\n%s", lost, again, log.String())
	}
}
