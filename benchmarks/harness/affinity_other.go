//go:build !linux

package harness

import "os/exec"

func startOn(cmd *exec.Cmd, cpus []int) error { return cmd.Start() }

// AllowedCPUs are the CPUs this process may run on.
func AllowedCPUs() []int { return nil }

func fileSystem(string) string { return "" }
func kernelRelease() string    { return "" }
func socketOwner(string) int   { return 0 }
