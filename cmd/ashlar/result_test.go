package main

import (
	"bytes"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

func TestHumane(t *testing.T) {
	for bytes, want := range map[uint64]string{
		0: "0B", 1: "1B", 1023: "1023B", 1024: "1KiB", 1025: "1.0KiB", 1536: "1.5KiB", 1<<20 - 1: "1023.9KiB", 1 << 20: "1MiB",
		3 << 29: "1.5GiB", 123456789012: "114.9GiB", 5 << 40: "5TiB", 1<<63 + 1: "8.0EiB", 1<<64 - 1: "15.9EiB",
	} {
		if got := humane(bytes); got != want {
			t.Errorf("humane(%d) = %s, want %s", bytes, got, want)
		}
	}
}

func TestJSONOfMessages(t *testing.T) {
	for _, tt := range []struct {
		got, want string
	}{
		{line(t, &controlpb.HealthResponse{State: 99}), `{"state":"99","reasons":[]}`},
		{line(t, &controlpb.HealthResponse{State: controlpb.HealthState_HEALTH_STATE_DEGRADED, Reasons: []string{"a < b"}}), `{"state":"degraded","reasons":["a < b"]}`},
		{
			line(t, &controlpb.WatchJobRequest{Interval: durationpb.New(1500 * time.Millisecond)}),
			`{"id":"","interval":1.5}`,
		},
		{line(t, &controlpb.WatchJobRequest{}), `{"id":"","interval":null}`},
		{line(t, &controlpb.SetLabelsRequest{Labels: map[string]string{"b": "1", "a": "2"}}), `{"pool":"","name":"","labels":{"a":"2","b":"1"}}`},
		{line(t, &controlpb.Journal{SizeBytes: 1<<64 - 1}), `{"size_bytes":18446744073709551615,"used_bytes":0,"group_count":0}`},
	} {
		if tt.got != tt.want+"\n" {
			t.Errorf("got %s, want %s", tt.got, tt.want)
		}
	}
}

func line(t *testing.T, m proto.Message) string {

	t.Helper()
	var b bytes.Buffer
	if err := writeJSONLine(&b, m); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
