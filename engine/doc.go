// Package engine is what exists on one node: its pools, the volumes in them, and
// where they lie.
//
// The catalog (pools.json under the data directory) only remembers where the
// devices of a pool were seen last. The disks are the truth: every device says
// which pool it belongs to, and Open finds one again by that signature when its
// path has changed. A pool that cannot be opened is named with the reason, and
// the node goes on with the others.
//
// The way of one request by name: the reference (VOLUME or POOL/VOLUME) is looked
// up over the open pools, the pool found is held so that nobody closes it
// meanwhile, and the call goes to package pool. Requests for bytes do not come
// through here: OpenVolume hands out the pool's own device.
//
// Invariants: a name of a volume means one volume, or the lookup fails; what a
// pool that is not open may hold is unknown, never absent; a change of which pools
// there are is in the catalog before the call returns; files are formatted under a
// temporary name, so that a file with its final name is a whole pool.
//
// It leaves to others: the layout (engine/pool), exports and the control API
// (internal/daemon), copies on other nodes (replication).
package engine
