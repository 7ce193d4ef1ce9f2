package csi

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// Command runs a program with stdin as its standard input, and gives what it
// printed. An error that is an *exec.ExitError has the exit code; its text has what
// the program said. Secrets go to stdin only.
type Command func(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error)

// outputMax bounds what of a program's words goes into an error.
const outputMax = 512

// execCommand is the Command that runs programs of the host.
func execCommand(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Stdin = bytes.NewReader(stdin)
	out, err := c.CombinedOutput()
	if err != nil {
		said := strings.TrimSpace(string(out))
		if len(said) > outputMax {
			said = said[:outputMax] + " …"
		}
		return out, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return out, nil
}

// joined makes one line of several sentences.
func joined(sentences []string) string { return strings.Join(sentences, "; ") }
