package packaging

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const steps = 7 // of testdata/install.sh, the one that needs systemd-analyze aside

func TestPackageInstallsUpgradesAndLeavesDataAlone(t *testing.T) {
	deb := os.Getenv("ASHLAR_DEB")
	if deb == "" {
		t.Skip("needs the package in ASHLAR_DEB (make test-deb does not skip it)")
	}
	testenv.RequireRoot(t)
	testenv.RequireCommand(t, "dpkg-deb", "dpkg")
	unshare := testenv.RequireCommand(t, "unshare", "util-linux")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, unshare, "--mount", "--pid", "--net", "--fork", "--kill-child", "testdata/install.sh", deb)
	command.WaitDelay = time.Second
	out, err := command.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("%v", err)
	}
	if passed := strings.Count(string(out), "ok "); passed < steps {
		t.Errorf("%d steps passed, want %d", passed, steps)
	}
}
