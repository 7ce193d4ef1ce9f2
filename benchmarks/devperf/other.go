//go:build !linux

package main

import (
	"errors"
	"time"
)

var errNotLinux = errors.New("not supported (needs Linux)")

func openNBD(string, bool, time.Duration) (target, error)        { return nil, errNotLinux }
func openDevice(string, []string, string, []int) (target, error) { return nil, errNotLinux }

func pinThread([]int) error { return nil }
func cpuSeconds() float64   { return 0 }
