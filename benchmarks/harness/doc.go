// Package harness measures block device servers against each other.
//
// The route of one measurement: a [Profile] is cut into cases, one per fio job.
// For each case, [Run] goes through the rounds; in each round every [Peer] is
// started on its own unix socket, loaded by the [Client] for ramp plus runtime,
// and stopped, the order turning by one each round. A sampler reads the CPU time
// of both process trees meanwhile. Every run is kept in the [Result]; medians,
// spreads and ratios are derived from the runs and can be derived again.
//
// Peers that need more than a file to serve, such as the volumes of a pool, find it
// in the directory of a [Stage], which is prepared once. What is no load, calls of
// the control API and the start of a node, has runners of its own: [RunIdle],
// [RunVolumeCalls], [RunOpen].
//
// Invariants: the server and the client run on different CPUs unless told
// otherwise; nothing runs without a time limit; whatever was started is stopped
// by its process id, also when the context ends early.
//
// The package knows no store and no export of Ashlar: it starts the binary as a
// peer like any other. What is claimed from the numbers is judged in package gate.
package harness
