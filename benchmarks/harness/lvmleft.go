package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// deletedMark is what the kernel puts behind the name of a file that is no more.
const deletedMark = " (deleted)"

// sweep takes away what runs that were killed left: loop devices on the file of a Stage
// whose directory nobody has locked, and the groups on them. What belongs to a run that
// lives, or cannot be judged, stays; the latter is named.
func (m machine) sweep(ctx context.Context, say func(format string, arguments ...any)) error {
	paths, _ := filepath.Glob(filepath.Join(m.root, "sys/block/loop*/loop/backing_file")) // the pattern is well formed
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // detached meanwhile
		}
		file, deleted := strings.CutSuffix(strings.TrimSpace(string(text)), deletedMark)
		if filepath.Base(file) != lvmFile {
			continue
		}
		name := filepath.Base(filepath.Dir(filepath.Dir(path)))
		device := "/dev/" + name
		if !deleted {
			lock, err := lockFolder(filepath.Dir(file))
			switch {
			case errors.Is(err, errLocked):
				continue // a run that lives
			case err != nil:
				say("%s may be left of a run that was killed, on %s, which cannot be looked at: %v; `losetup --detach %s` removes it", device, file, err, device)
				continue
			}
			defer func() { _ = lock.Close() }() // nothing was written
		}
		groups := m.groupsOn(name)
		for _, group := range groups {
			if err := m.deactivate(ctx, device, group); err != nil {
				return fmt.Errorf("a run that was killed: %w", err)
			}
		}
		if err := m.detach(ctx, device); err != nil {
			return fmt.Errorf("a run that was killed left %s: %w", device, err)
		}
		what := strings.Join(append([]string{device}, groups...), " and ")
		if deleted {
			say("removed what a run that was killed left: %s", what)
		} else {
			say("removed what a run that was killed left: %s; its files are in %s still", what, filepath.Dir(file))
		}
	}
	return nil
}

// groupsOn are the volume groups, of benchmarks, that have devices on a loop device.
func (m machine) groupsOn(loop string) (groups []string) {
	holders, _ := os.ReadDir(filepath.Join(m.root, "sys/block", loop, "holders")) // gone: nothing lies on it
	seen := map[string]bool{}
	for _, holder := range holders {
		text, err := os.ReadFile(filepath.Join(m.root, "sys/block", holder.Name(), "dm/name"))
		if err != nil {
			continue // gone, or no device mapper's
		}
		// Device mapper's name of a volume is GROUP-VOLUME; our groups have no hyphen.
		group, _, _ := strings.Cut(strings.TrimSpace(string(text)), "-")
		if strings.HasPrefix(group, lvmGroup) && !seen[group] {
			seen[group] = true
			groups = append(groups, group)
		}
	}
	return groups
}
