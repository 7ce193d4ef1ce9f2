// Package observe watches, from inside the kernel, what happens below and around
// the engine: the queues of block devices, the threads of reactors, the requests of
// io_uring, the kernel's NBD client. It steers nothing.
//
// Small eBPF programs (folder bpf) hang on tracepoints of the kernel and count into
// maps of a fixed size: numbers and histograms, nothing per request. [Observer.Snapshot]
// reads the maps. Nothing is sent to user space in between, so an observer that nobody
// asks costs only the programs themselves.
//
// The programs come in groups, each of which loads or fails on its own: without the
// right to load any, without BTF, on a kernel without some tracepoint, everything
// else goes on, and [Observer.Unobserved] says what is not seen and why.
//
// A request to a disk goes through two times that are counted apart. The queue time is
// from its beginning (or, where the kernel keeps no statistics of the disk, from its
// insertion into the queue) to its issue to the driver; the service time from there to
// its completion. How many were issued and are not completed is the depth.
//
// docs/internals/observe.md tells the rest: kernels, rights, costs, limits.
package observe
