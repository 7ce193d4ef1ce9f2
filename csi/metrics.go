package csi

import (
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// metrics count the calls of a driver.
type metrics struct {
	seconds *prometheus.HistogramVec
}

var (
	callSeconds = prometheus.HistogramOpts{
		Name: "csi_call_seconds", Help: "Duration of calls, by method and gRPC code.",
		Buckets: prometheus.ExponentialBuckets(0.001, 4, 9), // to 65 s: mkfs of a large volume
	}
	callLabels = []string{"method", "code"}
)

func newMetrics() *metrics {
	return &metrics{seconds: prometheus.NewHistogramVec(callSeconds, callLabels)}
}

// MetricsSection is the section of docs/metrics.md about the driver.
func MetricsSection() string {
	return fmt.Sprintf("## The CSI driver (`csi`)\n\n`ashlar csi --metrics 127.0.0.1:9122` answers `/metrics`, and `/healthz` as long as the process lives.\n\n"+
		"| name | type | labels | |\n|---|---|---|---|\n| `%s` | histogram | %s | %s |\n", callSeconds.Name, strings.Join(callLabels, ", "), strings.TrimSuffix(callSeconds.Help, "."))
}

func (m *metrics) observe(method string, code codes.Code, took time.Duration) {
	m.seconds.WithLabelValues(method, code.String()).Observe(took.Seconds())
}

// Metrics counts the calls of the driver, for a registry.
func (d *Driver) Metrics() prometheus.Collector { return d.metrics.seconds }
