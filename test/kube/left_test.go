package kube

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// spaceLeftMax is what a pool may still have allocated when its volumes are gone:
// metadata that it keeps for its next volumes.
const spaceLeftMax = 16 << 20

// nothingLeft looks on every node for what the steps before may have left behind:
// volumes, block devices, mounts, and space of the pool.
func nothingLeft(c cluster) {
	c.volumesGone(nil)
	for _, node := range c.nodes() {
		for _, what := range []string{"volume", "snapshot", "devices"} {
			args := []string{what, "list"}
			if what == "devices" {
				args = args[:1]
			}
			c.until("node "+node+" has no "+what, func() (bool, string) {
				l, err := c.ashlarList(node, args...)
				return err == nil && len(l.Items) == 0, fmt.Sprint(l.Items, err)
			})
		}
		c.until("the pool of "+node+" has its space back", func() (bool, string) {
			l, err := c.ashlarList(node, "pool", "list")
			if err != nil || len(l.Items) != 1 {
				return false, fmt.Sprint(l.Items, err)
			}
			return l.Items[0].AllocatedBytes <= spaceLeftMax, fmt.Sprintf("%d bytes allocated", l.Items[0].AllocatedBytes)
		})
		// The kubelet is in the mount namespace of its node.
		for _, id := range processes(c.t, node, "ashlar", "serve") {
			mounts, err := os.ReadFile("/proc/" + id + "/mountinfo")
			if err != nil {
				c.t.Error(err)
			}
			if strings.Contains(string(mounts), "/kubernetes.io/csi/"+driver) {
				c.t.Errorf("the daemon of %s still has staged volumes mounted", node)
			}
		}
		if out := c.nodeMounts(node); strings.Contains(out, "kubernetes.io~csi") || strings.Contains(out, "/kubernetes.io/csi/") {
			c.t.Errorf("node %s has mounts left:\n%s", node, out)
		}
	}
	out, err := exec.Command("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").CombinedOutput()
	if err != nil {
		c.t.Errorf("losetup: %v: %s", err, out)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if strings.Contains(line, " /var/lib/ashlar/") {
			c.t.Errorf("a loop device is left: %s", line)
		}
	}
}

// nodeMounts is the mount table of a node, as its driver sees the kubelet's directory.
func (c cluster) nodeMounts(node string) string {
	c.t.Helper()
	name := c.onNode("csi", node)
	out, err := c.try("", "--namespace", namespace, "exec", name, "--container", "csi", "--", "sh", "-c", "cat /proc/mounts")
	if err != nil {
		c.t.Errorf("mounts of %s: %v", node, err)
	}
	return out
}
