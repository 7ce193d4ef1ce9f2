package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/proto"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// serverVariable names the daemon when --server does not.
const serverVariable = "ASHLAR_SERVER"

// completionTimeout bounds what a shell waits for names.
const completionTimeout = 2 * time.Second

// controlHelp ends the help of every group of commands that ask a daemon.
const controlHelp = `

The daemon is the one at --server, else at $` + serverVariable + `, else at
` + control.DefaultAddress + `. On TCP it takes mutual TLS only.

With --output json one thing is an object with the field names of the control
API (control/controlpb/control.proto), a list an object with "items". Sizes are
bytes, times RFC 3339, and every field is always there. What is reported while it
happens (job watch, events --follow) is one object a line.

Exit codes: 0 done; 1 what was asked could not be done; 2 the command line is
wrong.`

// session is one run of a command that asks a daemon.
type session struct {
	cmd  *cobra.Command
	ctx  context.Context // of calls; ends with SIGINT and SIGTERM; set by client
	stop func()          // ends ctx
	conn *control.Client // set by client

	server                          string
	tlsCert, tlsKey, tlsCA, tlsName string
	timeout                         time.Duration
	output                          string
}

// controlCommand has c ask a daemon: it gives it the flags for that, run, and the
// completion of its arguments, one completer for each; the last one is for all
// that follow if c takes a list.
func controlCommand(c *cobra.Command, run func(s *session, args []string) error, arguments ...completer) (*cobra.Command, *session) {
	s := &session{cmd: c}
	flags := c.Flags()
	flags.StringVar(&s.server, "server", "", "the daemon: unix:///PATH or HOST:PORT (default $"+serverVariable+", else "+control.DefaultAddress+")")
	flags.StringVar(&s.tlsCert, "tls-cert", "", "on TCP: PEM file with the client's certificate chain")
	flags.StringVar(&s.tlsKey, "tls-key", "", "on TCP: PEM file with its key")
	flags.StringVar(&s.tlsCA, "tls-ca", "", "on TCP: PEM file with the authorities that the daemon's certificate must come from")
	flags.StringVar(&s.tlsName, "tls-name", "", "on TCP: the name in the daemon's certificate (default the host of --server)")
	flags.DurationVar(&s.timeout, "timeout", time.Minute, "give up a call after this; 0: never. Waiting for a job is not bounded")
	addOutputFlag(c, &s.output)
	c.DisableFlagsInUseLine = true
	c.RunE = func(_ *cobra.Command, args []string) error {
		if err := s.check(); err != nil {
			return err
		}
		defer s.close()
		err := run(s, args)
		if errors.Is(err, control.ErrInvalid) {
			return &usageError{err}
		}
		return err
	}
	c.ValidArgsFunction = func(_ *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		at := len(args)
		if at >= len(arguments) && len(arguments) > 0 && strings.HasSuffix(strings.TrimSuffix(c.Use, "]"), "...") {
			at = len(arguments) - 1
		}
		if at >= len(arguments) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return arguments[at](s, args, typed)
	}
	return c, s
}

// asking is the work of a command that begins by asking the daemon.
func asking(work func(s *session, client *control.Client, args []string) error) func(*session, []string) error {
	return func(s *session, args []string) error {
		client, err := s.client()
		if err != nil {
			return err
		}
		return work(s, client, args)
	}
}

// groupCommand is a word before the verbs; alone it shows its help.
func groupCommand(use, short, long string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long + controlHelp, DisableFlagsInUseLine: true,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := ""
			if c.SuggestionsMinimumDistance = 2; len(c.SuggestionsFor(args[0])) > 0 {
				hint = "; did you mean " + strings.Join(c.SuggestionsFor(args[0]), " or ") + "?"
			}
			return usagef("%s has no command %q%s", c.Name(), args[0], hint)
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(verbs...)
	return c
}

func (s *session) check() error {
	if _, _, err := control.ParseAddress(s.address()); err != nil {
		return &usageError{err}
	}
	unix := s.unix()
	given := s.tlsCert != "" || s.tlsKey != "" || s.tlsCA != "" || s.tlsName != ""
	switch {
	case s.output != "table" && s.output != "json":
		return usagef("--output %q: must be table or json", s.output)
	case s.timeout < 0:
		return usagef("--timeout %v: must not be negative", s.timeout)
	case unix && given:
		return usagef("the --tls-… flags go with --server HOST:PORT; %s is a unix socket", s.address())
	case !unix && (s.tlsCert == "" || s.tlsKey == "" || s.tlsCA == ""):
		return usagef("--server %s needs --tls-cert, --tls-key and --tls-ca", s.address())
	}
	return nil
}

// address is where the daemon is.
func (s *session) address() string {
	if s.server != "" {
		return s.server
	}
	if e := os.Getenv(serverVariable); e != "" {
		return e
	}
	return control.DefaultAddress
}

// unix says whether the daemon is on a unix socket, so that it sees the same files.
func (s *session) unix() bool {
	network, _, err := control.ParseAddress(s.address())
	return err == nil && network == "unix"
}

// client connects to the daemon, once. From then on signals end ctx; before, while
// a question waits for its answer, they end the process.
func (s *session) client() (*control.Client, error) {
	if s.conn != nil {
		return s.conn, nil
	}
	if s.ctx == nil {
		s.ctx, s.stop = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	}
	o := control.Options{Timeout: s.timeout}
	if !s.unix() {
		var err error
		if o.TLS, err = control.LoadTLS(s.tlsCert, s.tlsKey, s.tlsCA, s.tlsName); err != nil {
			return nil, err
		}
	}
	var err error
	s.conn, err = control.Dial(s.ctx, s.address(), o)
	return s.conn, err
}

func (s *session) close() {
	if s.conn != nil {
		_ = s.conn.Close() // nothing is in flight
		s.conn = nil
	}
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

func (s *session) out() io.Writer { return s.cmd.OutOrStdout() }

// note says something beside the result.
func (s *session) note(format string, args ...any) {
	fmt.Fprintf(s.cmd.ErrOrStderr(), format+"\n", args...)
}

// json says whether results are to be printed so.
func (s *session) json() bool { return s.output == "json" }

// one prints one thing: as JSON, or as show does.
func (s *session) one(m proto.Message, show func(io.Writer) error) error {
	if s.json() {
		return writeJSON(s.out(), objectOf(m))
	}
	return show(s.out())
}

// say prints one thing that a command has made or changed: as JSON, or in a sentence.
func (s *session) say(m proto.Message, format string, args ...any) error {
	return s.one(m, func(out io.Writer) error {
		_, err := fmt.Fprintf(out, format+"\n", args...)
		return err
	})
}

// list prints several things, called noun when there are none.
func list[M proto.Message](s *session, items []M, noun string, head []string, row func(M) []string) error {
	if s.json() {
		return writeJSON(s.out(), itemsOf(items))
	}
	if len(items) == 0 {
		s.note("no %s", noun)
		return nil
	}
	t := newTable(head...)
	for _, m := range items {
		t.add(row(m)...)
	}
	return t.write(s.out())
}

// finish prints the job a command has begun, after its end with wait. A job that
// cannot go on before somebody acts is not waited for. The text says what the command
// did.
func (s *session) finish(job *controlpb.Job, wait bool, text string) error {
	c, err := s.client()
	if err != nil {
		return err
	}
	if wait && job.GetState() == controlpb.JobState_JOB_STATE_RUNNING && job.GetNote() == "" {
		p := newProgress(s.cmd.ErrOrStderr())
		id := job.GetId()
		ctx, leave := context.WithCancel(s.ctx)
		defer leave()
		job, err = c.WaitJob(ctx, id, func(j *controlpb.Job) {
			p.show(j, time.Now())
			if j.GetNote() != "" {
				leave()
			}
		})
		p.end()
		switch {
		case errors.Is(err, control.ErrCanceled) && job.GetNote() != "":
		case errors.Is(err, control.ErrCanceled):
			return fmt.Errorf("interrupted; job %s goes on in the daemon", id)
		case err != nil:
			return err
		}
	}
	running := job.GetState() == controlpb.JobState_JOB_STATE_RUNNING
	err = s.one(job, func(out io.Writer) error {
		var err error
		if running && job.GetNote() != "" {
			_, err = fmt.Fprintf(out, "%s: job %s waits: %s\n", text, job.GetId(), job.GetNote())
		} else if running {
			_, err = fmt.Fprintf(out, "%s: job %s goes on; `ashlar job watch %s` follows it\n", text, job.GetId(), job.GetId())
		} else {
			_, err = fmt.Fprintf(out, "%s: %s\n", text, jobEnd(job))
		}
		return err
	})
	if err != nil || running {
		return err
	}
	return jobError(job)
}

// confirm asks before something is lost: on a terminal, unless --yes is given;
// without a terminal --yes must be.
func (s *session) confirm(yes bool, what string) error {
	if yes {
		return nil
	}
	if !inputIsTerminal(s.cmd.InOrStdin()) {
		return usagef("standard input is no terminal to ask on: give --yes to %s", what)
	}
	fmt.Fprintf(s.cmd.ErrOrStderr(), "%s%s? [y/N] ", strings.ToUpper(what[:1]), what[1:])
	answer, err := bufio.NewReader(s.cmd.InOrStdin()).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("the answer: %w", err)
	}
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errors.New("nothing is done, as you answered")
	}
	return nil
}

// inputIsTerminal says whether there is someone to ask; tests replace it.
var inputIsTerminal = func(r io.Reader) bool {
	f, ok := r.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func addYesFlag(c *cobra.Command, yes *bool) {
	c.Flags().BoolVarP(yes, "yes", "y", false, "do not ask")
}

func addWaitFlag(c *cobra.Command, wait *bool) {
	c.Flags().BoolVar(wait, "wait", false, "wait for the job to end, showing its progress")
}

// addPoolFlag adds --pool with its completion.
func addPoolFlag(c *cobra.Command, s *session, pool *string, usage string) {
	c.Flags().StringVar(pool, "pool", "", usage)
	completeFlag(c, s, "pool", completePools)
}

// paths makes paths absolute for the daemon, which has a directory of its own.
func (s *session) paths(args []string) ([]string, error) {
	var paths []string
	for _, a := range args {
		switch {
		case a == "":
			return nil, usagef("an empty path names no device")
		case !filepath.IsAbs(a) && !s.unix():
			return nil, usagef("%s: on another host only absolute paths are clear", a)
		}
		full, err := filepath.Abs(a)
		if err != nil {
			return nil, err
		}
		paths = append(paths, full)
	}
	return paths, nil
}

// labels reads KEY=VALUE pairs.
func labels(pairs []string) (map[string]string, error) {
	m := make(map[string]string)
	for _, p := range pairs {
		key, value, ok := strings.Cut(p, "=")
		if !ok || key == "" {
			return nil, usagef("--label %q: must be KEY=VALUE", p)
		}
		if _, twice := m[key]; twice {
			return nil, usagef("--label %s is given twice", key)
		}
		m[key] = value
	}
	return m, nil
}

// snapshotArgs accepts VOLUME@SNAPSHOT and VOLUME SNAPSHOT.
func snapshotArgs(_ *cobra.Command, args []string) error {
	_, _, err := splitSnapshot(args...)
	return err
}

// splitSnapshot gives the names of a volume and its snapshot.
func splitSnapshot(args ...string) (volume, snapshot string, err error) {
	switch len(args) {
	case 1:
		volume, snapshot, _ = strings.Cut(args[0], "@")
	case 2:
		volume, snapshot = args[0], args[1]
	default:
		return "", "", usagef("want VOLUME@SNAPSHOT, or VOLUME and SNAPSHOT, got %d arguments", len(args))
	}
	if volume == "" || snapshot == "" || strings.Contains(volume+snapshot, "@") {
		return "", "", usagef("%q names no snapshot: want VOLUME@SNAPSHOT, or VOLUME and SNAPSHOT", strings.Join(args, " "))
	}
	return volume, snapshot, nil
}

// exactly is cobra.ExactArgs that names what is missing.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("%s is missing", strings.Join(names[len(args):], " and "))
		}
		if len(args) > len(names) {
			return usagef("%q is too much: want %s", args[len(names)], strings.Join(names, " "))
		}
		return noEmpty(args)
	}
}

// noArguments is cobra.NoArgs for commands without verbs.
func noArguments(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%q is too much: %s takes no argument", args[0], c.CommandPath())
	}
	return nil
}

// noEmpty refuses empty names: an unset shell variable is not "the only one".
func noEmpty(args []string) error {
	if slices.Contains(args, "") {
		return usagef("a name is empty")
	}
	return nil
}

// ---- completion -----------------------------------------------------------------

// completer offers words for an argument or a flag.
type completer func(s *session, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective)

// names is a completer that asks the daemon. One that does not answer offers nothing.
func names(ask func(ctx context.Context, c *control.Client, args []string, typed string) ([]string, error)) completer {
	return func(s *session, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
		defer cancel()
		s.ctx = ctx
		if s.check() != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		c, err := s.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer s.close()
		words, err := ask(ctx, c, args, typed)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		directive := cobra.ShellCompDirectiveNoFileComp
		var offered []cobra.Completion
		for _, w := range words {
			if strings.HasPrefix(w, typed) {
				offered = append(offered, w)
				if strings.HasSuffix(w, "@") {
					directive |= cobra.ShellCompDirectiveNoSpace
				}
			}
		}
		return offered, directive
	}
}

var completePools = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	l, err := c.Pools.List(ctx, new(controlpb.ListPoolsRequest))
	return namesOf(l.GetPools(), (*controlpb.Pool).GetName), err
})

var completeVolumes = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	l, err := c.Volumes.List(ctx, new(controlpb.ListVolumesRequest))
	return namesOf(l.GetVolumes(), (*controlpb.Volume).GetName), err
})

// completeSnapshots offers VOLUME@SNAPSHOT.
var completeSnapshots = names(func(ctx context.Context, c *control.Client, _ []string, typed string) ([]string, error) {
	volume, _, _ := strings.Cut(typed, "@")
	if !strings.Contains(typed, "@") {
		volume = ""
	}
	l, err := c.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{Volume: volume})
	return namesOf(l.GetSnapshots(), snapshotName), err
})

// completeNewSnapshot offers VOLUME@, to be followed by a new name.
var completeNewSnapshot = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	l, err := c.Volumes.List(ctx, new(controlpb.ListVolumesRequest))
	return namesOf(l.GetVolumes(), func(v *controlpb.Volume) string { return v.GetName() + "@" }), err
})

// completeSnapshotsOf offers the snapshots of the volume that is the first argument.
var completeSnapshotsOf = names(func(ctx context.Context, c *control.Client, args []string, _ string) ([]string, error) {
	if len(args) == 0 || strings.Contains(args[0], "@") {
		return nil, nil
	}
	l, err := c.Snapshots.List(ctx, &controlpb.ListSnapshotsRequest{Volume: args[0]})
	return namesOf(l.GetSnapshots(), (*controlpb.Snapshot).GetName), err
})

var completeJobs = names(func(ctx context.Context, c *control.Client, _ []string, _ string) ([]string, error) {
	l, err := c.Jobs.List(ctx, &controlpb.ListJobsRequest{Running: true})
	return namesOf(l.GetJobs(), (*controlpb.Job).GetId), err
})

func completeFiles(*session, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// completeNothing is for names that are new.
func completeNothing(*session, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func completeFlag(c *cobra.Command, s *session, flag string, f completer) {
	_ = c.RegisterFlagCompletionFunc(flag, func(_ *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return f(s, args, typed)
	}) // fails for an unknown flag only
}

func namesOf[T any](items []T, name func(T) string) []string {
	var list []string
	for _, i := range items {
		list = append(list, name(i))
	}
	slices.Sort(list)
	return slices.Compact(list)
}
