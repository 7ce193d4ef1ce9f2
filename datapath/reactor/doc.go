// Package reactor is the polling core: one goroutine locked to one OS thread,
// through which every socket, file, timer and message of its owners arrives.
//
// One turn of the loop: drain the mailbox, run due timers, run the pollers, reap
// completions and readiness, run what was deferred (replies gathered from many
// requests leave in one system call there), submit everything gathered with one
// system call. A turn that found nothing ends in the idle policy: spin for a
// budget learned from the device's observed service time, then sleep in the
// kernel until something arrives. Idle costs nothing.
//
// Two engines carry it, with the same behaviour: io_uring where the kernel has
// it, else epoll with a pool of worker threads for files. Which one runs is
// chosen when the reactor starts and said in the log.
//
// State has one owner. Whatever a reactor's callbacks touch is touched on that
// reactor only; other goroutines send a message by [Reactor.Post] or
// [Reactor.Run]. Methods say on which side they belong.
//
// Callbacks never block: a call that may sleep for long goes to a worker by an
// [IO] with [OpFunc].
package reactor
