package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ashlar-storage/ashlar/internal/daemon"
)

// runCheck answers serve --check: for an operator, and for a daemon that is to become
// this program, which wants these very words.
func (f *serveFlags) runCheck(c *cobra.Command, config daemon.ServeConfig) error {
	dir, err := filepath.Abs(f.dataDir)
	if err != nil {
		return err
	}
	if before := os.Getenv(dataVariable); before != "" && !sameFile(dir, before) {
		return fmt.Errorf("the data directory would be %s, and is %s: to change it, stop the daemon and start it again", dir, before)
	}
	if err := config.Check(); err != nil {
		return err
	}
	if f.pidFile != "" {
		if err := checkPIDFile(f.pidFile); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(c.OutOrStdout(), "%s%s%s%s%s\n", answerBegin, versionText(), answerMiddle, dir, answerEnd)
	return err
}

// dataVariable tells the check of a successor which data directory it would go on with.
const dataVariable = "ASHLAR_HANDOVER_DATA"

// The words around the version and the data directory in the answer of serve --check.
const (
	answerBegin  = "ashlar "
	answerMiddle = " can serve "
	answerEnd    = " with these options"
)

// parseAnswer reads the answer of serve --check.
func parseAnswer(text string) (version string, ok bool) {
	text, begins := strings.CutPrefix(strings.TrimSuffix(text, "\n"), answerBegin)
	text, ends := strings.CutSuffix(text, answerEnd)
	version, _, ok = strings.Cut(text, answerMiddle)
	return version, begins && ends && ok
}

// checkPIDFile reports why writePIDFile would fail.
func checkPIDFile(path string) error {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return fmt.Errorf("pid file: %s is a directory", path)
	}
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("pid file: %w", err)
	}
	if err := daemon.CheckWritable(dir); err != nil {
		return fmt.Errorf("pid file: %w", err)
	}
	return nil
}

// programPath is where this program lies, and where an upgrade puts its successor.
func programPath() (string, error) {
	path, err := exec.LookPath(os.Args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil { // started by a name that leads nowhere, as tests do
		return os.Executable()
	}
	return path, nil
}

// checkTime bounds how long a program may take to say that it can take over; a machine
// under load takes seconds to start one. The daemon serves meanwhile.
const checkTime = 30 * time.Second

// successor is the program that would take over, as this process would start it.
type successor struct {
	path    string
	args    []string // of this process, from the first
	dataDir string   // of this process, absolute
}

// check reports why the program cannot take over: better now than after this one is
// gone. The version is its own.
//
// The program is asked to read its options and to look at all that it would start with;
// it is not enough that it runs, or that it is of Ashlar.
func (s *successor) check(ctx context.Context) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	var out, errs head
	c := exec.CommandContext(ctx, s.path, s.checkArgs()...)
	c.Env = append(os.Environ(), dataVariable+"="+s.dataDir)
	c.Stdout, c.Stderr = &out, &errs
	c.WaitDelay = time.Second // for programs that leave the pipes to others
	err = c.Run()
	var exit *exec.ExitError
	var path *fs.PathError
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("%s does not say within %v whether it could take over", s.path, checkTime)
	case errors.As(err, &exit):
		said, _, _ := strings.Cut(strings.TrimPrefix(errs.String(), "ashlar: "), "\n")
		if said == "" {
			said = exit.String()
		}
		return "", fmt.Errorf("%s could not take over: %s", s.path, said)
	case errors.As(err, &path):
		return "", fmt.Errorf("%s cannot be started: %w", s.path, path.Err)
	case err != nil:
		return "", fmt.Errorf("%s cannot be started: %w", s.path, err)
	}
	version, ok := parseAnswer(out.String())
	if !ok {
		return "", fmt.Errorf("%s does not answer `serve --check` as ashlar does: put ashlar there", s.path)
	}
	return version, nil
}

// checkArgs are the arguments of this process and --check, which stands before whatever
// ends the flags.
func (s *successor) checkArgs() []string {
	at := slices.Index(s.args, "--")
	if at < 0 {
		at = len(s.args)
	}
	return slices.Insert(slices.Clone(s.args), at, "--check")
}

func sameFile(a, b string) bool {
	if a == b {
		return true
	}
	one, err := os.Stat(a)
	if err != nil {
		return false
	}
	other, err := os.Stat(b)
	return err == nil && os.SameFile(one, other)
}

// headMax is how much of what a program says is of interest.
const headMax = 4096

// head keeps the beginning of what is written to it.
type head struct{ bytes.Buffer }

// Write implements io.Writer.
func (h *head) Write(b []byte) (int, error) {
	_, _ = h.Buffer.Write(b[:min(len(b), headMax-h.Len())]) // never fails
	return len(b), nil
}

// orders carries out what signals ask of a daemon.
type orders struct {
	signals <-chan os.Signal
	ended   <-chan struct{} // closed when the daemon has ended
	drain   context.CancelCauseFunc
	cut     chan<- struct{} // closed when clients are not to be waited for
	check   func(context.Context) (version string, err error)
	log     *slog.Logger
}

// obey ends with the daemon, or with the second signal to end it.
func (o *orders) obey() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var checked chan error // nil: no successor is being looked at
	look := func() {
		result := make(chan error, 1)
		checked = result
		go func() { // ends with the check, which ends with ctx
			version, err := o.check(ctx)
			if err == nil {
				o.log.Info("handing over", "to", version)
			}
			result <- err
		}()
	}
	again := false // the last check began before the last order
	for draining := false; ; {
		select {
		case <-o.ended:
			return
		case err := <-checked:
			checked = nil
			switch {
			case draining: // for good, meanwhile
			case again:
				again = false
				look()
			case err != nil:
				o.log.Error("not handed over: this process goes on serving", "error", err)
			default:
				draining = true
				o.drain(daemon.ErrHandOver)
			}
		case s := <-o.signals:
			switch {
			case s == syscall.SIGHUP && draining: // on its way already
			case s == syscall.SIGHUP && checked != nil:
				again = true
			case s == syscall.SIGHUP:
				look()
			case !draining:
				draining = true
				cancel()
				o.drain(errors.New(s.String()))
			default:
				close(o.cut)
				return
			}
		}
	}
}
