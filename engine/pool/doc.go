// Package pool keeps thin, checksummed volumes with snapshots and clones on one or
// several disks.
//
// A disk is any [datapath.Device], so every device and filter serves as one, and
// the pool's volumes are devices again.
//
// The way of a write: it waits for its turn where the volume has a rate (limit.go),
// and for overlapping changes that came before (order.go). A queue cuts it into
// pieces of one cluster (128 KiB) each. A piece locks its blocks in a table of words,
// in line with others that want them (lock.go), finds the
// cluster in the map of the volume's head layer or allocates one (alloc.go),
// enters the cluster's region, which must be marked dirty in the journal
// (region.go), writes the blocks in place, sets their checksums in memory, and then
// sets their bits in the map. A read looks the blocks up through the layers
// (layer.go), reads them and compares their checksums; it takes no lock. What streams
// come to next is made ready before they do (stream.go). A flush
// flushes the disk, and where maps have changed has the committer write the
// changes to the journal (commit.go, journal.go). The keeper (keeper.go) does what
// needs no hurry: it stores checksums, cleans regions, and writes checkpoints of
// the maps (checkpoint.go). Merges (merge.go) take the layers of deleted snapshots
// out of chains.
//
// Invariants:
//
//  1. Every cluster has one owner: an entry of one layer, or metadata. The free map
//     is derived from that at open.
//  2. An entry is durable only after the blocks it names are.
//  3. A block is written only while its region is durably dirty, so after a crash
//     the stored checksums of every other region are those of its blocks.
//  4. A freed cluster is used again only when the change that freed it is durable
//     and every request that could still touch it has ended.
//  5. A page of metadata on disk is never ahead of the journal, but for blocks
//     written and flushed.
//  6. What differs from its checksum is never handed out.
//  7. Changes of a block are done in the order in which they came to the pool.
//
// What it leaves to others: which pools a node has, and under what names their
// volumes are served (package engine); copies on other nodes (replication).
package pool
