package daemon

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// links are the names of attached devices under /dev: /dev/ashlar/POOL/VOLUME, and
// for what is no volume a name that holds the source. They live and die with the
// kernel's devices, whose names they are, and also say since when.
type links struct{ dir string }

// otherLinks is the directory of sources that are no volumes; no pool can have the name.
const otherLinks = "@"

func (l links) path(source string) string {
	if filepath.IsAbs(source) || strings.Contains(source, "://") {
		return filepath.Join(l.dir, otherLinks, url.PathEscape(source))
	}
	return filepath.Join(l.dir, filepath.FromSlash(source))
}

// set makes the link of a source lead to a device.
func (l links) set(source, device string) error {
	path := l.path(source)
	if old, err := os.Readlink(path); err == nil && old == device {
		return nil // since when it is, it says
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.Symlink(device, path)
}

// remove removes the link of a source, and directories it leaves empty.
func (l links) remove(source string) {
	path := l.path(source)
	if os.Remove(path) == nil {
		_ = os.Remove(filepath.Dir(path)) // not empty: others are in it
		_ = os.Remove(l.dir)
	}
}

// since is when a source was attached as a device; the zero time when that is not
// known.
func (l links) since(source, device string) time.Time {
	path := l.path(source)
	if to, err := os.Readlink(path); err != nil || to != device {
		return time.Time{}
	}
	i, err := os.Lstat(path)
	if err != nil {
		return time.Time{}
	}
	return i.ModTime()
}

// sources are the sources that have links, by the device these lead to.
func (l links) sources() map[string]string {
	found := map[string]string{}
	for _, pattern := range []string{"*/*"} {
		paths, _ := filepath.Glob(filepath.Join(l.dir, pattern)) // the pattern is good
		for _, path := range paths {
			device, err := os.Readlink(path)
			if err != nil {
				continue
			}
			source, err := filepath.Rel(l.dir, path)
			if err != nil {
				continue
			}
			if group, name, _ := strings.Cut(source, "/"); group == otherLinks {
				if source, err = url.PathUnescape(name); err != nil {
					continue
				}
			}
			found[device] = source
		}
	}
	return found
}

// clean removes links that lead to devices which are not attached.
func (l links) clean(attached func(device string) bool) {
	for device, source := range l.sources() {
		if !attached(device) {
			l.remove(source)
		}
	}
}
