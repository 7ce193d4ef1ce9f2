package pool

import (
	"bytes"
	"fmt"
)

// signature is how others mark a disk as theirs.
type signature struct {
	what   string
	offset int
	magic  string
}

// signatures are those of what people most often have on disks, with the offsets
// libblkid looks at.
var signatures = []signature{
	{"an ext2/3/4 file system", 0x438, "\x53\xef"},
	{"an XFS file system", 0, "XFSB"},
	{"a Btrfs file system", 0x10040, "_BHRfS_M"},
	{"a LUKS volume", 0, "LUKS\xba\xbe"},
	{"an LVM physical volume", 512, "LABELONE"},
	{"a Linux RAID member", 4096, "\xfc\x4e\x2b\xa9"},
	{"swap space", 4086, "SWAPSPACE2"},
	{"a bcache device", 0x1018, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"an NTFS file system", 3, "NTFS    "},
	{"a FAT file system", 82, "FAT32   "},
	{"an ISO 9660 image", 32769, "CD001"},
	{"a squashfs image", 0, "hsqs"},
	{"a qcow2 image", 0, "QFI\xfb"},
	{"an F2FS file system", 1024, "\x10\x20\xf5\xf2"},
	{"a Ceph BlueStore device", 0, "bluestore block device"},
	{"a GUID partition table", 512, "EFI PART"},
	{"a partition table", 510, "\x55\xaa"},
}

// foreignBytes is how much of a disk is looked at.
const foreignBytes = 128 << 10

// Foreign says what a disk looks like that begins with b, in words such as "an XFS
// file system"; "" when it is zeros, or b too short to tell.
func Foreign(b []byte) string {
	if len(b) < foreignBytes {
		return ""
	}
	return foreign(b)
}

// foreign says what the beginning of a disk, b, looks like; "" when it is zeros.
func foreign(b []byte) string {
	for _, s := range signatures {
		if s.offset+len(s.magic) <= len(b) && string(b[s.offset:s.offset+len(s.magic)]) == s.magic {
			return s.what
		}
	}
	if s, err := decodeSuperblock(b[:pageSize]); err == nil {
		return fmt.Sprintf("a disk of the pool %s", s.name)
	}
	if s, err := decodeSuperblock(b[pageSize:pairSize]); err == nil {
		return fmt.Sprintf("a disk of the pool %s", s.name)
	}
	if len(bytes.TrimLeft(b, "\x00")) > 0 {
		return "data of an unknown kind"
	}
	return ""
}
