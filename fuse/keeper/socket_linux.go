package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// none is the descriptor of a message without one.
const none = -1

// send sends a message, with a descriptor unless it is none.
func send(c *net.UnixConn, m *message, fd int) error {
	var rights []byte
	if fd != none {
		rights = unix.UnixRights(fd)
	}
	_, _, err := c.WriteMsgUnix(m.encode(), rights, nil)
	return err
}

// receive receives a message and the descriptor that came with it, none if none did.
// The caller closes it. buffer has messageMax+1 bytes, so that a longer message is seen.
func receive(c *net.UnixConn, buffer []byte, m *message) (int, error) {
	var rights [64]byte // of a few descriptors; more are cut off by the kernel
	n, count, flags, _, err := c.ReadMsgUnix(buffer, rights[:])
	if err != nil {
		return none, err
	}
	fds := descriptors(rights[:count])
	switch {
	case n == 0 && count == 0:
		err = io.EOF
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(fds) > 1:
		err = ErrProtocol
	default:
		err = m.decode(buffer[:n])
	}
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd) // not wanted
		}
		return none, err
	}
	if len(fds) == 0 {
		return none, nil
	}
	return fds[0], nil
}

func descriptors(control []byte) (list []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil // none arrived
	}
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			list = append(list, fds...)
		}
	}
	return list
}

// peer is who is at the other end of a connection.
func peer(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return cred, credErr
}

// trusted refuses the other end of a connection unless it is root or our own user.
func trusted(c *net.UnixConn) (pid int32, err error) {
	cred, err := peer(c)
	if err != nil {
		return 0, fmt.Errorf("keeper: %w", err)
	}
	if cred.Uid != 0 && int(cred.Uid) != unix.Geteuid() {
		return 0, fmt.Errorf("keeper: user %d is at the other end of the socket: must be root", cred.Uid)
	}
	return cred.Pid, nil
}

// refused tells whether nobody listens at a socket.
func refused(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}
