//go:build !linux

package csi

import (
	"context"
	"errors"
)

func blockSize(string) (uint64, error) { return 0, errors.ErrUnsupported }

func isBusy(string) bool { return false }

func awaitSize(context.Context, string, uint64) error { return errors.ErrUnsupported }
