package harness

// raw is no server: the client works on the file itself. It bounds what any
// server can reach on that file.
type raw struct{}

func (raw) Name() string              { return "raw" }
func (raw) About() string             { return "no server: fio on the target with io_uring" }
func (raw) Program() (string, string) { return "", "" }
func (raw) VersionArgs() []string     { return nil }

func (r raw) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingFile {
		return Plan{}, unsupported(r, s.Backing)
	}
	return Plan{Target: Target{Engine: "io_uring", Path: s.Backing.Path}}, nil
}

// served is an export somebody else started. Its server's CPU time is known
// when it is a process of this machine behind a unix socket.
type served struct{}

func (served) Name() string              { return "target" }
func (served) About() string             { return "the export named as the target" }
func (served) Program() (string, string) { return "", "" }
func (served) VersionArgs() []string     { return nil }

func (r served) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingURI {
		return Plan{}, unsupported(r, s.Backing)
	}
	return Plan{Target: Target{Engine: "nbd", URI: s.Backing.URI}}, nil
}
