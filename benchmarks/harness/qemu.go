package harness

import (
	"fmt"
	"path/filepath"
	"strconv"
)

// qemuNBD is qemu-nbd with one way of doing its file I/O. Native AIO needs
// O_DIRECT, so cache=none; tmpfs takes O_DIRECT since Linux 6.6.
type qemuNBD struct{ name, aio, cache string }

func (q qemuNBD) Name() string            { return q.name }
func (q qemuNBD) About() string           { return fmt.Sprintf("qemu-nbd, --aio=%s --cache=%s", q.aio, q.cache) }
func (qemuNBD) Program() (string, string) { return "qemu-nbd", "qemu-utils" }
func (qemuNBD) VersionArgs() []string     { return []string{"--version"} }

func (q qemuNBD) Plan(s Site) (Plan, error) {
	socket := filepath.Join(s.Dir, "s")
	argv := []string{"qemu-nbd", "-k", socket, "-t", "-e", "16"} // 16 clients at most
	switch s.Backing.Kind {
	case BackingFile:
		argv = append(argv, "-f", "raw", "--cache="+q.cache, "--aio="+q.aio, s.Backing.Path)
	case BackingNull:
		argv = append(argv, "--image-opts",
			"driver=null-co,read-zeroes=on,size="+strconv.FormatUint(s.Backing.Size, 10))
	default:
		return Plan{}, unsupported(q, s.Backing)
	}
	return Plan{Argv: argv, Ready: "unix:" + socket, Target: nbdUnix("", socket)}, nil
}
