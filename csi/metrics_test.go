package csi

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// Dashboard, alerts and docs/metrics.md name it.
func TestMetricsAreAsDocumented(t *testing.T) {
	m := newMetrics()
	m.observe("NodeStageVolume", codes.Internal, 3*time.Second)
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.seconds)
	families, err := registry.Gather()
	if err != nil || len(families) != 1 {
		t.Fatalf("%v, %v", families, err)
	}
	labels := map[string]string{}
	metric := families[0].GetMetric()[0]
	for _, l := range metric.GetLabel() {
		labels[l.GetName()] = l.GetValue()
	}
	if families[0].GetName() != "csi_call_seconds" || len(labels) != 2 || labels["method"] != "NodeStageVolume" || labels["code"] != "Internal" || metric.GetHistogram().GetSampleCount() != 1 {
		t.Errorf("%v", families[0])
	}
	if s := MetricsSection(); !strings.Contains(s, "| `csi_call_seconds` | histogram | method, code | Duration of calls, by method and gRPC code |\n") {
		t.Error(s)
	}
}
