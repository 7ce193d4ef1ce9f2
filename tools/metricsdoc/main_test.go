package main

import (
	"os"
	"testing"
)

func TestMetricsPageIsGeneratedAnew(t *testing.T) {
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != document() {
		t.Error("docs/metrics.md is not what the daemon and the driver register: run `make generate`")
	}
}
