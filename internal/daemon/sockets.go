package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/nbd"
)

// passedKey is the key of a socket that the service manager passed: its place among
// those of a name, and the name.
const passedKey = "passed %d %s"

// passedName is the name in such a key.
func passedName(key string) (name string, ok bool) {
	var i int
	_, err := fmt.Sscanf(key+" .", passedKey, &i, &name)
	return name, err == nil
}

// socket is one that a config has the node listen on.
type socket struct {
	key              string // by which the next process asks for the same one
	network, address string
	control, secure  bool         // for the control API; of these, with TLS
	allowed          func() error // why the options forbid it, whoever listens there; nil: they cannot
	open             func() (net.Listener, error)
}

// sockets are what a config asks for, beside what the service manager passed, of which
// passed are for NBD.
func (c *ServeConfig) sockets(passed int) (list []socket) {
	unixSocket := func(prefix, path string, open func(string) (net.Listener, error)) socket {
		return socket{key: prefix + path, network: "unix", address: path, open: func() (net.Listener, error) { return open(path) }}
	}
	tcp := func(prefix, address string, encrypted, insecure bool) socket {
		return socket{
			key: prefix + address, network: "tcp", address: address,
			allowed: func() error { _, err := tcpAddress(address, encrypted, insecure); return err },
			open:    func() (net.Listener, error) { return ListenTCP(address, encrypted, insecure) },
		}
	}
	if c.Socket != "" {
		s := unixSocket("control ", c.Socket, listenPrivate)
		s.control = true
		list = append(list, s)
	}
	for _, address := range c.ControlListen {
		s := tcp("control ", address, true, false)
		s.control, s.secure = true, true
		list = append(list, s)
	}
	for _, path := range c.NBDSockets {
		list = append(list, unixSocket("nbd ", path, ListenUnix))
	}
	addresses := c.Listen
	if passed+len(c.NBDSockets)+len(c.Listen) == 0 && c.ListenDefault != "" {
		addresses = []string{c.ListenDefault}
	}
	for _, address := range addresses {
		list = append(list, tcp("nbd ", address, c.TLS == nbd.TLSForced, c.InsecurePlaintext))
	}
	return list
}

// listen opens everything clients connect to, or takes it from the process before. What
// that one had and is not asked for any more is closed first: a new address may
// overlap an old one.
func (n *node) listen() error {
	c := n.config
	if c.Activation {
		passed, err := activation.ListenersWithNames()
		if err != nil {
			return fmt.Errorf("LISTEN_FDS: %w", err)
		}
		for name, list := range passed {
			for i, l := range list {
				if l != nil {
					n.addPassed(fmt.Sprintf(passedKey, i, name), name, l)
				}
			}
		}
	}
	for key, l := range n.inherited.listeners { // what the service manager once passed
		if name, ok := passedName(key); ok {
			delete(n.inherited.listeners, key)
			n.addPassed(key, name, l)
		}
	}
	if len(n.secure) > 0 && c.ControlTLS == nil {
		return errControlWithoutTLS
	}
	wanted := c.sockets(len(n.exports))
	taken := map[string]net.Listener{}
	for _, s := range wanted {
		if s.allowed != nil {
			if err := s.allowed(); err != nil {
				return err
			}
		}
		if l := n.inherited.take(s.key); l != nil {
			taken[s.key] = l
			n.addListener(s, l)
		}
	}
	n.inherited.close()
	for _, s := range wanted {
		if taken[s.key] != nil {
			delete(taken, s.key) // named twice, it is refused, as ever
			continue
		}
		l, err := s.open()
		if err != nil {
			return err
		}
		n.addListener(s, l)
	}
	for _, l := range n.exports {
		n.addresses.NBD = append(n.addresses.NBD, l.Addr())
	}
	for _, l := range n.controls {
		n.addresses.Control = append(n.addresses.Control, l.Addr())
	}
	return nil
}

var errControlWithoutTLS = errors.New("LISTEN_FDS: a control socket on TCP needs --control-tls-cert, --control-tls-key and --control-tls-ca")

// addPassed adds a listener of the service manager.
func (n *node) addPassed(key, name string, l net.Listener) {
	control := name == "control"
	n.addListener(socket{key: key, control: control, secure: control && l.Addr().Network() != "unix"}, l)
}

func (n *node) addListener(s socket, l net.Listener) {
	n.keys[l] = s.key
	if !s.control {
		n.exports = append(n.exports, l)
		return
	}
	n.controls = append(n.controls, l)
	if s.secure {
		n.secure = append(n.secure, l)
	}
}

// listenPrivate listens on a socket only this user may connect to.
func listenPrivate(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, err)
	}
	// The mask, and not a later chmod, so that nobody gets in before.
	old := unix.Umask(0o177)
	l, err := ListenUnix(path)
	unix.Umask(old)
	return l, err
}

// heldSocket is a socket that a running daemon listens on.
type heldSocket struct {
	Key, Network, Address string
}

// heldSockets are all of them; JSON in listening.json in the data directory, for
// ServeConfig.Check.
type heldSockets struct {
	PID     int
	Sockets []heldSocket
}

const (
	heldName   = "listening.json"
	metricsKey = "metrics" // of the socket of StartHTTP, which is not handed over
)

// writeHeld writes what this daemon listens on beside its data. A file that is lost or
// old makes a later check fail that should not; nothing else reads it.
func (n *node) writeHeld() error {
	held := heldSockets{PID: os.Getpid()}
	for l, key := range n.keys {
		held.Sockets = append(held.Sockets, heldSocket{key, l.Addr().Network(), l.Addr().String()})
	}
	if a := n.addresses.HTTP; a != nil {
		held.Sockets = append(held.Sockets, heldSocket{metricsKey, a.Network(), a.String()})
	}
	b, err := json.MarshalIndent(held, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(n.config.DataDir, heldName)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil { // not synced: it is of this process only
		return err
	}
	return os.Rename(path+".new", path)
}

// readHeld reads what a daemon on a data directory listens on; nothing, where none runs.
func readHeld(dataDir string) ([]heldSocket, error) {
	path := filepath.Join(dataDir, heldName)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var held heldSockets
	if err == nil {
		err = json.Unmarshal(b, &held)
	}
	if err != nil {
		return nil, fmt.Errorf("%s, in which the running daemon says where it listens: %w", path, err)
	}
	if held.PID <= 0 || !alive(held.PID) {
		return nil, nil
	}
	return held.Sockets, nil
}

// overlaps says whether a socket cannot be opened while h is.
func (h heldSocket) overlaps(s socket) bool {
	if h.Network == "unix" || s.network == "unix" {
		return h.Network == s.network && filepath.Clean(h.Address) == filepath.Clean(s.address)
	}
	held, err := net.ResolveTCPAddr("tcp", h.Address)
	if err != nil {
		return false
	}
	wanted, err := net.ResolveTCPAddr("tcp", s.address)
	if err != nil || held.Port != wanted.Port {
		return false
	}
	all := func(ip net.IP) bool { return len(ip) == 0 || ip.IsUnspecified() }
	return all(held.IP) || all(wanted.IP) || held.IP.Equal(wanted.IP)
}

// passedFor counts the sockets for NBD that the service manager passed, and says
// whether one for the control API needs TLS.
func passedFor(held []heldSocket) (exports int, secure bool) {
	for _, h := range held {
		name, ok := passedName(h.Key)
		switch {
		case !ok:
		case name != "control":
			exports++
		case !strings.HasPrefix(h.Network, "unix"):
			secure = true
		}
	}
	return exports, secure
}
