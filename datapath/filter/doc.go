// Package filter holds devices made of another device: each takes a
// [datapath.Device] and is one, so they stack in any order.
//
//   - [Stats] counts and times requests, as a whole and by stage; what takes long it
//     hands to [SlowRequests].
//   - [Limit] holds requests back to a rate (quality of service).
//   - [Delay] makes a device slow.
//   - [Fault] makes a device fail, by rules.
//   - [Trace] remembers the last requests.
//
// The way of one request: Submit of the filter's queue, which is one reactor's
// like every queue, passes the very same Request to the queue below. A filter
// that wants to see the end of it puts its own function into Request.Done, keeps
// the old one in the slot of Request.Tag, and puts it back before it completes
// the request upwards. So a stack of filters costs no copies and, as slots are
// made when the queue opens, no allocations.
//
// Invariants: a filter neither reorders what it does not hold back, nor answers
// inside Submit; its queue closes the queue below, its device the device below.
package filter
