package fuse

import (
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// TestTheBoundOfQueuesIsNamed: who asks for too many is told how many there can be.
func TestTheBoundOfQueuesIsNamed(t *testing.T) {
	for queues, want := range map[int]string{4: "4 queues: at most one for each reactor, of which there are 2", 65: "at most 64", -1: "-1 queues"} {
		c := Config{Device: struct{ datapath.Device }{}, Reactors: make([]*reactor.Reactor, 2), Name: "x", Dir: "/x", Loop: AnyLoop, Queues: queues}
		if err := c.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d queues: %v, want %q", queues, err, want)
		}
	}
}
