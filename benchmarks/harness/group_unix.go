//go:build unix

package harness

import (
	"os/exec"
	"syscall"
)

// ownGroup keeps a terminal's signals from a command.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// killGroup ends a client with its children: fio's jobs are processes.
func killGroup(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil || !cmd.SysProcAttr.Setpgid {
		return cmd.Process.Kill()
	}
	return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
}
