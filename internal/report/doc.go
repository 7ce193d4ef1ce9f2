// Package report turns two samples of a daemon's counts into what happened between
// them, and says where the time of requests went and why.
//
// [Between] subtracts two answers of Observe.Stats. [Explain] takes one volume of the
// result: it lays the stages of its requests on one way, divides the stage of the
// device by what the kernel saw of the disks, and asks the rules of this package
// which of them accounts for most of the time.
//
// Nothing here does I/O, looks at a clock or keeps state: the same two samples give
// the same report. Samples come from outside, so whatever they hold is taken without
// a panic; what makes no sense counts as nothing.
//
// Durations are nanoseconds where a name ends in NS, shares are parts of 1. The JSON
// form of the exported types is what `ashlar why` and `ashlar top --once` print: names
// are added, never changed.
package report
