package csi

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
)

// What csi-sanity v5.6.0 has: the specs that run for the capabilities the driver
// declares. The others are of ControllerPublishVolume, which a driver of node-local
// volumes has no use for, and one that is pending for everybody.
const (
	sanityRun     = 92
	sanitySkipped = 10
)

// sanityVariable has the run of one mode in a process of its own, since ginkgo runs
// one suite in each.
const sanityVariable = "ASHLAR_SANITY"

// sanityRunOf is what a run of csi-sanity is told, and tells.
type sanityRunOf struct {
	Access, FSType          string
	Dir, Endpoint           string
	Passed, Failed, Skipped int
}

func TestSanity(t *testing.T) {
	require(t)
	for _, c := range []struct{ name, access, fs string }{
		{"ext4", "mount", "ext4"},
		{"xfs", "mount", "xfs"},
		{"block", "block", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, "40GiB")
			result := w.path("sanity.json")
			run, err := json.Marshal(sanityRunOf{Access: c.access, FSType: c.fs, Dir: w.dir, Endpoint: "unix://" + w.path("csi.sock")})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(result, run, 0o600); err != nil {
				t.Fatal(err)
			}
			command := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestSanitySuite$", "-test.v")
			command.Env = append(os.Environ(), sanityVariable+"="+result)
			out, err := command.CombinedOutput()
			if err != nil {
				t.Errorf("csi-sanity: %v\n%s", err, out)
			}
			text, err := os.ReadFile(result)
			if err != nil {
				t.Fatal(err)
			}
			var told sanityRunOf
			if err := json.Unmarshal(text, &told); err != nil {
				t.Fatal(err)
			}
			t.Logf("csi-sanity %s: %d passed, %d failed, %d skipped", c.name, told.Passed, told.Failed, told.Skipped)
			if told.Passed != sanityRun || told.Failed != 0 || told.Skipped != sanitySkipped {
				t.Errorf("%d specs passed, %d failed, %d were skipped; want %d, 0, %d", told.Passed, told.Failed, told.Skipped, sanityRun, sanitySkipped)
			}
		})
	}
}

// TestSanitySuite is the process that TestSanity starts.
func TestSanitySuite(t *testing.T) {
	path := os.Getenv(sanityVariable)
	if path == "" {
		t.Skip("TestSanity runs it")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var run sanityRunOf
	if err := json.Unmarshal(text, &run); err != nil {
		t.Fatal(err)
	}
	c := sanity.NewTestConfig()
	c.Address = run.Endpoint
	c.TargetPath, c.StagingPath = filepath.Join(run.Dir, "target"), filepath.Join(run.Dir, "staging")
	c.TestVolumeAccessType = run.Access
	c.TestVolumeSize, c.TestVolumeExpandSize = 512*mib, gib
	c.TestVolumeParameters = map[string]string{}
	if run.FSType != "" {
		c.TestVolumeParameters["fsType"] = run.FSType
	}
	c.TestVolumeMutableParameters = map[string]string{"iopsLimit": "50k"}
	// csi-sanity compares a topology that it sent with one that it got field by
	// field, also the size that protobuf keeps in a message it has encoded. So what
	// comes is encoded once, too.
	c.DialOptions = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
			err := invoke(ctx, method, request, reply, conn, options...)
			if m, ok := reply.(proto.Message); ok && err == nil && strings.HasSuffix(method, "/CreateSnapshot") {
				_, err = proto.Marshal(m)
			}
			return err
		})}
	suite := sanity.GinkgoTest(&c)
	defer suite.Finalize()
	gomega.RegisterFailHandler(ginkgo.Fail)
	ginkgo.ReportAfterSuite("count", func(r types.Report) {
		for _, s := range r.SpecReports.WithLeafNodeType(types.NodeTypeIt) {
			switch {
			case s.State == types.SpecStatePassed:
				run.Passed++
			case s.Failed():
				run.Failed++
			case s.State == types.SpecStateSkipped:
				run.Skipped++
			}
		}
	})
	ginkgo.RunSpecs(t, "csi-sanity")
	text, err = json.Marshal(run)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}
