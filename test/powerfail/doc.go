// Package powerfail takes power, and the process, away from bin/ashlar serve, and
// wants everything back that was promised. It runs in `make test-powerfail`, as
// root, in three parts:
//
//   - Replay. In User Mode Linux a pool lies on dm-log-writes, and a file system on
//     one of its volumes, through the kernel's nbd client. A file exerciser notes
//     each promise (an fsync that returned) in the log. Then the log is replayed up
//     to flushes and FUA writes, one after the other; at every second point some of
//     the writes that were in the disk's cache come on top, whole or torn in sectors.
//     On each disk that results the daemon must open the pool, and the file system
//     must mount, hold what was promised by then, and be clean.
//   - Dropped writes. The same load on dm-flakey, which begins to drop all writes;
//     the daemon is killed, the device keeps its word again.
//   - Kills, on the host. SIGKILL under writes, trims and flushes from an NBD client
//     of its own, and while snapshots and volumes are made and deleted: every reply
//     that the client read holds, flushed or not. fio's verify would only know what
//     it read back before.
//
// After each of them `ashlar pool check` must find no damage.
//
// Short by default; ASHLAR_TEST_LONG=1 replays more points and kills 200 times.
// ASHLAR_TEST_SEED repeats a run: each one prints its seed.
package powerfail
