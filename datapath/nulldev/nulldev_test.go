package nulldev

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
)

func TestConformance(t *testing.T) {
	devtest.Run(t, func(*testing.T) datapath.Device { return New(1<<40 + 4096) },
		devtest.Options{Forgets: true, DiscardZeroes: true})
}
