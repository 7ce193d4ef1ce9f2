package kube

import (
	"fmt"
	"strconv"
	"strings"
)

const groupClaimTemplate = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: {{.Name}}, labels: {step: group, application: ledger}}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ashlar
  volumeMode: Block
  resources: {requests: {storage: 16Mi}}
`

// A pod with two devices. It writes a number to the first and then to the second.
const groupWriterTemplate = `
apiVersion: v1
kind: Pod
metadata: {name: ledger, labels: {step: group}}
spec:
  automountServiceAccountToken: false
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: {{.Node}}}
  containers:
    - name: main
      image: test.local/tools:1
      imagePullPolicy: Never
      args:
        - |
          n=0
          while true; do
            n=$((n+1))
            for d in first second; do echo $n | dd of=/dev/$d bs=512 conv=sync,fsync 2>/dev/null || exit 1; done
          done
      volumeDevices: [{name: first, devicePath: /dev/first}, {name: second, devicePath: /dev/second}]
  volumes:
    - {name: first, persistentVolumeClaim: {claimName: first}}
    - {name: second, persistentVolumeClaim: {claimName: second}}
`

const groupSnapshotTemplate = `
apiVersion: groupsnapshot.storage.k8s.io/v1
kind: VolumeGroupSnapshot
metadata: {name: {{.Name}}, labels: {step: group}}
spec:
  volumeGroupSnapshotClassName: ashlar
  source: {selector: {matchLabels: {application: ledger}}}
`

// groupSnapshots takes snapshots of two volumes, chosen by a label, under a pod that
// writes to one after the other, and restores both: the second is never ahead of the
// first, nor more than one write behind it.
func groupSnapshots(c cluster) {
	requireOptions(c)
	defer c.clean("group")
	node := c.nodes()[0]
	claims := []string{"first", "second"}
	for _, name := range claims {
		c.apply(groupClaimTemplate, map[string]string{"Name": name})
	}
	c.apply(groupWriterTemplate, map[string]string{"Node": node})
	c.running("ledger")
	for _, group := range []string{"group-a", "group-b"} {
		c.apply(groupSnapshotTemplate, map[string]string{"Name": group})
		c.untilField("volumegroupsnapshot/"+group, ".status.readyToUse", "true")
	}
	if phase := c.field("pod/ledger", ".status.phase"); phase != "Running" {
		c.t.Errorf("the writer is %s", phase)
	}
	c.delete("pod", "ledger")
	for _, group := range []string{"group-a", "group-b"} {
		numbers := map[string]int{}
		for _, name := range claims {
			member := ""
			c.until("the member of "+name+" in "+group+" is ready", func() (bool, string) {
				member = c.field("volumesnapshot", fmt.Sprintf(
					`.items[?(@.spec.source.persistentVolumeClaimName==%q)].metadata.name`, name))
				var of []string
				for _, m := range strings.Fields(member) {
					if c.field("volumesnapshot/"+m, ".status.volumeGroupSnapshotName") == group && c.field("volumesnapshot/"+m, ".status.readyToUse") == "true" {
						of = append(of, m)
					}
				}
				all := member
				member = strings.Join(of, " ")
				return len(of) == 1, "ready " + member + " of " + all
			})
			copied := "copy-" + group + "-" + name
			c.claim(claim{Name: copied, Step: "group", Class: "ashlar", Size: "16Mi", Block: true, SourceKind: "VolumeSnapshot", Source: member})
			out := c.run(pod{Name: copied, Step: "group", Claim: copied, Block: true, Node: node, Script: "head -c 20 /dev/volume | tr -d '\\000'"})
			n, err := strconv.Atoi(strings.TrimSpace(out))
			if err != nil {
				c.t.Errorf("%s of %s: %v", name, group, err)
			}
			numbers[name] = n
		}
		c.t.Logf("%s: %v", group, numbers)
		if behind := numbers["first"] - numbers["second"]; behind < 0 || behind > 1 || numbers["first"] == 0 {
			c.t.Errorf("%s is not one point: %v", group, numbers)
		}
	}
}

// requireOptions skips where chartOptions did not run.
func requireOptions(c cluster) {
	if c.field("volumegroupsnapshotclass/ashlar", ".driver") == "" {
		c.t.Skip("needs the step options, which deploys the chart with group snapshots and SnapshotMetadata")
	}
}
