package kube

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

const (
	namespace = "ashlar-system"
	driver    = "csi.ashlar.io"
)

// growable is the filesystem that can grow while it is mounted here: ext4 asks for
// CAP_SYS_RESOURCE, which some virtual machines withhold even from root.
func growable() string {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return "ext4"
	}
	for _, line := range strings.Split(string(status), "\n") {
		var effective uint64
		if _, err := fmt.Sscanf(line, "CapEff: %x", &effective); err == nil && effective>>24&1 == 0 {
			return "xfs"
		}
	}
	return "ext4"
}

var classes = map[string]string{"ext4": "ashlar", "xfs": "ashlar-xfs"}

func TestKubernetes(t *testing.T) {
	requireCluster(t)
	steps := []struct {
		name string
		run  func(cluster)
	}{
		{"deploy", deploy},
		{"ext4", func(c cluster) { writeDeleteRead(c, "ext4") }},
		{"xfs", func(c cluster) { writeDeleteRead(c, "xfs") }},
		{"statefulset", statefulSet},
		{"expand", expand},
		{"snapshot", snapshotRestore},
		{"clone", clone},
		{"block", rawBlock},
		{"ephemeral", ephemeral},
		{"attributes", attributesClass},
		{"encrypted", encrypted},
		{"daemon-killed", daemonKilled},
		{"daemon-pod-deleted", daemonPodDeleted},
		{"csi-killed", csiKilled},
		{"csi-hangs", csiHangs},
		{"twenty", twentyClaims},
		{"options", chartOptions},
		{"group-snapshot", groupSnapshots},
		{"snapshot-metadata", snapshotMetadata},
		{"deploy-again", deploy}, // without the options, on all nodes
		{"nothing-left", nothingLeft},
	}
	report := []string{"durations"}
	for _, step := range steps {
		begin := time.Now()
		result := "" // left out by -run
		t.Run(step.name, func(t *testing.T) {
			c := cluster{t}
			defer func() {
				switch result = "ok"; {
				case t.Skipped():
					result = "skipped"
				case t.Failed():
					result = "FAILED"
					c.explain()
				}
			}()
			step.run(c)
		})
		if result == "" {
			continue
		}
		line := fmt.Sprintf("  %-20s %6.1f s  %s", step.name, time.Since(begin).Seconds(), result)
		report = append(report, line)
		fmt.Println("test-kube:" + line)
		if result == "FAILED" && step.name == "deploy" {
			t.Fatal("nothing else can work")
		}
	}
	t.Log(strings.Join(report, "\n"))
}

// deploy applies the manifests as cluster/kustomization.yaml changes them, and waits
// until every node offers the driver and has told its free space.
func deploy(c cluster) {
	manifests := c.kubectl("kustomize", "--load-restrictor=LoadRestrictionsNone", "cluster")
	if out, err := c.try(manifests, "apply", "--validate=strict", "--filename", "-"); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"ashlar-fuse-keeper", "ashlar-daemon", "ashlar-csi"} {
		want := fmt.Sprintf("%d ready, %[1]d of this version", len(c.nodes()))
		c.until("the pods of "+name+" are ready", func() (bool, string) {
			got, err := c.try("", "--namespace", namespace, "get", "daemonset", name, "--output",
				"jsonpath={.status.numberReady} ready, {.status.updatedNumberScheduled} of this version")
			return err == nil && got == want, got
		})
	}
	for _, node := range c.nodes() {
		c.until("the kubelet of "+node+" knows the driver", func() (bool, string) {
			drivers := c.field("csinode/"+node, ".spec.drivers[*].name")
			return strings.Contains(drivers, driver), drivers
		})
		c.untilField("node/"+node, `.metadata.labels.topology\.ashlar\.io/node`, node)
	}
	c.until("capacity is published for every class and node", func() (bool, string) {
		out, err := c.try("", "--namespace", namespace, "get", "csistoragecapacities", "--output",
			`jsonpath={range .items[*]}{.storageClassName}={.capacity}{"\n"}{end}`)
		return err == nil && strings.Count(out, "=") >= len(classes)*len(c.nodes()), out
	})
	c.until("pods can be made", func() (bool, string) {
		out, err := c.try("", "get", "serviceaccount", "default")
		return err == nil, out
	})
}

// writeDeleteRead is the life of a claim: one pod writes and is deleted, a second one,
// which nobody told where to go, reads on the same node.
func writeDeleteRead(c cluster, fs string) {
	defer c.clean(fs)
	c.claim(claim{Name: fs, Step: fs, Class: classes[fs], Size: "512Mi"})
	out := c.run(pod{Name: fs + "-writer", Step: fs, Claim: fs,
		Script: `grep " /data " /proc/mounts; echo "written by $HOSTNAME" >/data/file; sync -f /data; cat /data/file`})
	if !strings.Contains(out, " /data "+fs+" ") {
		c.t.Errorf("mounted as %q, want %s", out, fs)
	}
	node := c.field("pod/"+fs+"-writer", ".spec.nodeName")
	c.delete("pod", fs+"-writer")
	out = c.run(pod{Name: fs + "-reader", Step: fs, Claim: fs, Script: "cat /data/file"})
	if out != "written by "+fs+"-writer" {
		c.t.Errorf("read %q", out)
	}
	if got := c.field("pod/"+fs+"-reader", ".spec.nodeName"); got != node {
		c.t.Errorf("the reader ran on %s, the volume is on %s", got, node)
	}
}

const statefulSetTemplate = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: set, labels: {step: statefulset}}
spec:
  serviceName: set
  replicas: {{.Replicas}}
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: set}}
  template:
    metadata: {labels: {app: set}}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 1
      affinity:
        podAntiAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: kubernetes.io/hostname
              labelSelector: {matchLabels: {app: set}}
      containers:
        - name: main
          image: test.local/tools:1
          imagePullPolicy: Never
          args: ['echo "$HOSTNAME" >>/data/file; sync -f /data; touch /written; exec sleep 1000000']
          readinessProbe: {exec: {command: [/bin/busybox, test, -e, /written]}, periodSeconds: 1}
          volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
    - metadata: {name: data, labels: {step: statefulset}}
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: ashlar
        resources: {requests: {storage: 256Mi}}
`

// statefulSet has one replica on each node; all are deleted, come back, and find what
// they wrote.
func statefulSet(c cluster) {
	defer c.clean("statefulset")
	nodes := c.nodes()
	c.apply(statefulSetTemplate, map[string]int{"Replicas": len(nodes)})
	ready := func() {
		c.untilField("statefulset/set", ".status.readyReplicas", fmt.Sprint(len(nodes)))
	}
	ready()
	used := map[string]bool{}
	for i := range nodes {
		used[c.field(fmt.Sprintf("pod/set-%d", i), ".spec.nodeName")] = true
	}
	if len(used) != len(nodes) {
		c.t.Errorf("the replicas are on %v", used)
	}
	c.delete("pod", "--selector=app=set")
	ready()
	for i := range nodes {
		name := fmt.Sprintf("set-%d", i)
		if got := c.kubectl("exec", name, "--", "/bin/busybox", "cat", "/data/file"); got != name+"\n"+name {
			c.t.Errorf("%s found %q", name, got)
		}
	}
}

// expand grows a volume under a pod that has it open.
func expand(c cluster) {
	defer c.clean("expand")
	fs := growable()
	if fs != "ext4" {
		c.t.Log("no CAP_SYS_RESOURCE here, without which ext4 does not grow while it is mounted: xfs only")
	}
	c.claim(claim{Name: "grown", Step: "expand", Class: classes[fs], Size: "512Mi"})
	c.start(pod{Name: "grower", Step: "expand", Claim: "grown", Script: `
		echo before >/data/file
		size() { df -m /data | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2; }
		size
		until [ "$(size)" -gt 900 ]; do sleep 1; done
		size; cat /data/file; echo after >>/data/file; sync -f /data`})
	c.running("grower")
	c.kubectl("patch", "pvc", "grown", "--patch", `{"spec": {"resources": {"requests": {"storage": "1Gi"}}}}`)
	if out := c.succeeded("grower"); !strings.Contains(out, "before") {
		c.t.Errorf("the pod says %q", out)
	}
	c.untilField("pvc/grown", ".status.capacity.storage", "1Gi")
}

const snapshotTemplate = `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: {{.Name}}, labels: {step: {{.Step}}}}
spec:
  volumeSnapshotClassName: ashlar
  source: {persistentVolumeClaimName: {{.Claim}}}
`

// snapshotRestore takes a snapshot under a pod, writes on, and restores what was.
func snapshotRestore(c cluster) {
	defer c.clean("snapshot")
	c.claim(claim{Name: "original", Step: "snapshot", Class: "ashlar", Size: "512Mi"})
	c.run(pod{Name: "original", Step: "snapshot", Claim: "original", Script: "echo first >/data/file; sync -f /data"})
	c.apply(snapshotTemplate, map[string]string{"Name": "snapshot", "Step": "snapshot", "Claim": "original"})
	c.untilField("volumesnapshot/snapshot", ".status.readyToUse", "true")
	c.delete("pod", "original")
	c.run(pod{Name: "original", Step: "snapshot", Claim: "original", Script: "echo second >>/data/file; sync -f /data"})
	c.claim(claim{Name: "restored", Step: "snapshot", Class: "ashlar", Size: "1Gi", SourceKind: "VolumeSnapshot", Source: "snapshot"})
	out := c.run(pod{Name: "restored", Step: "snapshot", Claim: "restored", Script: "cat /data/file; df -m /data | tail -n 1"})
	if !strings.HasPrefix(out, "first\n") || strings.Contains(out, "second") {
		c.t.Errorf("restored: %q", out)
	}
	// The snapshot outlives the claim it is of.
	c.delete("pod", "original", "restored")
	c.delete("pvc", "original", "restored")
	c.claim(claim{Name: "again", Step: "snapshot", Class: "ashlar", Size: "512Mi", SourceKind: "VolumeSnapshot", Source: "snapshot"})
	if out := c.run(pod{Name: "again", Step: "snapshot", Claim: "again", Script: "cat /data/file"}); out != "first" {
		c.t.Errorf("restored after the original was deleted: %q", out)
	}
}

// clone makes a volume of another.
func clone(c cluster) {
	defer c.clean("clone")
	c.claim(claim{Name: "source", Step: "clone", Class: "ashlar-xfs", Size: "512Mi"})
	c.run(pod{Name: "source", Step: "clone", Claim: "source", Script: "echo original >/data/file; sync -f /data"})
	c.delete("pod", "source")
	c.claim(claim{Name: "copy", Step: "clone", Class: "ashlar-xfs", Size: "512Mi", SourceKind: "PersistentVolumeClaim", Source: "source"})
	out := c.run(pod{Name: "copy", Step: "clone", Claim: "copy", Script: "cat /data/file; echo changed >/data/file; sync -f /data"})
	if out != "original" {
		c.t.Errorf("the clone has %q", out)
	}
	// Both at once: xfs refuses a second filesystem of one UUID unless it is told.
	if out := c.run(pod{Name: "source", Step: "clone", Claim: "source", Script: "cat /data/file"}); out != "original" {
		c.t.Errorf("a write to the clone changed the source: %q", out)
	}
}

// rawBlock uses a volume as a device.
func rawBlock(c cluster) {
	defer c.clean("block")
	c.claim(claim{Name: "raw", Step: "block", Class: "ashlar", Size: "64Mi", Block: true})
	out := c.run(pod{Name: "raw-writer", Step: "block", Claim: "raw", Block: true, Script: `
		echo raw-bytes | dd of=/dev/volume bs=512 conv=sync,fsync 2>/dev/null; blockdev --getsize64 /dev/volume`})
	if out != "67108864" {
		c.t.Errorf("size %q, want 67108864", out)
	}
	c.delete("pod", "raw-writer")
	out = c.run(pod{Name: "raw-reader", Step: "block", Claim: "raw", Block: true, Script: "head -c 9 /dev/volume"})
	if out != "raw-bytes" {
		c.t.Errorf("read %q", out)
	}
}

// ephemeral is a volume that lives as long as its pod.
func ephemeral(c cluster) {
	defer c.clean("ephemeral")
	c.run(pod{Name: "ephemeral", Step: "ephemeral", Class: "ashlar", Size: "128Mi", Script: "echo x >/data/file; sync -f /data; cat /data/file"})
	if c.field("pvc/ephemeral-data", ".status.phase") != "Bound" {
		c.t.Error("no claim was made for the pod")
	}
	volume := c.field("pvc/ephemeral-data", ".spec.volumeName")
	c.delete("pod", "ephemeral")
	c.volumesGone([]string{volume}) // nobody deletes the claim
}

// twentyClaims makes twenty claims and pods at once, on all nodes.
func twentyClaims(c cluster) {
	defer c.clean("twenty")
	const count = 20
	for i := range count {
		name := fmt.Sprintf("many-%d", i)
		c.claim(claim{Name: name, Step: "twenty", Class: []string{"ashlar", "ashlar-xfs"}[i%2], Size: "320Mi"}) // xfs wants 300 MiB
		c.start(pod{Name: name, Step: "twenty", Claim: name, Script: `
			dd if=/dev/urandom of=/data/file bs=1M count=4 2>/dev/null && sync -f /data && md5sum </data/file >/data/sum && md5sum </data/file | cmp - /data/sum && echo same`})
	}
	for i := range count {
		if out := c.succeeded(fmt.Sprintf("many-%d", i)); out != "same" {
			c.t.Errorf("pod %d says %q", i, out)
		}
	}
}
