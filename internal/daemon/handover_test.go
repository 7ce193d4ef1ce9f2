package daemon

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestHandOver becomes another program, with a socket, twice over.
func TestHandOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	child := exec.Command(os.Args[0], "-test.run", "^TestHandOverChild$", "-test.v")
	child.Env = append(os.Environ(), "ASHLAR_HANDOVER_CHILD="+path)
	out, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "went on listening") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestHandOverChild is the process that TestHandOver starts.
func TestHandOverChild(t *testing.T) {
	path := os.Getenv("ASHLAR_HANDOVER_CHILD")
	if path == "" {
		t.Skip("is run by TestHandOver")
	}
	i, err := inherit()
	if err != nil {
		t.Fatal(err)
	}
	if i.began.IsZero() { // the first life
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		other, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := &Successor{}
		s.began = s.began.AddDate(2000, 0, 0)
		for key, l := range map[string]net.Listener{"one": l, "gone": other} {
			if err := s.keep(key, l); err != nil {
				t.Fatal(err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Exec(path+".nothing", os.Args); err == nil {
			t.Fatal("a program that is not there was started")
		}
		// The socket's backlog holds a client that came between the two lives.
		if _, err := net.Dial("unix", path); err != nil {
			t.Fatal(err)
		}
		t.Fatal(s.Exec(os.Args[0], os.Args))
	}
	l := i.take("one")
	if l == nil || i.take("one") != nil || i.take("two") != nil {
		t.Fatalf("%v, and then something else", l)
	}
	if len(i.listeners) != 1 {
		t.Errorf("%d others", len(i.listeners))
	}
	i.close()
	if _, ok := os.LookupEnv(handOverVariable); ok {
		t.Error("the variable is left for children")
	}
	go func() { _, _ = net.Dial("unix", path) }() // the client of this life
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket's name is left: %v", err)
	}
	t.Log("went on listening")
}

func TestInheritRefusesNonsense(t *testing.T) {
	mine := strconv.Itoa(os.Getpid())
	for text, want := range map[string]string{
		"{": "unexpected", "[]": "cannot unmarshal",
		`{"PID":` + mine + `,"Listeners":[{"Key":"x","FD":1}]}`:        "descriptor 1",
		`{"PID":` + mine + `,"Listeners":[{"Key":"x","FD":1000000}]}`:  "x",
		`{"PID":1,"Began":"2020-01-01T00:00:00Z"}`:                     "",
		`{"PID":` + mine + `,"Began":"never"}`:                         "parsing time",
		`{"PID":` + mine + `,"Listeners":[{"Key":"x","FD":-5}],"A":1}`: "descriptor -5",
	} {
		t.Setenv(handOverVariable, text)
		i, err := inherit()
		if want == "" {
			if err != nil || !i.began.IsZero() {
				t.Errorf("%s: %v, %v", text, i.began, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v does not say %q", text, err, want)
		}
	}
}

// TestKeepNeedsAFile: a listener that is no socket cannot be handed over.
func TestKeepNeedsAFile(t *testing.T) {
	if err := new(Successor).keep("odd", oddListener{}); err == nil || !strings.Contains(err.Error(), "odd") {
		t.Errorf("%v", err)
	}
}

type oddListener struct{ net.Listener }
