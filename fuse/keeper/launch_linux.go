package keeper

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// SelfCommand is the Options.Command that starts a keeper from this process's own
// program, which is ashlar. The keeper ends by itself when it has nothing to hold.
func SelfCommand(socket string) ([]string, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	program = strings.TrimSuffix(program, " (deleted)") // of a program that was replaced; its successor is at its path
	return []string{program, "fuse-keeper", "--socket", socket, "--idle", "1m"}, nil
}

// Launch starts a command that outlives this process, in a session of its own, with no
// input and no output. It is not waited for by the caller.
func Launch(command []string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	defer func() { _ = null.Close() }() // nothing is kept
	c := exec.Command(command[0], command[1:]...)
	c.Stdin, c.Stdout, c.Stderr = null, null, null
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return fmt.Errorf("keeper: start %s: %w", command[0], err)
	}
	go func() { _ = c.Wait() }() // ends with the keeper, or this process; so that no zombie is left
	return nil
}
