//go:build !linux

package reactor

import "errors"

func openEngine(*Reactor) (engine, error) {
	return nil, errors.New("reactors need Linux")
}
