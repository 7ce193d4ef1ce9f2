package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// metadataService is the name that clients of SnapshotMetadata verify.
const metadataService = "ashlar-snapshot-metadata." + namespace

const certificateTemplate = `
apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata: {name: ashlar-snapshot-metadata, namespace: ` + namespace + `}
data: {tls.crt: {{.Certificate}}, tls.key: {{.Key}}}
`

// certificate makes one for a name that verifies itself; both parts are base64 of PEM.
func certificate(c cluster, name string) (cert, key string) {
	c.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	about := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, about, about, &private.PublicKey, private)
	if err != nil {
		c.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		c.t.Fatal(err)
	}
	text := func(kind string, b []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return text("CERTIFICATE", der), text("PRIVATE KEY", secret)
}

// chartOptions renders the chart with what is off by default, group snapshots and
// SnapshotMetadata, and brings the driver to it, on the first node only: group snapshots
// are for clusters of one node (docs/kubernetes.md). The daemons stay as they are.
func chartOptions(c cluster) {
	helm := os.Getenv("HELM")
	if helm == "" {
		c.t.Skip("needs helm in HELM (test/kube/run.sh sets it)")
	}
	cert, key := certificate(c, metadataService)
	c.apply(certificateTemplate, map[string]string{"Certificate": cert, "Key": key})
	file := filepath.Join(c.t.TempDir(), "ashlar.yaml")
	render := exec.Command("../../deploy/render.sh", file, "--set", "volumeGroupSnapshots.enabled=true,sidecars.snapshotMetadata.enabled=true",
		"--set", "sidecars.snapshotMetadata.caCert="+cert)
	if out, err := render.CombinedOutput(); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		c.t.Fatal(err)
	}
	const anyNode, csi = "      nodeSelector:\n", "  name: ashlar-csi\n"
	var objects []string
	for o := range strings.SplitSeq(string(text), "\n---\n") {
		switch {
		case strings.Contains(o, "kind: ConfigMap"): // cluster/kustomization.yaml has it
			continue
		case strings.Contains(o, "kind: DaemonSet") && strings.Contains(o, csi):
			if strings.Count(o, anyNode) != 1 {
				c.t.Fatalf("the DaemonSet has not one nodeSelector:\n%s", o)
			}
			o = strings.Replace(o, anyNode, anyNode+"        kubernetes.io/hostname: "+c.nodes()[0]+"\n", 1)
		}
		objects = append(objects, o)
	}
	if out, err := c.try(strings.Join(objects, "\n---\n"), "apply", "--validate=strict", "--filename", "-"); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	c.kubectl("--namespace", namespace, "rollout", "status", "daemonset/ashlar-csi", "--timeout="+patience.String())
}
