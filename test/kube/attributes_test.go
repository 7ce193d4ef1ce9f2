package kube

import (
	"encoding/json"
	"os"
	"strings"
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

// encrypted writes to a volume whose data is ciphertext in the pool, and shows that
// another passphrase does not open it.
func encrypted(c cluster) {
	if !hasDMCrypt() {
		c.t.Skip("needs dm-crypt of the kernel (modprobe dm_crypt), which this kernel does not have")
	}
	defer c.clean("encrypted")
	secret := map[string]string{"Name": "locked-encryption", "Passphrase": "correct horse battery staple"}
	c.apply(secretTemplate, secret)
	c.claim(claim{Name: "locked", Step: "encrypted", Class: "ashlar-encrypted", Size: "512Mi"})
	out := c.run(pod{Name: "locked-writer", Step: "encrypted", Claim: "locked", Script: "grep ' /data ' /proc/mounts; echo secret >/data/file; sync -f /data"})
	if !strings.Contains(out, "/dev/mapper/") && !strings.Contains(out, "/dev/dm-") {
		c.t.Errorf("mounted without dm-crypt: %q", out)
	}
	c.delete("pod", "locked-writer")
	c.apply(secretTemplate, map[string]string{"Name": secret["Name"], "Passphrase": "wrong"})
	c.start(pod{Name: "locked-out", Step: "encrypted", Claim: "locked", Script: "cat /data/file"})
	c.until("the wrong passphrase is refused", func() (bool, string) {
		events := c.field("events", `.items[?(@.involvedObject.name=="locked-out")].message`)
		return strings.Contains(strings.ToLower(events), "passphrase"), events
	})
	c.delete("pod", "locked-out")
	c.apply(secretTemplate, secret)
	if out := c.run(pod{Name: "locked-reader", Step: "encrypted", Claim: "locked", Script: "cat /data/file"}); out != "secret" {
		c.t.Errorf("read %q", out)
	}
}
