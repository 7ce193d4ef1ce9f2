//go:build !linux

package main

import "fmt"

func openTarget(path string, _ int64) (target, error) {
	return nil, fmt.Errorf("%s: not supported (needs Linux)", path)
}
