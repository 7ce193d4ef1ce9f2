//go:build !linux

package testenv

import "errors"

func probeIOURing() error { return errors.New("not Linux") }
