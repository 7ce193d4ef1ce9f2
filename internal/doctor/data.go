package doctor

import (
	"errors"
	"fmt"
	"path"
)

// Kinds of file systems, as statfs says (linux/magic.h).
var (
	networkKinds = map[int64]string{
		0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB", 0x00C36400: "CephFS", 0x65735546: "FUSE", 0x01021997: "9p", 0x5346414F: "AFS",
		0x6B414653: "AFS", 0x01161970: "GFS2", 0x7461636F: "OCFS2", 0x0BD00BD0: "Lustre",
	}
	memoryKinds = map[int64]string{0x01021994: "tmpfs", 0x858458F6: "ramfs"}
	copyKinds   = map[int64]string{0x9123683E: "Btrfs", 0x2FC12FC1: "ZFS", 0x794C7630: "overlayfs"}
	localKinds  = map[int64]string{0xEF53: "ext4", 0x58465342: "XFS", 0xF2F52010: "F2FS"}
)

const (
	freeMin  = 64 << 20 // the catalog, and 2 MiB a pool
	freeGood = 1 << 30  // for a pool in a file there must be more anyway
)

func checkDataDir(h *Host, o *Options) []Finding {
	dir := path.Clean(o.DataDir)
	if !h.exists(dir) {
		parent := path.Dir(dir)
		for !h.exists(parent) && parent != "/" && parent != "." {
			parent = path.Dir(parent)
		}
		f := []Finding{note(dir+" is not there yet; the daemon makes it", "mkdir -m 0700 -p "+dir)}
		if err := h.Writable(parent); err != nil {
			f[0] = cannotWrite(h, parent, err, dir+" is not there yet, and ")
		}
		return append(f, h.checkFilesystem(parent, dir)...)
	}
	if err := h.Writable(dir); err != nil {
		return append([]Finding{cannotWrite(h, dir, err, "")}, h.checkFilesystem(dir, dir)...)
	}
	return append([]Finding{ok(dir + " can be written to")}, h.checkFilesystem(dir, dir)...)
}

// cannotWrite is a failure for root; another user may not be the one of the daemon.
func cannotWrite(h *Host, dir string, err error, before string) Finding {
	text := fmt.Sprintf("%sthis user cannot make files in %s: %s", before, dir, reason(err))
	switch {
	case denied(err) && !h.isRoot():
		return note(text, "sudo ashlar doctor, or a --data-dir of your own")
	case errors.Is(err, ErrUnknown):
		return note(text, "")
	}
	return failure(text, "make the file system of "+dir+" writable, or use another --data-dir")
}

// checkFilesystem looks at what holds the data directory, now or when it is made.
func (h *Host) checkFilesystem(at, dir string) []Finding {
	fs, err := h.Filesystem(at)
	if err != nil {
		return []Finding{unseen("the file system of "+dir, err)}
	}
	var findings []Finding
	kind := localKinds[fs.Magic]
	switch {
	case networkKinds[fs.Magic] != "":
		kind = networkKinds[fs.Magic]
		findings = append(findings, failure(fmt.Sprintf("%s is on %s: what clients wrote and did not flush must outlive the daemon, in a file on a local file system", dir, kind), "use a --data-dir on a local disk"))
	case memoryKinds[fs.Magic] != "":
		kind = memoryKinds[fs.Magic]
		findings = append(findings, warning(fmt.Sprintf("%s is on %s: pools in files there are lost with the host's next start", dir, kind), "use a --data-dir on a disk, unless this is a trial"))
	case copyKinds[fs.Magic] != "":
		kind = copyKinds[fs.Magic]
		findings = append(findings, note(fmt.Sprintf("%s is on %s, which copies on write: pools in files there are slower than on ext4, XFS or disks", dir, kind), "use disks for pools, or a --data-dir on ext4 or XFS"))
	case kind == "":
		kind = fmt.Sprintf("a file system of kind %#x", fs.Magic)
	}
	switch {
	case fs.ReadOnly:
		findings = append(findings, failure(fmt.Sprintf("the file system of %s is read-only", dir), "mount -o remount,rw it, after a look at the kernel's log for why"))
	case fs.Free < freeMin:
		findings = append(findings, failure(fmt.Sprintf("the file system of %s has %s free, too little for the daemon's own files", dir, sizeOf(fs.Free)), "free some space, or use another --data-dir"))
	case fs.Free < freeGood:
		findings = append(findings, warning(fmt.Sprintf("the file system of %s has only %s free", dir, sizeOf(fs.Free)), "free some space, or use another --data-dir"))
	}
	text := fmt.Sprintf("%s is on %s with %s of %s free", dir, kind, sizeOf(fs.Free), sizeOf(fs.Size))
	if fs.ReadOnly || h.Writable(at) != nil {
		return append(findings, ok(text))
	}
	if err := h.Direct(at); err != nil {
		findings = append(findings, note(fmt.Sprintf("the file system of %s takes no O_DIRECT (%s): pools in files there go through the page cache", dir, reason(err)), "use disks for pools, or a --data-dir on ext4 or XFS"))
	} else {
		text += ", takes O_DIRECT"
	}
	if h.Reflink(at) == nil {
		text += ", copies files by sharing blocks"
	}
	return append(findings, ok(text))
}
