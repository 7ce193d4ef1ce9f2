package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHandOver, as the cause with which the context of Serve ends, has the daemon drain
// and keep its listening sockets for a Successor.
var ErrHandOver = errors.New("a new process takes over")

// handOverVariable tells a process what the one before it kept.
const handOverVariable = "ASHLAR_HANDOVER"

// Successor is the same process with another program in it: a newer binary goes on
// with the listening sockets, so that no client is refused meanwhile. Attached
// devices need no help: they wait for whoever recovers them.
type Successor struct {
	began time.Time // of the drain
	files []*os.File
	keys  []string
}

// handedOver is the wire form, in the environment.
type handedOver struct {
	PID       int
	Began     time.Time
	Listeners []handedListener
}

type handedListener struct {
	Key string // how it was asked for, see socket
	FD  int
}

// keep takes a copy of a listening socket, which goes on listening when l is closed.
func (s *Successor) keep(key string, l net.Listener) error {
	f, ok := l.(interface{ File() (*os.File, error) })
	if !ok {
		return fmt.Errorf("%s cannot be handed over", key)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	file, err := f.File()
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	s.files, s.keys = append(s.files, file), append(s.keys, key)
	return nil
}

// Exec becomes the program at path. It returns only when that fails.
func (s *Successor) Exec(path string, args []string) error {
	told := handedOver{PID: os.Getpid(), Began: s.began}
	for i, f := range s.files {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("hand over %s: %w", s.keys[i], err)
		}
		told.Listeners = append(told.Listeners, handedListener{s.keys[i], int(f.Fd())})
	}
	b, err := json.Marshal(told)
	if err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	environment := append(os.Environ(), handOverVariable+"="+string(b))
	if err := unix.Exec(path, args, environment); err != nil {
		return fmt.Errorf("start %s: %w", path, err)
	}
	return nil
}

// inheritance is what the process before has kept.
type inheritance struct {
	began     time.Time // the zero time: there was none before
	listeners map[string]net.Listener
}

// inherit reads the environment, and removes it for processes to come.
func inherit() (inheritance, error) {
	text, ok := os.LookupEnv(handOverVariable)
	if !ok {
		return inheritance{}, nil
	}
	if err := os.Unsetenv(handOverVariable); err != nil {
		return inheritance{}, err
	}
	var told handedOver
	if err := json.NewDecoder(strings.NewReader(text)).Decode(&told); err != nil {
		return inheritance{}, fmt.Errorf("%s: %w", handOverVariable, err)
	}
	if told.PID != os.Getpid() {
		return inheritance{}, nil // meant for another process
	}
	i := inheritance{began: told.Began, listeners: map[string]net.Listener{}}
	for _, h := range told.Listeners {
		if h.FD < 3 {
			return i, fmt.Errorf("%s: descriptor %d", handOverVariable, h.FD)
		}
		f := os.NewFile(uintptr(h.FD), h.Key)
		l, err := net.FileListener(f)
		_ = f.Close() // the listener has a descriptor of its own
		if err != nil {
			i.close()
			return i, fmt.Errorf("%s: %s: %w", handOverVariable, h.Key, err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(true)
		}
		i.listeners[h.Key] = l
	}
	return i, nil
}

// take gives a listener that was kept; nil: there is none of that key.
func (i *inheritance) take(key string) net.Listener {
	l := i.listeners[key]
	delete(i.listeners, key)
	return l
}

// close closes what nobody took: sockets that are not configured any more.
func (i *inheritance) close() {
	for _, l := range i.listeners {
		_ = l.Close() // nobody is served on it
	}
	i.listeners = nil
}
