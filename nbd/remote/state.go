package remote

import "time"

// Condition is whether the device can do anything.
type Condition string

// The conditions.
const (
	Online  Condition = "online"  // requests go to the server
	Waiting Condition = "waiting" // the server is away; requests wait
	Failed  Condition = "failed"  // requests end with StatusIO
)

// State is the device's condition and how it came to it.
type State struct {
	Condition   Condition
	Reason      string // why it is not online; of a device that is, ""
	Since       time.Time
	Connections int    // that serve requests
	Reconnects  uint64 // sessions since the first
}

// State is how the device does now. Any goroutine.
func (d *Device) State() State { return *d.state.Load() }

// setState makes a change of state visible and says it once in the log.
func (c *core) setState(condition Condition, reason string) {
	s := State{Condition: condition, Reason: reason, Since: time.Now(), Connections: len(c.links), Reconnects: c.sessions - min(c.sessions, 1)}
	from := Condition("opening")
	if old := c.device.state.Load(); old != nil {
		from = old.Condition
		if from == condition {
			s.Since = old.Since
		}
	}
	c.device.state.Store(&s)
	if from == condition {
		return
	}
	attributes := []any{"from", from, "to", condition, "connections", len(c.links), "waiting", c.unended}
	if condition == Online {
		c.device.log.Info("remote state", attributes...)
		return
	}
	c.device.log.Warn("remote state", append(attributes, "reason", reason)...)
}
