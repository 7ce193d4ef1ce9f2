package csi

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// Bounds of what is in an id. The specification gives an id 128 bytes; a node
// whose name does not fit is in it as a hash.
const (
	idMax           = 128
	poolMax         = 20 // longest name of a pool that volumes are made in
	volumeNameMax   = 40 // "pvc-" and a UUID
	snapshotNameMax = 45 // "snapshot-" and a UUID
	hashedNode      = 16 // hexadecimal digits
	hashedName      = 32 // hexadecimal digits
)

// The first field of an id says what it names, and the version of its format.
// Version 1: kind/node/pool/names.
const (
	volumeKind   = "v1"
	snapshotKind = "s1"
	groupKind    = "g1"
)

// VolumeID names a volume: v1/NODE/POOL/VOLUME. Node is the name of the node, or
// '~' and a hash of it where the id would be too long.
type VolumeID struct{ Node, Pool, Volume string }

// SnapshotID names a snapshot: s1/NODE/POOL/VOLUME/SNAPSHOT.
type SnapshotID struct{ Node, Pool, Volume, Snapshot string }

// GroupID names the snapshots that were taken at one point: g1/NODE/POOL/GROUP.
// Each of them has the name of the group.
type GroupID struct{ Node, Pool, Group string }

// String gives the id that ParseVolumeID reads.
func (i VolumeID) String() string { return format(volumeKind, i.Node, i.Pool, i.Volume) }

// String gives the id that ParseSnapshotID reads.
func (i SnapshotID) String() string {
	return format(snapshotKind, i.Node, i.Pool, i.Volume, i.Snapshot)
}

// String gives the id that ParseGroupID reads.
func (i GroupID) String() string { return format(groupKind, i.Node, i.Pool, i.Group) }

// Source is the id of the volume that a snapshot is of.
func (i SnapshotID) Source() VolumeID { return VolumeID{i.Node, i.Pool, i.Volume} }

// ParseVolumeID reads an id. A string that is no id names no volume there is.
func ParseVolumeID(id string) (VolumeID, error) {
	f, err := split(volumeKind, id, 3)
	if err != nil {
		return VolumeID{}, err
	}
	return VolumeID{f[0], f[1], f[2]}, nil
}

// ParseSnapshotID reads an id.
func ParseSnapshotID(id string) (SnapshotID, error) {
	f, err := split(snapshotKind, id, 4)
	if err != nil {
		return SnapshotID{}, err
	}
	return SnapshotID{f[0], f[1], f[2], f[3]}, nil
}

// ParseGroupID reads an id.
func ParseGroupID(id string) (GroupID, error) {
	f, err := split(groupKind, id, 3)
	if err != nil {
		return GroupID{}, err
	}
	return GroupID{f[0], f[1], f[2]}, nil
}

// onNode says whether the node in an id is the one of that name.
func onNode(inID, name string) bool { return inID == name || inID == hashNode(name) }

func hashNode(name string) string { return "~" + digest(name, hashedNode) }

func digest(text string, digits int) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])[:digits]
}

func format(kind, node string, names ...string) string {
	id := kind + "/" + node + "/" + strings.Join(names, "/")
	if len(id) > idMax && !strings.HasPrefix(node, "~") {
		id = kind + "/" + hashNode(node) + "/" + strings.Join(names, "/")
	}
	return id
}

func split(kind, id string, count int) ([]string, error) {
	if len(id) > idMax {
		return nil, fmt.Errorf("the id has %d bytes, more than %d", len(id), idMax)
	}
	f := strings.Split(id, "/")
	if len(f) != count+1 || f[0] != kind {
		return nil, fmt.Errorf("%q is no id of the form %s/NODE/POOL/…", id, kind)
	}
	node := strings.TrimPrefix(f[1], "~")
	if !validNode(node) || node != f[1] && len(node) != hashedNode {
		return nil, fmt.Errorf("the id %q names no node", id)
	}
	for _, name := range f[2:] {
		if !validName(name, idMax) {
			return nil, fmt.Errorf("the id %q has the name %q, which nothing can have", id, name)
		}
	}
	return f[1:], nil
}

// nameOf is the name in the pool of what an orchestrator calls name: the same if
// the pool can have it and it is not too long, else a hash.
func nameOf(name string, max int) string {
	if validName(name, max) && !strings.HasPrefix(name, hashPrefix) {
		return name
	}
	return hashPrefix + digest(name, hashedName)
}

// hashPrefix begins names that are hashes of longer ones.
const hashPrefix = "csi-"

// validName says whether a pool can have a name: letters, digits, '-', '_' and '.',
// beginning with a letter or digit.
func validName(name string, max int) bool {
	if name == "" || len(name) > max {
		return false
	}
	for i := range len(name) {
		if !alphanumeric(name[i]) && (i == 0 || name[i] != '-' && name[i] != '_' && name[i] != '.') {
			return false
		}
	}
	return true
}

// validNode says whether a node can have a name: it becomes the value of a label,
// which also ends with a letter or digit.
func validNode(name string) bool {
	return validName(name, nodeIDMax) && alphanumeric(name[len(name)-1])
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}
