package csi

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// metrics count the calls of a driver.
type metrics struct {
	seconds *prometheus.HistogramVec
}

func newMetrics() *metrics {
	return &metrics{seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "csi_call_seconds", Help: "Duration of calls, by method and gRPC code.",
		Buckets: prometheus.ExponentialBuckets(0.001, 4, 9), // to 65 s: mkfs of a large volume
	}, []string{"method", "code"})}
}

func (m *metrics) observe(method string, code codes.Code, took time.Duration) {
	m.seconds.WithLabelValues(method, code.String()).Observe(took.Seconds())
}

// Metrics counts the calls of the driver, for a registry.
func (d *Driver) Metrics() prometheus.Collector { return d.metrics.seconds }
