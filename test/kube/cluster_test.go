package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/template"
	"time"
)

// slow is how many times longer than usual to wait; KUBE_SLOW says so in an emulated machine.
var slow = func() time.Duration {
	n, err := strconv.ParseUint(os.Getenv("KUBE_SLOW"), 10, 8)
	if err != nil || n == 0 {
		return 1
	}
	return time.Duration(n)
}()

// patience bounds every wait for one thing: nodes that share two busy CPUs are slow.
var patience = 4 * time.Minute * slow

// pause is between two looks, each of which starts a kubectl: seconds of work where
// everything is slow, and what is waited for wants them too.
var pause = func() time.Duration {
	if slow > 1 {
		return time.Second * slow
	}
	return 300 * time.Millisecond
}()

// cluster is the one that cluster/up.sh started.
type cluster struct {
	t *testing.T
}

// requireCluster skips t outside make test-kube.
func requireCluster(t *testing.T) cluster {
	t.Helper()
	if os.Getenv("ASHLAR_KUBE") == "" {
		t.Skip("needs a Kubernetes cluster (make test-kube does not skip it)")
	}
	return cluster{t}
}

func (c cluster) try(stdin string, args ...string) (string, error) {
	command := exec.Command("cluster/kubectl", args...)
	command.Stdin = strings.NewReader(stdin)
	var out, errors bytes.Buffer
	command.Stdout, command.Stderr = &out, &errors
	if err := command.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errors.String()))
	}
	return out.String(), nil
}

func (c cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.try("", args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// field is one field of an object, "" while it is not there.
func (c cluster) field(object, path string) string {
	out, err := c.try("", "get", object, "--output", "jsonpath={"+path+"}")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(out)
}

// apply makes objects of a template in the namespace default.
func (c cluster) apply(text string, values any) {
	c.t.Helper()
	var out bytes.Buffer
	if err := template.Must(template.New("objects").Parse(text)).Execute(&out, values); err != nil {
		c.t.Fatal(err)
	}
	args := []string{"apply", "--filename", "-"}
	if slow > 1 {
		args = append(args, "--validate=false") // or the server describes all of its types each time
	}
	// A claim or a pod may be refused for a moment while the cluster starts.
	var err error
	for range 10 {
		if _, err = c.try(out.String(), args...); err == nil {
			return
		}
		time.Sleep(time.Second)
	}
	c.t.Fatalf("%v\n%s", err, out.String())
}

// until waits for a condition that says what it sees.
func (c cluster) until(what string, condition func() (bool, string)) {
	c.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(pause) {
		ok, seen := condition()
		if ok {
			return
		}
		if time.Now().After(end) {
			c.t.Fatalf("%s: not within %v; seen: %s", what, patience, seen)
		}
	}
}

// untilField waits for a field to have a value.
func (c cluster) untilField(object, path, want string) {
	c.t.Helper()
	c.until(fmt.Sprintf("%s of %s is %q", path, object, want), func() (bool, string) {
		got := c.field(object, path)
		return got == want, got
	})
}

// pod is what a pod of the tests is made of. A script writes back with `sync -f /data`:
// Without -f it waits for every file system of the machine, those of others too.
type pod struct {
	Name, Script string
	Step         string // label, by which it is deleted
	Node         string // "": where the scheduler wants
	Claim        string // mounted at /data, or the device /dev/volume
	Block        bool
	Class, Size  string // of a generic ephemeral volume instead of a claim
	HostPath     string // instead of a claim
}

const podTemplate = `
apiVersion: v1
kind: Pod
metadata: {name: {{.Name}}, labels: {step: {{.Step}}}}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  restartPolicy: Never
  terminationGracePeriodSeconds: 2
  {{- if .Node}}
  nodeSelector: {kubernetes.io/hostname: {{.Node}}}
  {{- end}}
  containers:
    - name: main
      image: test.local/tools:1
      imagePullPolicy: Never
      args: [{{printf "%q" .Script}}]
      {{- if .Block}}
      volumeDevices: [{name: data, devicePath: /dev/volume}]
      {{- else}}
      volumeMounts: [{name: data, mountPath: /data}]
      {{- end}}
  volumes:
    - name: data
      {{- if .Claim}}
      persistentVolumeClaim: {claimName: {{.Claim}}}
      {{- else if .HostPath}}
      hostPath: {path: {{.HostPath}}, type: DirectoryOrCreate}
      {{- else}}
      ephemeral:
        volumeClaimTemplate:
          metadata: {labels: {step: {{.Step}}}}
          spec:
            accessModes: [ReadWriteOnce]
            storageClassName: {{.Class}}
            resources: {requests: {storage: {{.Size}}}}
      {{- end}}
`

func (c cluster) start(p pod) {
	c.t.Helper()
	c.apply(podTemplate, p)
}

// run starts a pod whose script ends, waits for it, and returns what it printed. The
// pod stays, so that its volume stays mounted, unless it is deleted.
func (c cluster) run(p pod) string {
	c.t.Helper()
	c.start(p)
	return c.succeeded(p.Name)
}

func (c cluster) succeeded(name string) string {
	c.t.Helper()
	c.until("pod "+name+" succeeds", func() (bool, string) {
		phase := c.field("pod/"+name, ".status.phase")
		if phase == "Failed" {
			logs, _ := c.try("", "logs", name)
			c.t.Fatalf("pod %s failed:\n%s", name, logs)
		}
		return phase == "Succeeded", phase + " " + c.field("pod/"+name, ".status.containerStatuses[0].state")
	})
	return c.kubectl("logs", name)
}

func (c cluster) running(name string) {
	c.t.Helper()
	c.untilField("pod/"+name, ".status.phase", "Running")
}

func (c cluster) delete(objects ...string) {
	c.t.Helper()
	c.kubectl(append([]string{"delete", "--wait", "--timeout=" + patience.String()}, objects...)...)
}

// clean deletes what a step made, and waits until its volumes are gone.
func (c cluster) clean(step string) {
	c.t.Helper()
	selector := "--selector=step=" + step
	made := strings.Fields(c.kubectl("get", "pvc", selector, "--output", "jsonpath={.items[*].spec.volumeName}"))
	for _, kinds := range []string{"statefulset", "pod", "volumegroupsnapshot", "volumesnapshot", "pvc", "secret",
		"clusterrolebinding", "clusterrole", "serviceaccount"} {
		c.delete(kinds, selector, "--ignore-not-found")
	}
	c.volumesGone(made)
}

// volumesGone waits until PersistentVolumes are deleted; nil: all, and all snapshots.
func (c cluster) volumesGone(names []string) {
	c.t.Helper()
	c.until("the PersistentVolumes are gone", func() (bool, string) {
		kinds := "pv"
		if names == nil {
			kinds = "pv,volumesnapshotcontent,volumegroupsnapshotcontent"
		}
		out, err := c.try("", "get", kinds, "--output", "name")
		left := strings.Fields(out)
		if names != nil {
			left = slices.DeleteFunc(left, func(name string) bool {
				return !slices.Contains(names, strings.TrimPrefix(name, "persistentvolume/"))
			})
		}
		return err == nil && len(left) == 0, strings.Join(left, " ")
	})
}

// claim is what a PersistentVolumeClaim of the tests is made of.
type claim struct {
	Name, Step, Class, Size string
	Block                   bool
	SourceKind, Source      string // VolumeSnapshot or PersistentVolumeClaim
	Attributes              string // VolumeAttributesClass
}

const claimTemplate = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: {{.Name}}, labels: {step: {{.Step}}}}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: {{.Class}}
  {{- if .Block}}
  volumeMode: Block
  {{- end}}
  {{- if .Attributes}}
  volumeAttributesClassName: {{.Attributes}}
  {{- end}}
  {{- if eq .SourceKind "VolumeSnapshot"}}
  dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: {{.Source}}}
  {{- else if .SourceKind}}
  dataSource: {kind: {{.SourceKind}}, name: {{.Source}}}
  {{- end}}
  resources: {requests: {storage: {{.Size}}}}
`

func (c cluster) claim(v claim) {
	c.t.Helper()
	c.apply(claimTemplate, v)
}

// nodes are the names of all nodes.
func (c cluster) nodes() []string {
	c.t.Helper()
	return strings.Fields(c.kubectl("get", "nodes", "--output", "jsonpath={.items[*].metadata.name}"))
}

// onNode is the name of the pod of a DaemonSet on a node; "" while there is none.
func (c cluster) onNode(component, node string) string {
	out, err := c.try("", "--namespace", namespace, "get", "pods", "--selector=app.kubernetes.io/component="+component,
		"--field-selector=spec.nodeName="+node+",status.phase=Running", "--output", "jsonpath={.items[*].metadata.name}")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(out)
}

// ashlar runs the command line in the daemon's container of a node.
func (c cluster) ashlar(node string, args ...string) (string, error) {
	name := c.onNode("daemon", node)
	if name == "" {
		return "", fmt.Errorf("node %s has no daemon", node)
	}
	return c.try("", append([]string{"--namespace", namespace, "exec", name, "--container", "daemon", "--", "ashlar"}, args...)...)
}

// list is what a list command of ashlar prints with --output json.
type list struct {
	Items []struct {
		Name           string `json:"name"`
		Path           string `json:"path"`
		Via            string `json:"via"`
		AllocatedBytes uint64 `json:"allocated_bytes"`
	} `json:"items"`
}

func (c cluster) ashlarList(node string, args ...string) (list, error) {
	var l list
	out, err := c.ashlar(node, append(args, "--output", "json")...)
	if err != nil {
		return l, err
	}
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		return l, fmt.Errorf("ashlar %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return l, nil
}

// processes are the ids, as this host has them, of the processes of a node whose command
// line begins with the given words. The node's cgroup has no others.
func processes(t *testing.T, node string, words ...string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, entry := range entries {
		command, err := os.ReadFile("/proc/" + entry.Name() + "/cmdline")
		if err != nil {
			continue // not a process, or gone
		}
		arguments := strings.Split(string(command), "\x00")
		if len(arguments) < len(words) || !strings.HasSuffix(arguments[0], words[0]) || !slices.Equal(arguments[1:len(words)], words[1:]) {
			continue
		}
		groups, err := os.ReadFile("/proc/" + entry.Name() + "/cgroup")
		if err == nil && strings.Contains(string(groups), "/ashlar-kube/"+node+"/") {
			found = append(found, entry.Name())
		}
	}
	return found
}

// explain prints what the cluster says, when a step has failed.
func (c cluster) explain() {
	for _, args := range [][]string{
		{"get", "pods,pvc,pv", "--all-namespaces", "--output", "wide"},
		{"get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"},
		{"--namespace", namespace, "logs", "--selector=app.kubernetes.io/component=csi", "--all-containers", "--prefix", "--tail=15"},
		{"--namespace", namespace, "logs", "--selector=app.kubernetes.io/component=daemon", "--all-containers", "--prefix", "--tail=15"},
	} {
		out, err := c.try("", args...)
		if len(out) > 12000 {
			out = "...\n" + out[len(out)-12000:]
		}
		c.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
