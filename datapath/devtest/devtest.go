package devtest

import (
	"fmt"
	"log/slog"
	"math"
	"os"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// SizeMin is the smallest device the suite works on, in bytes.
const SizeMin = 4 << 20

// Options say what the suite may expect beyond what Info tells, and what it may
// do to a device.
type Options struct {
	// Engines are those to run on; both when empty.
	Engines []reactor.EngineKind

	// Forgets: the device keeps nothing and always reads as zeros; contents are
	// not compared.
	Forgets bool
	// DiscardZeroes: discarded ranges read as zeros.
	DiscardZeroes bool

	// ReadOnly makes the same kind of device, read-only; nil: there is none.
	ReadOnly func(t *testing.T) datapath.Device
	// Resize changes the size of a device from open; nil: it cannot.
	Resize func(d datapath.Device, size uint64) error
	// Crash closes d as a loss of power would, losing everything that is not
	// durable, and opens what is left; nil: it cannot. Its queues are closed.
	Crash func(t *testing.T, d datapath.Device) datapath.Device
}

// test is one test of the suite.
type test struct {
	name string
	run  func(g *rig)
}

var tests = []test{
	{"InfoIsSane", testInfo},
	{"RequestEndsOnceOnItsReactorOutsideSubmit", testEndsOnce},
	{"FieldsOfRequestsAreRestored", testFieldsRestored},
	{"RequestIsReusedInsideDone", testReusedInsideDone},
	{"FullDepthOfEveryOperation", testFullDepth},
	{"BuffersOfAnyMemoryServe", testBufferKinds},
	{"BuffersAreNotKept", testBuffersNotKept},
	{"BuffersAreNotTouchedAfterDone", testBuffersNotTouched},
	{"LentMemoryHoldsTheData", testLend},
	{"ImmediateWritesHaveTakenTheirData", testImmediate},
	{"BoundsAreAnsweredByValidate", testBounds},
	{"EdgesOfTheDeviceServe", testEdges},
	{"UnknownOperationsAreNotSupported", testUnsupported},
	{"FlushCoversWritesOfOtherQueues", testFlushCovers},
	{"FUACoversItsOwnWrite", testFUA},
	{"LargeRequests", testLarge},
	{"UnalignedNeighboursKeepTheirBytes", testNeighbours},
	{"WriteZeroesReadsAsZeros", testWriteZeroes},
	{"DiscardKeepsItsNeighbours", testDiscard},
	{"ExtentsCoverAndAgreeWithContent", testExtents},
	{"RandomLoadAgreesWithModel", testRandomLoad},
	{"OverlapsHaveOneOrderPerBlock", testOverlaps},
	{"ReadOnlyRefusesChanges", testReadOnly},
	{"ResizeIsVisible", testResize},
	{"QueuesOpenAndCloseAgain", testQueueCycles},
	{"ManyQueuesOnManyReactors", testManyQueues},
	{"RequestsAllocateNothing", testAllocations},
}

// Run runs the suite. open makes a fresh device of at least SizeMin bytes for
// each test; the suite closes it.
func Run(t *testing.T, open func(t *testing.T) datapath.Device, options ...Options) {
	t.Helper()
	var o Options
	if len(options) > 0 {
		o = options[0]
	}
	if len(o.Engines) == 0 {
		o.Engines = []reactor.EngineKind{reactor.EngineRing, reactor.EngineEpoll}
	}
	for _, engine := range o.Engines {
		t.Run(string(engine), func(t *testing.T) {
			if engine == reactor.EngineRing {
				testenv.RequireIOURing(t)
			}
			running := goleak.IgnoreCurrent()
			defer goleak.VerifyNone(t, running)
			testenv.CheckFDs(t)
			reactors := startReactors(t, engine, reactorCount)
			defer stopReactors(reactors)
			for _, test := range tests {
				t.Run(test.name, func(t *testing.T) {
					g := newRig(t, &o, open, reactors)
					defer g.close()
					test.run(g)
				})
			}
		})
	}
}

const reactorCount = 3 // more than two, so that two others can overlap with one

func startReactors(t testing.TB, engine reactor.EngineKind, count int) []*reactor.Reactor {
	t.Helper()
	var reactors []*reactor.Reactor
	for i := range count {
		r, err := reactor.Start(reactor.Config{
			Name: fmt.Sprintf("devtest %d", i), Engine: engine, Workers: 8,
			Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			stopReactors(reactors)
			t.Fatal(err)
		}
		reactors = append(reactors, r)
	}
	return reactors
}

func stopReactors(reactors []*reactor.Reactor) {
	for _, r := range reactors {
		r.Stop()
	}
}

// Seed is the seed of a random test: from ASHLAR_TEST_SEED, else from the clock.
// It is logged, which shows when the test fails.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano()) % math.MaxUint32
	if text := os.Getenv("ASHLAR_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("ASHLAR_TEST_SEED: %v", err)
		}
	}
	t.Logf("ASHLAR_TEST_SEED=%d", seed)
	return seed
}
