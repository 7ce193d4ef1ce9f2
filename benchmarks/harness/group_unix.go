//go:build unix

package harness

import (
	"os/exec"
	"syscall"
)

// killGroup ends a client with its children: fio's jobs are processes.
func killGroup(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil || !cmd.SysProcAttr.Setpgid {
		return cmd.Process.Kill()
	}
	return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
}
