package kube

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

const chart = "../../deploy/helm/ashlar"

// rendered is what the tests here look at of an object that the chart makes.
type rendered struct {
	Kind     string                      `yaml:"kind"`
	Metadata metadata                    `yaml:"metadata"`
	Data     map[string]string           `yaml:"data"`
	RoleRef  struct{ Kind, Name string } `yaml:"roleRef"`
	Subjects []struct{ Kind, Name, Namespace string }
	Rules    []struct {
		NonResourceURLs []string `yaml:"nonResourceURLs"`
		Verbs           []string
	}
	Provisioner   string   `yaml:"provisioner"`
	ReclaimPolicy string   `yaml:"reclaimPolicy"`
	MountOptions  []string `yaml:"mountOptions"`
	Spec          struct {
		Selector any
		Ports    []struct {
			Name       string
			TargetPort string `yaml:"targetPort"`
			Port       int
		}
		Endpoints []struct{ Port, Scheme, Interval string }
		Template  struct {
			Metadata metadata
			Spec     struct {
				ServiceAccountName string `yaml:"serviceAccountName"`
				Containers         []renderedContainer
				Volumes            []struct{ Name string }
			}
		}
	}
}

type metadata struct {
	Name   string
	Labels map[string]string
}

type renderedContainer struct {
	Name         string
	Args         []string
	VolumeMounts []struct{ Name string } `yaml:"volumeMounts"`
	Resources    struct{ Limits map[string]string }
	Security     struct {
		Privileged      bool
		AllowEscalation *bool `yaml:"allowPrivilegeEscalation"`
	} `yaml:"securityContext"`
	Ports []struct {
		Name          string
		ContainerPort int `yaml:"containerPort"`
	}
	Lifecycle struct {
		PostStart struct {
			Exec struct{ Command []string }
		} `yaml:"postStart"`
	}
}

// renderChart renders the chart with helm's options.
func renderChart(t *testing.T, options ...string) []rendered {
	t.Helper()
	if os.Getenv("HELM") == "" {
		t.Skip("needs helm in HELM (make test-kube sets it)")
	}
	file := filepath.Join(t.TempDir(), "ashlar.yaml")
	if out, err := exec.CommandContext(t.Context(), "../../deploy/render.sh", append([]string{file}, options...)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // only read
	var objects []rendered
	for decoder := yaml.NewDecoder(f); ; {
		var o rendered
		if err := decoder.Decode(&o); errors.Is(err, io.EOF) {
			return objects
		} else if err != nil {
			t.Fatal(err)
		}
		if o.Kind != "" {
			objects = append(objects, o)
		}
	}
}

func find(t *testing.T, objects []rendered, kind, name string) rendered {
	t.Helper()
	i := slices.IndexFunc(objects, func(o rendered) bool { return o.Kind == kind && o.Metadata.Name == name })
	if i < 0 {
		t.Fatalf("no %s %s", kind, name)
	}
	return objects[i]
}

func (o rendered) container(t *testing.T, name string) renderedContainer {
	t.Helper()
	all := o.Spec.Template.Spec.Containers
	i := slices.IndexFunc(all, func(c renderedContainer) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("%s has no container %s", o.Metadata.Name, name)
	}
	return all[i]
}

// picks says whether labels have all that a selector names.
func picks(selector any, labels map[string]string) bool {
	m, ok := selector.(map[string]any)
	for key, value := range m {
		ok = ok && labels[key] == value
	}
	return ok && len(m) > 0
}

// TestMetricsOfTheChartAreReached follows the way of Prometheus: ServiceMonitor, Service,
// the proxy's port, the address behind it, and who may ask.
func TestMetricsOfTheChartAreReached(t *testing.T) {
	objects := renderChart(t, "--set", "serviceMonitor.enabled=true,serviceMonitor.interval=17s,serviceMonitor.labels.release=prometheus")
	monitor := find(t, objects, "ServiceMonitor", "ashlar")
	if monitor.Metadata.Labels["release"] != "prometheus" || len(monitor.Spec.Endpoints) != 1 {
		t.Fatalf("%+v", monitor)
	}
	if e := monitor.Spec.Endpoints[0]; e.Port != "metrics" || e.Scheme != "https" || e.Interval != "17s" {
		t.Errorf("endpoint %+v", e)
	}
	selector, _ := monitor.Spec.Selector.(map[string]any)
	text, err := yaml.Marshal(selector["matchExpressions"])
	if err != nil {
		t.Fatal(err)
	}
	binding := find(t, objects, "ClusterRoleBinding", "ashlar-metrics")
	if binding.RoleRef.Name != "system:auth-delegator" {
		t.Errorf("the proxy's role is %+v", binding.RoleRef)
	}
	reader := find(t, objects, "ClusterRole", "ashlar-metrics-reader")
	if len(reader.Rules) != 1 || !slices.Equal(reader.Rules[0].NonResourceURLs, []string{"/metrics"}) || !slices.Equal(reader.Rules[0].Verbs, []string{"get"}) {
		t.Errorf("who scrapes may %+v", reader.Rules)
	}
	config := find(t, objects, "ConfigMap", "ashlar").Data["serve.yaml"]
	for _, c := range []struct{ set, container, service, listens string }{
		{"ashlar-daemon", "daemon", "ashlar-metrics", config},
		{"ashlar-csi", "csi", "ashlar-csi-metrics", ""},
	} {
		set, service := find(t, objects, "DaemonSet", c.set), find(t, objects, "Service", c.service)
		if !picks(selector["matchLabels"], service.Metadata.Labels) || !strings.Contains(string(text), service.Metadata.Labels["app.kubernetes.io/component"]) {
			t.Errorf("the ServiceMonitor does not pick %s: %v", c.service, selector)
		}
		if !picks(service.Spec.Selector, set.Spec.Template.Metadata.Labels) {
			t.Errorf("%s does not pick the pods of %s: %v", c.service, c.set, service.Spec.Selector)
		}
		proxy := set.container(t, "metrics-proxy")
		if len(service.Spec.Ports) != 1 || len(proxy.Ports) != 1 {
			t.Fatalf("%s: ports %v of %v", c.service, service.Spec.Ports, proxy.Ports)
		}
		port := proxy.Ports[0]
		if service.Spec.Ports[0].Name != "metrics" || service.Spec.Ports[0].TargetPort != port.Name || service.Spec.Ports[0].Port != port.ContainerPort {
			t.Errorf("%s: ports %v of %v", c.service, service.Spec.Ports, proxy.Ports)
		}
		if !slices.Contains(proxy.Args, "--secure-listen-address=0.0.0.0:"+strconv.Itoa(port.ContainerPort)) || !slices.Contains(proxy.Args, "--allow-paths=/metrics") {
			t.Errorf("%s: %q", c.set, proxy.Args)
		}
		if c.listens == "" {
			c.listens = strings.Join(set.container(t, c.container).Args, "\n")
		}
		upstream := regexp.MustCompile(`--upstream=http://([0-9.:]+)/`).FindStringSubmatch(strings.Join(proxy.Args, " "))
		if upstream == nil || !regexp.MustCompile(`metrics(=|: )`+regexp.QuoteMeta(upstream[1])+`\b`).MatchString(c.listens) {
			t.Errorf("%s: the proxy asks %v, metrics are at %s", c.set, upstream, c.listens)
		}
		account := set.Spec.Template.Spec.ServiceAccountName
		if !slices.ContainsFunc(binding.Subjects, func(s struct{ Kind, Name, Namespace string }) bool { return s.Name == account }) {
			t.Errorf("%s: %s may not ask who a client is", c.set, account)
		}
		for _, m := range proxy.VolumeMounts {
			if !slices.ContainsFunc(set.Spec.Template.Spec.Volumes, func(v struct{ Name string }) bool { return v.Name == m.Name }) {
				t.Errorf("%s: there is no volume %s", c.set, m.Name)
			}
		}
		if s := proxy.Security; len(proxy.VolumeMounts) == 0 || s.Privileged || s.AllowEscalation == nil || *s.AllowEscalation || proxy.Resources.Limits["memory"] == "" {
			t.Errorf("%s: %+v", c.set, proxy)
		}
	}
}

// TestDisksOfTheChartBecomeAPoolOnce runs the hook of the daemon's container.
func TestDisksOfTheChartBecomeAPoolOnce(t *testing.T) {
	objects := renderChart(t, "--set", "pool.name=fast,pool.disks={/dev/disk/by-partlabel/one,/dev/vdb}")
	if config := find(t, objects, "ConfigMap", "ashlar").Data["serve.yaml"]; strings.Contains(config, "default-pool") {
		t.Errorf("there is a pool in a file besides:\n%s", config)
	}
	command := find(t, objects, "DaemonSet", "ashlar-daemon").container(t, "daemon").Lifecycle.PostStart.Exec.Command
	if len(command) < 4 {
		t.Fatalf("%q", command)
	}
	for i, word := range command { // the log of a container is its first process'
		command[i] = strings.ReplaceAll(word, "/proc/1/fd/2", "/dev/null")
	}
	const (
		create = "pool create fast /dev/disk/by-partlabel/one /dev/vdb"
		found  = "pool import --name fast /dev/disk/by-partlabel/one /dev/vdb"
	)
	for _, c := range []struct {
		name, fake string // what ashlar does
		want       []string
	}{
		{"there is none", `[ "$2" != status ] && [ "$2" != import ]`, []string{"pool list", "pool status fast", found, create}},
		{"only the disks have it", `[ "$2" != status ]`, []string{"pool list", "pool status fast", found}},
		{"it is there", `true`, []string{"pool list", "pool status fast"}},
		{"it cannot be made", `[ "$2" = list ]`, []string{"pool list", "pool status fast", found, create}},
		{"the daemon is slow", `[ "$2" != status ] && [ "$2" != import ] && [ "$(wc -l <"$0.asked")" -gt 1 ]`, []string{"pool list", "pool list", "pool status fast", found, create}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			fake := filepath.Join(dir, "ashlar")
			if err := os.WriteFile(fake, []byte("#!/bin/sh\necho \"$*\" >>\"$0.asked\"\n"+c.fake+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			hook := exec.CommandContext(t.Context(), command[0], command[1:]...)
			hook.Env = []string{"PATH=" + dir + ":/usr/bin:/bin"}
			if out, err := hook.CombinedOutput(); err != nil { // it would end the container
				t.Fatalf("%v\n%s", err, out)
			}
			asked, err := os.ReadFile(fake + ".asked")
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Split(strings.TrimSpace(string(asked)), "\n"); !slices.Equal(got, c.want) {
				t.Errorf("it asked %q, want %q", got, c.want)
			}
		})
	}
}

func TestClassesOfTheChartTakeTheirOptions(t *testing.T) {
	objects := renderChart(t, "--set", "storageClasses[0].name=kept,storageClasses[0].reclaimPolicy=Retain,storageClasses[0].mountOptions={noatime,discard},storageClasses[0].parameters.thick=true")
	class := find(t, objects, "StorageClass", "kept")
	if class.ReclaimPolicy != "Retain" || !slices.Equal(class.MountOptions, []string{"noatime", "discard"}) {
		t.Errorf("%+v", class)
	}
	if class = find(t, renderChart(t), "StorageClass", "ashlar-xfs"); class.ReclaimPolicy != "Delete" || len(class.MountOptions) != 0 {
		t.Errorf("%+v", class)
	}
}

// TestValuesOfTheChartAreAllThere wants each value that a template takes in values.yaml,
// and nothing there that none takes.
func TestValuesOfTheChartAreAllThere(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(chart, "templates/*"))
	if err != nil {
		t.Fatal(err)
	}
	taken := map[string]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\.Values((?:\.[A-Za-z]+)+)`).FindAllStringSubmatch(string(text), -1) {
			taken[m[1][1:]] = true
		}
		// What is taken of the elements of a list of classes.
		list := ""
		for line := range strings.Lines(string(text)) {
			if m := regexp.MustCompile(`range \.Values\.([A-Za-z.]*[Cc]lasses)`).FindStringSubmatch(line); m != nil {
				list = m[1]
			}
			if m := regexp.MustCompile(`\{\{-? ?(?:if |with |toYaml )?\.([a-zA-Z]+)`).FindStringSubmatch(line); m != nil && m[1] != "Values" && m[1] != "Release" && list != "" {
				if !hasField(at(values, list), m[1]) {
					t.Errorf("%s: no element of %s in values.yaml shows %s", filepath.Base(file), list, m[1])
				}
			}
		}
	}
	for path := range taken {
		if at(values, path) == nil {
			t.Errorf("values.yaml has no %s", path)
		}
	}
	for _, path := range leaves(values, "") {
		if !takenAbove(taken, path) {
			t.Errorf("no template takes %s", path)
		}
	}
}

// at is the value at a path, nil where there is none.
func at(values map[string]any, path string) any {
	var v any = values
	for _, name := range strings.Split(path, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		if v, ok = m[name]; !ok {
			return nil
		}
	}
	return v
}

func hasField(list any, name string) bool {
	elements, _ := list.([]any)
	return slices.ContainsFunc(elements, func(e any) bool {
		m, _ := e.(map[string]any)
		_, ok := m[name]
		return ok
	})
}

// leaves are the paths of all values that are not sets of others.
func leaves(values map[string]any, prefix string) (paths []string) {
	for name, v := range values {
		if m, ok := v.(map[string]any); ok && len(m) > 0 {
			paths = append(paths, leaves(m, prefix+name+".")...)
		} else {
			paths = append(paths, prefix+name)
		}
	}
	return paths
}

// takenAbove says whether a path, or a set it is in, is taken.
func takenAbove(taken map[string]bool, path string) bool {
	for ; path != ""; path = path[:max(0, strings.LastIndex(path, "."))] {
		if taken[path] {
			return true
		}
	}
	return false
}
