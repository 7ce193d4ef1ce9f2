// Metricsdoc writes the page of the daemon's metrics: metricsdoc FILE.
package main

import (
	"fmt"
	"os"

	"github.com/ashlar-storage/ashlar/internal/daemon"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: metricsdoc FILE")
		os.Exit(2)
	}
	if err := os.WriteFile(os.Args[1], []byte(daemon.MetricsDocument()), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "metricsdoc:", err)
		os.Exit(1)
	}
}
