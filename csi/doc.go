// Package csi is the Container Storage Interface driver csi.ashlar.io: it
// translates what an orchestrator asks into calls of the control API of the
// daemon on the same node, and mounts what the daemon attaches.
//
// The route of one volume: CreateVolume makes it in a pool and answers with an
// id that names the node, the pool and the volume ([VolumeID]). NodeStageVolume
// has the daemon attach it as a block device, opens LUKS where it is asked for,
// makes and checks the filesystem, and mounts it on the staging path.
// NodePublishVolume binds that to the path of a pod. Unpublish, unstage and
// delete go the same way back. A volume lies on one node, and is used there.
//
// Invariants:
//   - The driver keeps no state. What is staged is told by the kernel's mounts and
//     device-mapper, by Devices.List of the daemon, and by what volumes have as
//     labels; so it may be killed at any moment, and starts again as if it had
//     never ended.
//   - The data path is not here: killing the driver disturbs no I/O.
//   - Every call may be repeated, and two calls for one volume never run at once:
//     the second is answered ABORTED.
//   - A secret is neither logged nor on a command line: cryptsetup reads keys from
//     its standard input.
//   - What a call has begun and cannot finish, it takes back.
//
// How volumes are stored, and what a snapshot costs, is left to the daemon.
package csi
