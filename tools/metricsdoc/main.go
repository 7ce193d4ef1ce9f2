// Metricsdoc writes the page of the metrics of the daemon and the CSI driver: metricsdoc FILE.
package main

import (
	"fmt"
	"os"

	"github.com/ashlar-storage/ashlar/csi"
	"github.com/ashlar-storage/ashlar/internal/daemon"
)

// document is docs/metrics.md.
func document() string { return daemon.MetricsDocument(csi.MetricsSection()) }

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: metricsdoc FILE")
		os.Exit(2)
	}
	if err := os.WriteFile(os.Args[1], []byte(document()), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "metricsdoc:", err)
		os.Exit(1)
	}
}
