package testenv

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

const childVariable = "ASHLAR_TESTENV_CHILD"

func TestMain(m *testing.M) {
	switch words := os.Getenv(childVariable); words {
	case "":
		os.Exit(m.Run())
	case "silent":
	case "hang":
		time.Sleep(time.Minute)
	case "namespace", "namespace fail":
		if !InNamespace() {
			os.Exit(RunInNamespace())
		}
		where, _ := os.Readlink("/proc/self/ns/mnt") // "" fails the test
		fmt.Println(where)
		if words != "namespace" {
			os.Exit(5)
		}
	default:
		fmt.Println(words)
		fmt.Fprintln(os.Stderr, "beside it")
		if order, _ := io.ReadAll(os.Stdin); string(order) == "fail" {
			os.Exit(3)
		}
	}
}

func TestChildDoesWhatItIsTold(t *testing.T) {
	c := NewChild(childVariable + "=here I am")
	c.Start(t)
	if c.End(t, ""); c.Said != "here I am" || c.Errors.String() != "beside it\n" {
		t.Errorf("it says %q, %q", c.Said, c.Errors.String())
	}
	c = NewChild(childVariable + "=here I am")
	c.Start(t)
	if r := record(t, func(tb testing.TB) { c.End(tb, "fail") }); !strings.Contains(r.failed, "exit status 3") || !strings.Contains(r.failed, "beside it") {
		t.Errorf("one that fails: %q", r.failed)
	}
	c = NewChild(childVariable + "=here I am")
	c.Start(t)
	if c.Kill(); c.Command.ProcessState.Success() {
		t.Error("it was not killed")
	}
	c.EndAnyhow()
}

func TestChildThatDoesNotStart(t *testing.T) {
	for words, want := range map[string]string{"silent": `says ""`, "error: no disk": "no disk", "hang": "time.Sleep("} {
		c := NewChild(childVariable + "=" + words)
		if words == "hang" {
			c.limit = 100 * time.Millisecond
		}
		if r := record(t, func(tb testing.TB) { c.Start(tb) }); !strings.Contains(r.failed, want) {
			t.Errorf("%s: %q", words, r.failed)
		}
	}
}
