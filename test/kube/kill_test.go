package kube

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// writer is a pod that writes records with fsync as fast as it can, and checks every
// thousandth all it has written, until it is told to stop. What fails is in its log.
const writerScript = `
i=0
while [ ! -e /data/stop ]; do
	i=$((i+1))
	echo "record $i" | dd of=/data/log oflag=append conv=notrunc,fsync 2>/dev/null || echo "ERROR: record $i"
	echo $i >/data/count || echo "ERROR: count $i"
done
touch /data/probe || echo "ERROR: read-only"
n=$(wc -l </data/log)
[ "$n" = "$i" ] || echo "ERROR: $n records of $i"
awk -v n=$i 'BEGIN {for (i = 1; i <= n; i++) print "record " i}' >/data/want
cmp /data/log /data/want || echo "ERROR: records differ"
echo "$i records"`

// startWriter starts a writer on one node.
func (c cluster) startWriter(name, step, node, class string) {
	c.t.Helper()
	c.claim(claim{Name: name, Step: step, Class: class, Size: "512Mi"})
	c.start(pod{Name: name, Step: step, Claim: name, Node: node, Script: writerScript})
	c.running(name)
	c.progress(name)
}

// count is how many records a writer has written.
func (c cluster) count(name string) int {
	out, err := c.try("", "exec", name, "--", "/bin/busybox", "cat", "/data/count")
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		return 0 // it is being written
	}
	return n
}

// progress waits until a writer has written more.
func (c cluster) progress(name string) {
	c.t.Helper()
	begin := c.count(name)
	c.until("pod "+name+" writes", func() (bool, string) {
		n := c.count(name)
		return n > begin+20, fmt.Sprintf("%d records, %d before; logs: %s", n, begin, c.field("pod/"+name, ".status.phase"))
	})
}

// stopWriter ends a writer, and says how many records it wrote and found again.
func (c cluster) stopWriter(name string) {
	c.t.Helper()
	c.kubectl("exec", name, "--", "/bin/busybox", "touch", "/data/stop")
	out := c.succeeded(name)
	if strings.Contains(out, "ERROR") {
		c.t.Errorf("writer %s: %s", name, out)
	}
	c.t.Logf("writer %s: %s", name, out)
}

// kill ends a process of a node with SIGKILL, and waits until another has its place.
func (c cluster) kill(node string, words ...string) {
	c.t.Helper()
	before := processes(c.t, node, words...)
	if len(before) != 1 {
		c.t.Fatalf("processes %v of %s: %v, want one", words, node, before)
	}
	id, err := strconv.Atoi(before[0])
	if err != nil {
		c.t.Fatal(err)
	}
	begin := time.Now()
	if err := syscall.Kill(id, syscall.SIGKILL); err != nil {
		c.t.Fatal(err)
	}
	c.until(strings.Join(words, " ")+" runs again", func() (bool, string) {
		now := processes(c.t, node, words...)
		return len(now) == 1 && now[0] != before[0], fmt.Sprint(now)
	})
	c.t.Logf("%s on %s: killed, runs again after %.1f s", strings.Join(words, " "), node, time.Since(begin).Seconds())
}

// daemonKilled kills the daemon with -9 under pods that write, twice.
func daemonKilled(c cluster) {
	defer c.clean("daemon-killed")
	node := c.nodes()[0]
	for _, fs := range []string{"ext4", "xfs"} {
		c.startWriter("killed-"+fs, "daemon-killed", node, classes[fs])
	}
	for range 2 {
		c.kill(node, "ashlar", "serve")
		for _, fs := range []string{"ext4", "xfs"} {
			c.progress("killed-" + fs)
		}
	}
	for _, fs := range []string{"ext4", "xfs"} {
		c.stopWriter("killed-" + fs)
	}
}

// daemonPodDeleted deletes the daemon's pod under a pod that writes, as an update of
// the DaemonSet does.
func daemonPodDeleted(c cluster) {
	defer c.clean("daemon-pod-deleted")
	node := c.nodes()[0]
	c.startWriter("updated", "daemon-pod-deleted", node, "ashlar")
	begin := time.Now()
	c.delete("--namespace", namespace, "pod", c.onNode("daemon", node))
	c.progress("updated")
	c.t.Logf("the pod writes again %.1f s after the deletion began", time.Since(begin).Seconds())
	c.stopWriter("updated")
}

// csiKilled kills the driver, and deletes its pod, under a pod that writes; then it
// works as before.
func csiKilled(c cluster) {
	defer c.clean("csi-killed")
	node := c.nodes()[0]
	c.startWriter("undisturbed", "csi-killed", node, "ashlar")
	c.kill(node, "ashlar", "csi", "--mode=all")
	c.progress("undisturbed")
	c.delete("--namespace", namespace, "pod", c.onNode("csi", node))
	c.progress("undisturbed")
	c.claim(claim{Name: "after", Step: "csi-killed", Class: "ashlar", Size: "128Mi"})
	c.run(pod{Name: "after", Step: "csi-killed", Claim: "after", Node: node, Script: "echo x >/data/file; sync -f /data"})
	c.stopWriter("undisturbed")
}

// csiHangs stops the driver's process, as a driver that hangs: its liveness probe fails,
// and the kubelet starts it again, while a pod writes.
func csiHangs(c cluster) {
	defer c.clean("csi-hangs")
	node := c.nodes()[0]
	c.startWriter("unaware", "csi-hangs", node, "ashlar")
	before := processes(c.t, node, "ashlar", "csi", "--mode=all")
	if len(before) != 1 {
		c.t.Fatalf("drivers of %s: %v, want one", node, before)
	}
	id, err := strconv.Atoi(before[0])
	if err != nil {
		c.t.Fatal(err)
	}
	name := c.onNode("csi", node)
	restarts := func() string {
		out, err := c.try("", "--namespace", namespace, "get", "pod", name, "--output", `jsonpath={.status.containerStatuses[?(@.name=="csi")].restartCount}`)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(out)
	}
	count := restarts()
	begin := time.Now()
	if err := syscall.Kill(id, syscall.SIGSTOP); err != nil {
		c.t.Fatal(err)
	}
	c.until("the kubelet starts the driver again", func() (bool, string) {
		now := processes(c.t, node, "ashlar", "csi", "--mode=all")
		return len(now) == 1 && now[0] != before[0], fmt.Sprintf("%v, restarts %s", now, restarts())
	})
	c.until("the restart is told", func() (bool, string) { now := restarts(); return now != count, now })
	c.t.Logf("the driver hung, and runs again after %.0f s", time.Since(begin).Seconds())
	c.progress("unaware")
	c.claim(claim{Name: "afterwards", Step: "csi-hangs", Class: "ashlar", Size: "128Mi"})
	c.run(pod{Name: "afterwards", Step: "csi-hangs", Claim: "afterwards", Node: node, Script: "echo x >/data/file; sync -f /data"})
	c.stopWriter("unaware")
}
