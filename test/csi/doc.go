// Package csi runs bin/ashlar as Kubernetes does: a daemon with a real pool, the
// CSI driver beside it, real filesystems on real block devices. It knows both by
// their command lines and their sockets only.
//
// The tests run in `make test-csi`, as root: csi-sanity, the conformance suite of
// the specification, for filesystem and for block volumes; what csi-sanity does not
// ask for (snapshot metadata, group snapshots, limits, clones, wrong input); and a
// storm of volumes while the driver and the daemon are killed. ASHLAR_TEST_LONG=1
// makes the storm one of 100 volumes.
package csi
