// Fsstress drives one file, or a block device, through random operations and
// compares what it reads with a copy kept in memory.
//
//	fsstress [--seed N] [--steps N] [--until FILE] [--size BYTES] [--length BYTES]
//	         [--check] [--without KIND,KIND] [--log N] PATH
//
// PATH is a file, made when it is not there, or a block device, of which the first
// --size bytes are overwritten. The steps: writes and reads through the page cache,
// with O_DIRECT and through a mapping; truncation up and down; holes, zeroed and
// allocated ranges; discards (of a device); fsync; reopening; forgotten pages; and
// comparisons of everything. There are at least --steps of them, and then more until
// the file of --until exists.
//
// A step is a function of the seed, its number, and the size of the file, so a seed
// repeats a run. It is printed first. What is written at a place is a function of the
// seed, the step and the place, so a difference tells which step left what was found
// there: with the step that should have been there, that is usually enough to see
// whether a write was lost, went elsewhere, or came late. The steps that touched the place
// are printed, and the command that repeats them.
//
// With --check everything is compared after each step with what the device holds; slow, but
// the step that did it is then the last one. --without leaves kinds out and keeps
// the others as they were, while sizes agree.
//
// Exit codes: 0, 1 a difference or an error, 2 usage. The device suites of test/vm run
// it on file systems and devices while the daemon under them is killed.
package main
