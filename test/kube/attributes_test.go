package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const fioScript = `fio --name=limit --filename=/data/file --size=32M --rw=randwrite --bs=4k --direct=1 --iodepth=8 ` +
	`--ioengine=libaio --runtime=4 --time_based --output-format=json`

// writeRate is how many random writes a second a pod gets at its volume now.
func (c cluster) writeRate(name string) float64 {
	c.t.Helper()
	out := c.kubectl("exec", name, "--", "/bin/sh", "-c", fioScript)
	var result struct {
		Jobs []struct {
			Write struct {
				IOPS float64 `json:"iops"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out[max(strings.Index(out, "{"), 0):]), &result); err != nil || len(result.Jobs) != 1 {
		c.t.Fatalf("fio: %v\n%s", err, out)
	}
	return result.Jobs[0].Write.IOPS
}

// attributesClass changes the class of a claim that is in use, and sees the device get
// slower, and faster again.
func attributesClass(c cluster) {
	defer c.clean("attributes")
	const limit = 500 // iopsLimit of ashlar-slow
	c.claim(claim{Name: "limited", Step: "attributes", Class: "ashlar", Size: "256Mi", Attributes: "ashlar-unlimited"})
	c.start(pod{Name: "limited", Step: "attributes", Claim: "limited", Script: "exec sleep 1000000"})
	c.running("limited")
	change := func(class string) {
		c.kubectl("patch", "pvc", "limited", "--patch", `{"spec": {"volumeAttributesClassName": "`+class+`"}}`)
		c.untilField("pvc/limited", ".status.currentVolumeAttributesClassName", class)
	}
	free := c.writeRate("limited")
	change("ashlar-slow")
	c.writeRate("limited") // uses up what a limit lets pass at its start
	slow := c.writeRate("limited")
	change("ashlar-unlimited")
	freed := c.writeRate("limited")
	c.t.Logf("writes a second: %.0f without limit, %.0f with %d, %.0f without", free, slow, limit, freed)
	if slow > limit*1.2 {
		c.t.Errorf("%.0f writes a second pass a limit of %d", slow, limit)
	}
	if freed < slow*1.2 {
		c.t.Errorf("%.0f writes a second after the limit was taken away, %.0f with it", freed, slow)
	}
}

// hasDMCrypt reports whether the kernel can encrypt a block device.
func hasDMCrypt() bool {
	misc, err := os.ReadFile("/proc/misc")
	if err != nil || !strings.Contains(string(misc), "device-mapper") {
		return false
	}
	if _, err := os.Stat("/sys/module/dm_crypt"); err == nil {
		return true
	}
	modules, err := os.ReadFile("/proc/modules")
	return err == nil && strings.Contains(string(modules), "dm_crypt")
}

const secretTemplate = `
apiVersion: v1
kind: Secret
metadata: {name: {{.Name}}, labels: {step: encrypted}}
stringData: {passphrase: {{.Passphrase}}}
`

// encrypted writes to a volume whose data is ciphertext on its device, and shows that
// another passphrase does not open it.
func encrypted(c cluster) {
	if !hasDMCrypt() {
		if slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-kube-vm") {
			c.t.Fatal("needs dm-crypt of the kernel: the init container kernel-modules of the daemon has not loaded it")
		}
		c.t.Skip("needs dm-crypt of the kernel (modprobe dm_crypt), which this kernel does not have (make test-kube-vm does not skip it)")
	}
	defer c.clean("encrypted")
	secret := map[string]string{"Name": "locked-encryption", "Passphrase": "correct horse battery staple"}
	c.apply(secretTemplate, secret)
	c.claim(claim{Name: "locked", Step: "encrypted", Class: "ashlar-encrypted", Size: "64Mi"})
	c.start(pod{Name: "locked-writer", Step: "encrypted", Claim: "locked", Script: "echo " + plain + " >/data/file; sync -f /data; exec sleep 1000000"})
	c.running("locked-writer")
	c.ciphertext("locked-writer")
	c.delete("pod", "locked-writer")
	c.apply(secretTemplate, map[string]string{"Name": secret["Name"], "Passphrase": "wrong"})
	c.start(pod{Name: "locked-out", Step: "encrypted", Claim: "locked", Script: "cat /data/file"})
	c.until("the wrong passphrase is refused", func() (bool, string) {
		events := c.field("events", `.items[?(@.involvedObject.name=="locked-out")].message`)
		return strings.Contains(strings.ToLower(events), "passphrase"), events
	})
	c.delete("pod", "locked-out")
	c.apply(secretTemplate, secret)
	if out := c.run(pod{Name: "locked-reader", Step: "encrypted", Claim: "locked", Script: "cat /data/file"}); out != plain {
		c.t.Errorf("read %q", out)
	}
}

// plain is what is looked for on encrypted devices.
const plain = "plain-text-of-the-claim"

// ciphertext sees that a pod has plain on a device of LUKS2, and that it is not to be
// found on the device below, which the daemon serves.
func (c cluster) ciphertext(pod string) {
	c.t.Helper()
	node := c.field("pod/"+pod, ".spec.nodeName")
	var mounted string
	c.until("pod "+pod+" has written", func() (bool, string) {
		out, err := c.try("", "exec", pod, "--", "/bin/sh", "-c", "cat /data/file && sync -f /data && grep ' /data ' /proc/mounts")
		var text string
		text, mounted, _ = strings.Cut(out, "\n")
		return err == nil && text == plain, fmt.Sprint(out, err)
	})
	if !strings.Contains(mounted, "/dev/mapper/") && !strings.Contains(mounted, "/dev/dm-") {
		c.t.Errorf("mounted without dm-crypt: %q", mounted)
	}
	devices, err := c.ashlarList(node, "devices")
	if err != nil || len(devices.Items) != 1 {
		c.t.Fatalf("devices of %s: %v, %v, want one", node, devices.Items, err)
	}
	below := devices.Items[0].Path
	c.t.Logf("%s is on %s (%s): %s", plain, below, devices.Items[0].Via, mounted)
	c.inDriver(node, "cryptsetup isLuks --type luks2 "+below)
	count := func(device string) string {
		return c.inDriver(node, `cat `+device+` | tr -s '\000' '\n' | grep -a -c `+plain+` || true`)
	}
	if n := count("/dev/mapper/ashlar-*"); n == "0" {
		c.t.Error("the device with the plain bytes does not have what the pod wrote")
	}
	if n := count(below); n != "0" {
		c.t.Errorf("%s has what the pod wrote, as it was, in %s lines", below, n)
	}
}

// inDriver runs a shell in the container of the CSI driver on a node.
func (c cluster) inDriver(node, script string) string {
	c.t.Helper()
	return c.kubectl("--namespace", namespace, "exec", c.onNode("csi", node), "--container", "csi", "--", "sh", "-c", script)
}
