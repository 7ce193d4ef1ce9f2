package harness

import (
	"fmt"
	"path/filepath"
)

// nbdServer is the reference server of the NBD project. It forks a process per
// connection and, kept in the foreground with -d, ends with its first client, so
// it is left to detach and found by its pid file.
type nbdServer struct{}

func (nbdServer) Name() string              { return "nbd-server" }
func (nbdServer) About() string             { return "nbd-server of the NBD project" }
func (nbdServer) Program() (string, string) { return "nbd-server", "nbd-server" }
func (nbdServer) VersionArgs() []string     { return []string{"-V"} }

func (n nbdServer) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingFile {
		return Plan{}, unsupported(n, s.Backing)
	}
	socket, config, pid := filepath.Join(s.Dir, "s"), filepath.Join(s.Dir, "conf"), filepath.Join(s.Dir, "pid")
	// It listens on TCP too, whatever it is told; a free port on the loopback keeps that harmless.
	text := fmt.Sprintf("[generic]\n\tunixsock = %s\n\tlistenaddr = 127.0.0.1\n\tport = %d\n"+
		"[bench]\n\texportname = %s\n\tflush = true\n\tfua = true\n", socket, s.Port, s.Backing.Path)
	return Plan{
		Argv:    []string{"nbd-server", "-C", config, "-p", pid},
		Files:   map[string]string{config: text},
		PIDFile: pid,
		Ready:   "unix:" + socket,
		Target:  nbdUnix("bench", socket),
	}, nil
}
