package reactor

import "fmt"

// PollMode says what a reactor does when it has no work.
type PollMode string

// The modes.
const (
	PollAuto PollMode = "auto" // spin for a learned budget, then sleep
	PollBusy PollMode = "busy" // never sleep; for pinned reactors
	PollOff  PollMode = "off"  // sleep at once
)

const (
	// spinMax bounds the budget: above the p99 of one 4 KiB NVMe read. Waiting
	// longer than that for a device, sleeping is cheaper and no slower.
	spinMax = 50_000
	// spinRest is the mean sleep up to which it is tried to spin for clients: a
	// budget, and the wake-up that a sleep contains and a spin does not (25 µs
	// between two CPUs of a virtual machine).
	spinRest = 75_000
	// spinHitMin is the mean time to a spin's find below which requests come in a
	// stream. A sleep gathers them; a spin would take each as it comes, at twice the
	// cost (4 KiB writes at depth 32: 8.4 µs of CPU each spinning, 4.9 sleeping). It
	// is well below what a client takes from a reply to its next request.
	spinHitMin = 6_000
	// spinMissesMax is how many spins in a row may end empty before spinning stops.
	spinMissesMax = 4
	// napMax is the longest sleep that the Go scheduler is not told of.
	napMax = 1_000_000
	// spinRetry is how many sleeps pass before it is tried again.
	spinRetry = 256
)

// idlePolicy decides how long to spin. It is owned by one reactor.
//
// It learns the service time of the device and the length of its own sleeps.
// Spinning pays when what the reactor waits for comes sooner than a sleep and a
// wake-up take: a fast device, or, with nothing at the device, a client that has
// been answering that fast. Spins that end empty stop it for a while, and so do spins
// that end at once.
type idlePolicy struct {
	mode    PollMode
	service int64 // mean service time in nanoseconds, exponentially weighted; 0 unknown
	misses  int
	resting int   // sleeps left before spinning is tried again
	rest    int64 // mean length of a sleep in nanoseconds, exponentially weighted
	hit     int64 // mean time to the find of a spin in nanoseconds, exponentially weighted

	observed int64 // service time that others measured, in nanoseconds; 0: none
}

// serviceTime is what the budget is made of.
func (p *idlePolicy) serviceTime() int64 {
	if p.observed > 0 {
		return p.observed
	}
	return p.service
}

func newIdlePolicy(mode PollMode) (idlePolicy, error) {
	switch mode {
	case PollAuto, PollBusy, PollOff:
		return idlePolicy{mode: mode, rest: 4 * napMax, hit: spinMax}, nil
	}
	return idlePolicy{}, fmt.Errorf("unknown poll mode %q (auto, busy, off)", mode)
}

// slept learns from one sleep.
func (p *idlePolicy) slept(nanoseconds int64) {
	p.rest += (min(nanoseconds, 4*napMax) - p.rest) / 8
}

// nap is for how long to sleep at first where sleeps have been short: such a
// sleep is cheaper, see uring.Ring.Nap. 0: sleep for as long as it takes.
func (p *idlePolicy) nap() int64 {
	if p.rest < napMax/4 {
		return napMax
	}
	return 0
}

// served learns from one operation of a device.
func (p *idlePolicy) served(nanoseconds int64) {
	if p.service == 0 {
		p.service = nanoseconds
		return
	}
	p.service += (nanoseconds - p.service) / 16
}

// budget is for how many nanoseconds to look before sleeping.
func (p *idlePolicy) budget(deviceBusy bool) int64 {
	switch p.mode {
	case PollBusy:
		return 1_000_000 // then look at the clock and the stop flag again
	case PollOff:
		return 0
	}
	want := int64(0)
	service := p.serviceTime()
	switch {
	case deviceBusy && service > 0 && service <= spinMax:
		want = min(2*service, spinMax)
	case !deviceBusy && p.rest <= spinRest:
		want = spinMax
	}
	if want > 0 && p.resting > 0 {
		p.resting--
		return 0
	}
	return want
}

// spinHit learns from a spin that found work after so many nanoseconds.
func (p *idlePolicy) spinHit(nanoseconds int64) {
	p.misses = 0
	if p.hit += (nanoseconds - p.hit) / 16; p.hit < spinHitMin {
		p.hit, p.resting = spinMax, spinRetry
	}
}

func (p *idlePolicy) spinMissed() {
	if p.misses++; p.misses >= spinMissesMax {
		p.misses, p.resting = 0, spinRetry
	}
}
