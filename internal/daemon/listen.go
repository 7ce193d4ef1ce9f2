package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/nbd"
)

// URI is the NBD URI (doc/uri.md of NBD) of an export on a listener's address, ""
// for one that cannot be dialed.
func URI(export, network, address string, encrypted bool) string {
	u := nbd.URI{Export: export, TLS: encrypted}
	switch network {
	case "unix":
		u.Unix, u.Socket = true, address
	case "tcp":
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return ""
		}
		number, _ := strconv.ParseUint(port, 10, 16) // of a listener's address
		u.Host, u.Port = host, uint16(number)
	default:
		return ""
	}
	return u.String()
}

// ListenUnix listens on a socket file. A file left behind by a server that is
// gone is replaced; one that somebody answers on is not.
func ListenUnix(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err == nil {
		return l, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("listen on socket %s: %w", path, unwrap(err))
	}
	if info, statErr := os.Lstat(path); statErr != nil || info.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("listen on socket %s: the path exists and is no socket", path)
	}
	if c, dialErr := net.Dial("unix", path); dialErr == nil {
		_ = c.Close() // only asked whether anyone is there
		return nil, fmt.Errorf("listen on socket %s: another server answers there", path)
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("listen on socket %s: replace what a dead server left: %w", path, err)
	}
	if l, err = net.Listen("unix", path); err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, unwrap(err))
	}
	return l, nil
}

// tcpAddress is a host:port to listen on. Without TLS required, an address beyond this
// host needs the operator's word.
func tcpAddress(address string, encrypted, insecure bool) (*net.TCPAddr, error) {
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	if !encrypted && !insecure && !a.IP.IsLoopback() {
		return nil, fmt.Errorf("listen on %s: this would serve plain text to the network; use --tls require with --tls-cert and --tls-key, a loopback address, or --insecure-plaintext", address)
	}
	return a, nil
}

// ListenTCP listens on host:port, where tcpAddress allows it.
func ListenTCP(address string, encrypted, insecure bool) (net.Listener, error) {
	a, err := tcpAddress(address, encrypted, insecure)
	if err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // the kernel's MPTCP sockets cost more and gain nothing here
	l, err := lc.Listen(context.Background(), "tcp", a.String())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, unwrap(err))
	}
	return l, nil
}

// unwrap takes net's repetition of the address off an error.
func unwrap(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
