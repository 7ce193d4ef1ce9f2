package harness

import (
	"fmt"
	"path/filepath"
	"strconv"
)

// nbdkit is nbdkit with its file, null or memory plugin. The file plugin has no
// O_DIRECT: with cache=none it reads and writes through the page cache and asks
// the kernel to drop it, which is the nearest it has.
type nbdkit struct {
	name    string
	threads int
}

func (n nbdkit) Name() string            { return n.name }
func (n nbdkit) About() string           { return fmt.Sprintf("nbdkit, --threads %d", n.threads) }
func (nbdkit) Program() (string, string) { return "nbdkit", "nbdkit" }
func (nbdkit) VersionArgs() []string     { return []string{"--version"} }

func (n nbdkit) Plan(s Site) (Plan, error) {
	socket := filepath.Join(s.Dir, "s")
	argv := []string{"nbdkit", "-f", "-U", socket, "--threads", strconv.Itoa(n.threads)}
	switch s.Backing.Kind {
	case BackingFile:
		argv = append(argv, "file", s.Backing.Path, "cache=none")
	case BackingNull:
		argv = append(argv, "null", "size="+strconv.FormatUint(s.Backing.Size, 10))
	case BackingMemory:
		argv = append(argv, "memory", "size="+strconv.FormatUint(s.Backing.Size, 10))
	default:
		return Plan{}, unsupported(n, s.Backing)
	}
	return Plan{Argv: argv, Ready: "unix:" + socket, Target: nbdUnix("", socket)}, nil
}
