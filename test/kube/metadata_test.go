package kube

import (
	"fmt"
	"strings"
)

// What a backup program may do, as external-snapshot-metadata documents it.
const backupTemplate = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: backup, labels: {step: metadata}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: ashlar-test-backup, labels: {step: metadata}}
rules:
  - {apiGroups: [snapshot.storage.k8s.io], resources: [volumesnapshots, volumesnapshotcontents], verbs: [get, list, watch]}
  - {apiGroups: [cbt.storage.k8s.io], resources: [snapshotmetadataservices], verbs: [get, list]}
  - {apiGroups: [""], resources: [serviceaccounts/token], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: ashlar-test-backup, labels: {step: metadata}}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ashlar-test-backup}
subjects: [{kind: ServiceAccount, name: backup, namespace: default}]
`

// A pod that asks the service of one node: there is no DNS here, so it is told the
// address of the pod behind the service's name.
const blocksTemplate = `
apiVersion: v1
kind: Pod
metadata: {name: {{.Name}}, labels: {step: metadata}}
spec:
  serviceAccountName: backup
  restartPolicy: Never
  hostAliases: [{ip: {{.Address}}, hostnames: [` + metadataService + `]}]
  containers:
    - {name: main, image: "test.local/tools:1", imagePullPolicy: Never, command: [/bin/blocks], args: [{{.Arguments}}]}
`

// extent is a range of bytes.
type extent struct{ offset, length int64 }

// blocks asks for metadata in a pod.
func (c cluster) blocks(name, node string, snapshots ...string) (list []extent, size int64) {
	c.t.Helper()
	address := c.kubectl("--namespace", namespace, "get", "pod", c.onNode("csi", node), "--output", "jsonpath={.status.podIP}")
	c.apply(blocksTemplate, map[string]string{"Name": name, "Address": address, "Arguments": strings.Join(snapshots, ", ")})
	for line := range strings.Lines(c.succeeded(name) + "\n") {
		var e extent
		if _, err := fmt.Sscanf(line, "of %d", &size); err == nil {
			continue
		}
		if n, err := fmt.Sscanf(line, "%d %d", &e.offset, &e.length); n != 2 {
			c.t.Fatalf("pod %s prints %q: %v", name, line, err)
		}
		list = append(list, e)
	}
	return list, size
}

// covers wants a list to have every byte of some ranges, and not many more than those.
func (c cluster) covers(what string, list []extent, wrote ...extent) {
	c.t.Helper()
	const slack = 64 << 10 // one cluster
	for _, w := range wrote {
		at := w.offset
		for _, e := range list {
			if e.offset <= at && at < e.offset+e.length {
				at = e.offset + e.length
			}
		}
		if at < w.offset+w.length {
			c.t.Errorf("%s: %v lacks %d of %v", what, list, at, w)
		}
	}
	for _, e := range list {
		near := false
		for _, w := range wrote {
			near = near || e.offset >= w.offset-slack && e.offset+e.length <= w.offset+w.length+slack
		}
		if !near {
			c.t.Errorf("%s: nobody wrote %v", what, e)
		}
	}
}

// snapshotMetadata reads which bytes snapshots have, through the sidecar, as a backup
// program does: with a token, over TLS.
func snapshotMetadata(c cluster) {
	requireOptions(c)
	defer c.clean("metadata")
	node := c.nodes()[0]
	const mib, length = 1 << 20, 64 << 10
	c.apply(backupTemplate, nil)
	c.claim(claim{Name: "tracked", Step: "metadata", Class: "ashlar", Size: "64Mi", Block: true})
	write := func(name string, offsets ...int64) (wrote []extent) {
		script := ""
		for _, offset := range offsets {
			script += fmt.Sprintf("dd if=/dev/urandom of=/dev/volume bs=64k count=1 seek=%d conv=notrunc,fsync 2>/dev/null || exit 1\n", offset/length)
			wrote = append(wrote, extent{offset, length})
		}
		c.run(pod{Name: name, Step: "metadata", Claim: "tracked", Block: true, Node: node, Script: script})
		c.delete("pod", name)
		c.apply(snapshotTemplate, map[string]string{"Name": name, "Step": "metadata", "Claim": "tracked"})
		c.untilField("volumesnapshot/"+name, ".status.readyToUse", "true")
		return wrote
	}
	before := write("before", 0, 20*mib, 40*mib)
	after := write("after", 20*mib, 60*mib)
	for _, ask := range []struct {
		name      string
		snapshots []string
		wrote     []extent
	}{
		{"blocks-before", []string{"before"}, before},
		{"blocks-after", []string{"after"}, append(before, after...)},
		{"blocks-changed", []string{"after", "before"}, after},
	} {
		list, size := c.blocks(ask.name, node, ask.snapshots...)
		if size != 64*mib {
			c.t.Errorf("%s: the volume has %d bytes", ask.name, size)
		}
		c.covers(ask.name, list, ask.wrote...)
		c.t.Logf("%s: %v", ask.name, list)
	}
}
