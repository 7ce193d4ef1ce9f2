// Devperf is a load generator that costs little, for devices faster than fio's
// NBD engine: that engine spends a core at some 200k requests a second, so above
// it measures itself.
//
// One thread serves one connection. A turn fills as many requests as there are
// free slots into one buffer, sends them with one call, reads as many replies
// as are there with one call, and reads the clock twice. Nothing is allocated
// after the start. Payload is thrown away unseen: correctness is the business
// of fio's verify profile.
//
// The other load is straight on a device of this process (--device): a reactor
// and a queue per job, with no export, socket or second process between. What an
// export costs is the difference of the two.
//
// What is sent (operations, offsets) and what is kept (latencies) come from
// benchmarks/internal/load. A [target] opens one [driver] per job: one pair of
// them is the NBD client, the other the device.
package main
