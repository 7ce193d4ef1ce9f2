package doctor

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// ErrUnknown marks what this system has no means to tell.
var ErrUnknown = errors.New("doctor: cannot be told on this system")

// Host is a system to look at. Its functions are those of the system; each may fail,
// and checks then say what they could not look at.
type Host struct {
	Root fs.FS // all files, from /
	UID  int   // effective

	Release    func() (release, machine string, err error)     // as uname says
	Ring       func() error                                    // makes an io_uring as reactors do, and gives it back
	Ublk, NBD  func() error                                    // why there is no such driver; nil: there is
	Limit      func(Resource) (soft, hard uint64, err error)   // of this process
	Filesystem func(dir string) (Filesystem, error)            // of an existing directory
	Direct     func(dir string) error                          // writes a block past the page cache, to an unnamed file
	Reflink    func(dir string) error                          // makes two unnamed files share a block
	Writable   func(dir string) error                          // whether this user may make files there
	ReadDisk   func(device string, b []byte) error             // reads the beginning of a disk
	Listen     func(address string) error                      // listens on TCP for a moment
	Daemon     func(socket string) (version string, err error) // asks who answers on a control socket
	Clock      func() (synchronized bool, err error)           // as the kernel says
	Foreign    func(b []byte) string                           // what the beginning of a disk looks like; "": zeros
}

// Resource is a limit of a process.
type Resource int

// The limits that matter.
const (
	Memlock Resource = iota // bytes
	Nofile
)

// Unlimited is a limit that is none.
const Unlimited = ^uint64(0)

// Filesystem is what holds a directory.
type Filesystem struct {
	Magic    int64 // of its kind, as in linux/magic.h
	Size     uint64
	Free     uint64 // bytes this user can use
	ReadOnly bool
}

// text reads a small file of the kernel's; "" when it is not there or not readable.
func (h *Host) text(path string) string {
	b, err := fs.ReadFile(h.Root, strings.TrimPrefix(path, "/"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (h *Host) exists(path string) bool {
	_, err := fs.Stat(h.Root, strings.TrimPrefix(path, "/"))
	return err == nil
}

// number reads a number of the kernel's.
func (h *Host) number(path string) (uint64, bool) {
	n, err := strconv.ParseUint(h.text(path), 10, 64)
	return n, err == nil
}

func (h *Host) list(dir string) []fs.DirEntry {
	entries, _ := fs.ReadDir(h.Root, strings.TrimPrefix(dir, "/")) // what is not there is empty
	return entries
}

func (h *Host) isRoot() bool { return h.UID == 0 }

// module says whether the running kernel's modules have one of a name.
func (h *Host) module(name string) bool {
	release, _, err := h.Release()
	if err != nil {
		return false
	}
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		if strings.Contains(h.text("/lib/modules/"+release+"/"+list), "/"+name+".ko") {
			return true
		}
	}
	return false
}

// denied says whether an error is one of rights.
func denied(err error) bool { return errors.Is(err, os.ErrPermission) }

func ok(text string) Finding              { return Finding{Level: OK, Text: text} }
func note(text, remedy string) Finding    { return Finding{Level: Note, Text: text, Remedy: remedy} }
func warning(text, remedy string) Finding { return Finding{Level: Warning, Text: text, Remedy: remedy} }
func failure(text, remedy string) Finding { return Finding{Level: Failure, Text: text, Remedy: remedy} }
func unseen(what string, err error) Finding {
	return note(what+" could not be looked at: "+reason(err), asRoot(err))
}

// asRoot is the remedy of a want of rights.
func asRoot(err error) string {
	if denied(err) {
		return "sudo ashlar doctor"
	}
	return ""
}

// reason is an error without the path and the call, which the sentence names.
func reason(err error) string {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err.Error()
	}
	return err.Error()
}
