package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"strings"

	"github.com/ashlar-storage/ashlar/internal/units"
)

// BackingKind is what the servers are given to serve.
type BackingKind string

// The kinds of backing.
const (
	BackingFile   BackingKind = "file"   // a file or a block device
	BackingNull   BackingKind = "null"   // reads as zeros, forgets writes
	BackingMemory BackingKind = "memory" // RAM of the server
	BackingURI    BackingKind = "uri"    // served already, by somebody else
	BackingPool   BackingKind = "pool"   // the directory of a Stage
)

// Backing is the target of a benchmark before a server is put in front of it.
type Backing struct {
	Kind BackingKind `json:"kind"`
	Path string      `json:"path,omitempty"` // of a file or block device
	URI  string      `json:"uri,omitempty"`
	Size uint64      `json:"size_bytes,omitempty"` // 0 when unknown
}

// String prints the backing as ParseBacking reads it.
func (b Backing) String() string {
	switch b.Kind {
	case BackingNull:
		return "null:" + units.FormatSize(b.Size)
	case BackingMemory:
		return "mem:" + units.FormatSize(b.Size)
	case BackingURI:
		return b.URI
	}
	return b.Path
}

// ParseBacking reads a target: an NBD URI, null:SIZE, mem:SIZE, or a path. The
// path is not looked at.
func ParseBacking(text string) (Backing, error) {
	if size, ok := strings.CutPrefix(text, "null:"); ok {
		return sized(BackingNull, text, size)
	}
	if size, ok := strings.CutPrefix(text, "mem:"); ok {
		return sized(BackingMemory, text, size)
	}
	if strings.HasPrefix(text, "nbd://") || strings.HasPrefix(text, "nbd+unix://") {
		u, err := url.Parse(text)
		if err != nil {
			return Backing{}, fmt.Errorf("target: %w", err)
		}
		if u.Scheme == "nbd+unix" && u.Query().Get("socket") == "" {
			return Backing{}, fmt.Errorf("target %s: no socket, want nbd+unix:///EXPORT?socket=PATH", text)
		}
		return Backing{Kind: BackingURI, URI: text}, nil
	}
	if strings.Contains(text, "://") {
		return Backing{}, fmt.Errorf("target %s: want a path, nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH", text)
	}
	if text == "" {
		return Backing{}, errors.New("target: empty")
	}
	return Backing{Kind: BackingFile, Path: text}, nil
}

func sized(kind BackingKind, text, size string) (Backing, error) {
	n, err := units.ParseSize(size)
	if err != nil {
		return Backing{}, fmt.Errorf("target %s: %w", text, err)
	}
	if n == 0 {
		return Backing{}, fmt.Errorf("target %s: the size is 0", text)
	}
	return Backing{Kind: kind, Size: n}, nil
}

// SizeMin is the smallest target worth measuring: below it one job of four has
// less than a megabyte per request in flight.
const SizeMin = 64 << 20

// OverwriteError says that a load would destroy what is there.
type OverwriteError struct {
	Path  string
	Size  uint64
	Block bool // a block device
}

func (e *OverwriteError) Error() string {
	what := "file"
	if e.Block {
		what = "block device"
	}
	return fmt.Sprintf("the profile writes: it would overwrite the %s %s (%s)", what, e.Path, units.FormatSize(e.Size))
}

// Prepare looks at a file target, or creates it with random content when it is
// absent and size is given. It returns an *OverwriteError when writes would
// destroy something and consent is false. Created tells that the file is ours.
func (b *Backing) Prepare(writes, consent bool, size uint64) (created bool, err error) {
	if b.Kind != BackingFile {
		if size != 0 && b.Kind != BackingURI {
			b.Size = size
		}
		if b.Kind == BackingURI && writes && !consent {
			return false, fmt.Errorf("the profile writes: it would overwrite the export %s", b.URI)
		}
		return false, nil
	}
	info, err := os.Stat(b.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && size == 0:
		return false, fmt.Errorf("target %s does not exist; give --size to create it", b.Path)
	case errors.Is(err, fs.ErrNotExist):
		if size < SizeMin {
			return false, tooSmall(b.Path, size)
		}
		b.Size = size
		return true, fillFile(b.Path, size)
	case err != nil:
		return false, fmt.Errorf("target: %w", err)
	case info.IsDir():
		return false, fmt.Errorf("target %s is a directory; name a file in it and give --size to create it", b.Path)
	}
	block := info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
	if !block && !info.Mode().IsRegular() {
		return false, fmt.Errorf("target %s is neither a file nor a block device", b.Path)
	}
	f, err := os.Open(b.Path)
	if err != nil {
		return false, fmt.Errorf("target: %w", err)
	}
	end, err := f.Seek(0, 2)
	_ = f.Close() // read-only
	if err != nil {
		return false, fmt.Errorf("target: %w", err)
	}
	b.Size = uint64(end)
	if !block && end == 0 && size != 0 {
		b.Size = size
		return true, fillFile(b.Path, size)
	}
	if b.Size < SizeMin {
		return false, tooSmall(b.Path, b.Size)
	}
	if writes && !consent {
		return false, &OverwriteError{Path: b.Path, Size: b.Size, Block: block}
	}
	return false, nil
}

func tooSmall(path string, size uint64) error {
	return fmt.Errorf("target %s is too small: %s, a benchmark needs %s", path, units.FormatSize(size), units.FormatSize(SizeMin))
}

// fillFile writes every block, so that reads do not find holes. It leaves no
// partial file behind.
func fillFile(path string, size uint64) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	defer func() {
		if closeErr := f.Close(); err == nil && closeErr != nil {
			err = closeErr
		}
		if err != nil {
			_ = os.Remove(path) // the first error is the one to report
			err = fmt.Errorf("create target %s: %w", path, err)
		}
	}()
	chunk := randomChunk()
	for left := size; left > 0; {
		n := min(left, uint64(len(chunk)))
		if _, err := f.Write(chunk[:n]); err != nil {
			return err
		}
		left -= n
	}
	return f.Sync()
}
