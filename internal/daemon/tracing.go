package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
)

// tracingPatience is how long the last spans have to leave when the daemon ends: a
// collector that is away must not hold it up.
const tracingPatience = 2 * time.Second

// tracing sends spans of control operations, and of slow requests, to an
// OpenTelemetry collector. nil is off, and free.
type tracing struct {
	provider *sdktrace.TracerProvider
}

// tracingVariables are those of OpenTelemetry that name a collector.
var tracingVariables = []string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"}

// startTracing sends spans to endpoint, HOST:PORT or an http(s) URL, by OTLP over
// gRPC; "": to where the variables of OpenTelemetry say; nil when nothing does. The
// collector need not be there.
func startTracing(ctx context.Context, endpoint, version string, log *slog.Logger) (*tracing, error) {
	named := endpoint != ""
	for _, variable := range tracingVariables {
		named = named || os.Getenv(variable) != ""
	}
	if !named || os.Getenv("OTEL_SDK_DISABLED") == "true" {
		return nil, nil
	}
	var options []otlptracegrpc.Option
	if endpoint != "" {
		where, err := endpointURL(endpoint)
		if err != nil {
			return nil, err
		}
		options = append(options, otlptracegrpc.WithEndpointURL(where))
	}
	exporter, err := otlptracegrpc.New(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	described, err := resource.New(ctx, resource.WithAttributes(attribute.String("service.name", "ashlar"), attribute.String("service.version", version)),
		resource.WithHost(), resource.WithFromEnv())
	if err != nil {
		log.Warn("tracing: some attributes of this process are not known", "error", err)
	}
	// Spans that do not leave are a matter of the collector: one line, and no more.
	return &tracing{sdktrace.NewTracerProvider(sdktrace.WithBatcher(&telling{SpanExporter: exporter, log: log}), sdktrace.WithResource(described))}, nil
}

// endpointURL is the URL of a collector given as HOST:PORT or as a URL.
func endpointURL(endpoint string) (string, error) {
	where := endpoint
	if !strings.Contains(where, "://") {
		where = "http://" + where
	}
	u, err := url.Parse(where)
	if err != nil || u.Host == "" || u.Port() == "" || u.Scheme != "http" && u.Scheme != "https" {
		return "", fmt.Errorf("tracing: %q is no address of a collector: give HOST:PORT, http://HOST:PORT, or https://HOST:PORT with TLS", endpoint)
	}
	return where, nil
}

// serverOptions have a gRPC server trace its calls.
func (t *tracing) serverOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagation.TraceContext{})))}
}

// tracer makes spans of this daemon's own; nil: none.
func (t *tracing) tracer() trace.Tracer {
	if t == nil {
		return nil
	}
	return t.provider.Tracer("github.com/ashlar-storage/ashlar/internal/daemon")
}

// stop sends what is left, within tracingPatience.
func (t *tracing) stop() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), tracingPatience)
	defer cancel()
	_ = t.provider.Shutdown(ctx) // told by the exporter
}

// telling is an exporter that logs when spans stop leaving, and when they leave
// again.
type telling struct {
	sdktrace.SpanExporter
	log    *slog.Logger
	failed bool // owned by the one goroutine that exports
}

// ExportSpans implements sdktrace.SpanExporter.
func (e *telling) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	switch {
	case err != nil && !e.failed && !errors.Is(err, context.Canceled):
		e.log.Warn("tracing: spans are lost, since the collector does not take them", "error", err)
		e.failed = true
	case err == nil && e.failed:
		e.log.Info("tracing: the collector takes spans again")
		e.failed = false
	}
	return nil // the SDK would write to stderr
}
