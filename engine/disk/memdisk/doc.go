// Package memdisk is a disk in memory that can lose power: the disk under a
// storage pool in tests.
//
// A [Disk] keeps what is durable apart from the log of every change since, with
// its data. Reads see the newest content. A request takes effect in Submit and
// completes at the end of the turn, on its reactor:
//
//   - A change is durable when a flush that covers it has completed, or, with
//     FUA, when it has completed itself. Until then a crash may keep, lose or
//     tear it.
//   - A flush covers the changes that had completed when it was submitted, of any
//     queue of that disk. One still in flight then is not covered, even if it was
//     submitted before.
//
// Three ways to crash. [Disk.Crash] rolls the dice once, by a seed.
// [Disk.CrashLose] and [Disk.CrashKeep] are the two extremes. And a trace has
// them all: [Disk.StartTrace] records every change and flush, and [Disk.Images]
// turns the trace into the images a loss of power could have left after each of
// its events, each a Disk of its own that costs only the pages that differ.
//
//	base := disk.StartTrace()
//	… work; disk.Mark("committed 7") when something has been promised …
//	for image := range base.Images(disk.Trace(), memdisk.ImageOptions{Seed: 1}) {
//		recovered := image.Disk()
//		… open it; what was promised up to image.Cut.Label must be there …
//	}
//
// Several disks that crash together are a [Group]: they share one sequence of
// events, so that every image is one moment of all of them.
//
// A disk also fails in ways a filter over it cannot: it rots, loses and misplaces
// writes, grows unreadable sectors, shrinks, vanishes; see [Disk.Corrupt] and
// the methods beside it.
//
// The model of a crash, for each sector: it holds what the last durable change
// wrote, or what any later change that is not durable wrote. No older change
// comes back over a durable one. Sectors are whole; there is no order between
// changes that are not durable, not even where they overlap.
//
// Memory: content is kept in pages of 4 KiB that clones and images share until
// one of them writes; an untouched page takes none. The data of a change stays
// in memory until it is durable, that of a trace as long as the trace.
//
// What it leaves to others: errors by rule, hanging and slow requests (package
// datapath/filter).
package memdisk
