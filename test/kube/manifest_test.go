package kube

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

const manifest = "../../deploy/ashlar.yaml"

// object is what the tests here look at of an object of the manifest.
type object struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name      string `yaml:"name"`
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Rules []struct {
		APIGroups []string `yaml:"apiGroups"`
		Resources []string `yaml:"resources"`
		Verbs     []string `yaml:"verbs"`
	} `yaml:"rules"`
	Provisioner string `yaml:"provisioner"`
	Spec        struct {
		Template struct {
			Spec podSpec `yaml:"spec"`
		} `yaml:"template"`
	} `yaml:"spec"`
}

type podSpec struct {
	HostNetwork                  bool        `yaml:"hostNetwork"`
	HostPID                      bool        `yaml:"hostPID"`
	HostIPC                      bool        `yaml:"hostIPC"`
	PriorityClassName            string      `yaml:"priorityClassName"`
	AutomountServiceAccountToken *bool       `yaml:"automountServiceAccountToken"`
	InitContainers               []container `yaml:"initContainers"`
	Containers                   []container `yaml:"containers"`
}

type container struct {
	Name      string   `yaml:"name"`
	Image     string   `yaml:"image"`
	Args      []string `yaml:"args"`
	Resources struct {
		Requests map[string]string `yaml:"requests"`
		Limits   map[string]string `yaml:"limits"`
	} `yaml:"resources"`
	SecurityContext struct {
		Privileged             bool  `yaml:"privileged"`
		ReadOnlyRootFilesystem bool  `yaml:"readOnlyRootFilesystem"`
		AllowEscalation        *bool `yaml:"allowPrivilegeEscalation"`
	} `yaml:"securityContext"`
	VolumeMounts []struct {
		Name             string `yaml:"name"`
		MountPath        string `yaml:"mountPath"`
		MountPropagation string `yaml:"mountPropagation"`
	} `yaml:"volumeMounts"`
}

func readManifest(t *testing.T) []object {
	t.Helper()
	f, err := os.Open(manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // only read
	var objects []object
	decoder := yaml.NewDecoder(f)
	for {
		var o object
		if err := decoder.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if o.Kind != "" {
			objects = append(objects, o)
		}
	}
	return objects
}

// The sum is what deploy/render.sh writes: of the lines of sha256sum of all files.
func TestManifestIsRenderedFromThisChart(t *testing.T) {
	const chart = "../../deploy/helm/ashlar"
	sums := map[string]string{}
	err := filepath.WalkDir(chart, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		below, err := filepath.Rel(chart, name)
		sums["./"+filepath.ToSlash(below)] = fmt.Sprintf("%x", sha256.Sum256(text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		fmt.Fprintf(&lines, "%s  %s\n", sums[name], name)
	}
	want := fmt.Sprintf("# chart %x\n", sha256.Sum256([]byte(lines.String())))
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), want) {
		t.Errorf("%s is not rendered from the chart as it is now (%s); run make manifest", manifest, strings.TrimSpace(want))
	}
}

func TestContainersOfTheManifestAskForNoMoreThanTheyNeed(t *testing.T) {
	privileged := []string{"daemon", "csi"} // docs/kubernetes.md says why
	bidirectional := map[string]string{"daemon": "/var/lib/ashlar", "csi": "/var/lib/kubelet"}
	sets := 0
	for _, o := range readManifest(t) {
		if o.Kind != "DaemonSet" {
			continue
		}
		sets++
		pod := o.Spec.Template.Spec
		if pod.HostNetwork || pod.HostPID || pod.HostIPC {
			t.Errorf("%s: uses namespaces of the host", o.Metadata.Name)
		}
		if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
			t.Errorf("%s: every container gets a token of the API", o.Metadata.Name)
		}
		if pod.PriorityClassName == "" {
			t.Errorf("%s: has no priority class", o.Metadata.Name)
		}
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			if _, tag, ok := strings.Cut(c.Image[strings.LastIndex(c.Image, "/")+1:], ":"); !ok || tag == "latest" || tag == "" {
				t.Errorf("%s: image %q has no version", c.Name, c.Image)
			}
			if c.Resources.Requests["cpu"] == "" || c.Resources.Requests["memory"] == "" || c.Resources.Limits["memory"] == "" {
				t.Errorf("%s: resources are missing", c.Name)
			}
			if c.SecurityContext.Privileged != slices.Contains(privileged, c.Name) {
				t.Errorf("%s: privileged is %v", c.Name, c.SecurityContext.Privileged)
			}
			if !c.SecurityContext.ReadOnlyRootFilesystem {
				t.Errorf("%s: can write to its root", c.Name)
			}
			if !c.SecurityContext.Privileged && (c.SecurityContext.AllowEscalation == nil || *c.SecurityContext.AllowEscalation) {
				t.Errorf("%s: may escalate its privileges", c.Name)
			}
			for _, m := range c.VolumeMounts {
				if m.MountPropagation != "" && bidirectional[c.Name] != m.MountPath {
					t.Errorf("%s: %s propagates mounts", c.Name, m.MountPath)
				}
				if m.Name == "api-access" && c.SecurityContext.Privileged {
					t.Errorf("%s: is privileged, and has a token of the API", c.Name)
				}
			}
		}
	}
	if sets != 3 {
		t.Errorf("%d DaemonSets, want 3", sets)
	}
}

func TestRolesOfTheManifestNameWhatTheyGive(t *testing.T) {
	for _, o := range readManifest(t) {
		for _, rule := range o.Rules {
			for _, words := range [][]string{rule.APIGroups, rule.Resources, rule.Verbs} {
				if slices.Contains(words, "*") {
					t.Errorf("%s %s: gives *", o.Kind, o.Metadata.Name)
				}
			}
			if slices.Contains(rule.Resources, "secrets") {
				t.Errorf("%s %s: may read secrets", o.Kind, o.Metadata.Name)
			}
		}
	}
}

// The versions that the test cluster builds are those that the manifest names.
func TestSidecarsOfTheManifestAreTheTestedOnes(t *testing.T) {
	modules, err := os.ReadFile("cluster/tools/sidecars/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, o := range readManifest(t) {
		for _, c := range o.Spec.Template.Spec.Containers {
			name, version, ok := strings.Cut(strings.TrimPrefix(c.Image, "registry.k8s.io/sig-storage/csi-"), ":")
			if !ok || !strings.HasPrefix(c.Image, "registry.k8s.io/sig-storage/csi-") {
				continue
			}
			found++
			major, _, _ := strings.Cut(version, ".")
			if want := fmt.Sprintf("github.com/kubernetes-csi/external-%s/%s %s", name, major, version); !strings.Contains(string(modules), want) {
				t.Errorf("%s: the tests build another version (cluster/tools/sidecars/go.mod)", c.Image)
			}
		}
	}
	if found != 3 {
		t.Errorf("%d sidecars, want 3", found)
	}
}

// The same for the sidecar that is off by default, so not in the manifest.
func TestSnapshotMetadataOfTheChartIsTheTestedOne(t *testing.T) {
	values, err := os.ReadFile("../../deploy/helm/ashlar/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	modules, err := os.ReadFile("cluster/tools/metadata/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	_, version, ok := strings.Cut(string(values), "/csi-snapshot-metadata:")
	version, _, _ = strings.Cut(version, "\n")
	if !ok || !strings.Contains(string(modules), "github.com/kubernetes-csi/external-snapshot-metadata "+version) {
		t.Errorf("csi-snapshot-metadata:%s: the tests build another version (cluster/tools/metadata/go.mod)", version)
	}
}
