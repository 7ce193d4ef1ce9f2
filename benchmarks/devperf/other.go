//go:build !linux

package main

import "errors"

func openNBD(string, bool) (target, error) {
	return nil, errors.New("devperf: not supported (needs Linux)")
}
func pinThread([]int) error { return nil }
func cpuSeconds() float64   { return 0 }
