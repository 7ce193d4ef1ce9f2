//go:build !linux

package reactor

import (
	"errors"
	"time"
)

func threadCPU(int) (time.Duration, error) { return 0, errors.ErrUnsupported }
