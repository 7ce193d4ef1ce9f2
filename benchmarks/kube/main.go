// Kube measures what a pod gets: fio in a pod, on a volume of Ashlar and on a hostPath
// of the disk that the pool is on, in turns, with the profiles that people run on
// Kubernetes storage (kbench, dbench).
//
//	go run ./benchmarks/kube --kubectl test/kube/cluster/kubectl --output benchmarks/results
//
// The cluster has Ashlar and the image of the tests; `make bench-kube` makes one. The
// files are written whole before the first case, so that nobody measures allocation.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

type options struct {
	kubectl, output, ashlar   string
	profiles, class, node, fs string
	sizeMiB, rounds           int
	runtime, ramp             time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.kubectl, "kubectl", "kubectl", "command that talks to the cluster")
	flag.StringVar(&o.output, "output", ".", "directory for the results")
	flag.StringVar(&o.ashlar, "ashlar", "bin/ashlar", "binary that the cluster runs, for its version")
	flag.StringVar(&o.profiles, "profiles", "kbench,dbench", "fio profiles")
	flag.StringVar(&o.class, "class", "ashlar", "StorageClass")
	flag.StringVar(&o.fs, "fs", "ext4", "file system of that class, for the record")
	flag.StringVar(&o.node, "node", "n1", "node to run on")
	flag.IntVar(&o.sizeMiB, "size", 1024, "MiB of each file")
	flag.IntVar(&o.rounds, "rounds", 3, "rounds")
	flag.DurationVar(&o.runtime, "runtime", 5*time.Second, "of each run; 0: the profile's")
	flag.DurationVar(&o.ramp, "ramp", time.Second, "of each run; negative: the profile's")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "kube:", err)
		os.Exit(1)
	}
}

// where are the peers, and where the pod has them.
var where = []struct{ name, about, dir string }{
	{"ashlar", "a claim, in a pod", "/ashlar"},
	{"hostpath", "a hostPath on the disk that the pool is on, in the same pod", "/hostpath"},
}

const objects = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: ashlar-bench}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: {{.Class}}
  resources: {requests: {storage: {{.VolumeMiB}}Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: ashlar-bench}
spec:
  automountServiceAccountToken: false
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: {{.Node}}}
  containers:
    - name: fio
      image: test.local/tools:1
      imagePullPolicy: Never
      args: ["exec sleep 1000000"]
      volumeMounts: [{name: ashlar, mountPath: /ashlar}, {name: hostpath, mountPath: /hostpath}]
  volumes:
    - {name: ashlar, persistentVolumeClaim: {claimName: ashlar-bench}}
    - {name: hostpath, hostPath: {path: /var/lib/kubelet/ashlar-bench, type: DirectoryOrCreate}}
`

type bench struct {
	options
}

func (b *bench) kubectlRun(ctx context.Context, stdin string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, b.kubectl, args...)
	c.Stdin = strings.NewReader(stdin)
	var out, problem bytes.Buffer
	c.Stdout, c.Stderr = &out, &problem
	if err := c.Run(); err != nil {
		return nil, fmt.Errorf("kubectl %s: %w: %s", args[0], err, strings.TrimSpace(problem.String()))
	}
	return out.Bytes(), nil
}

func (b *bench) inPod(ctx context.Context, stdin string, command ...string) ([]byte, error) {
	return b.kubectlRun(ctx, stdin, append([]string{"exec", "--stdin", "ashlar-bench", "--"}, command...)...)
}

func run(ctx context.Context, o options) (err error) {
	b := &bench{o}
	var text bytes.Buffer
	values := map[string]any{"Class": o.class, "Node": o.node, "VolumeMiB": o.sizeMiB*5/4 + 256}
	if err := template.Must(template.New("").Parse(objects)).Execute(&text, values); err != nil {
		return err
	}
	if _, err := b.kubectlRun(ctx, text.String(), "apply", "--filename", "-"); err != nil {
		return err
	}
	defer func() { // also after an interrupt
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		_, e1 := b.inPod(ctx, "", "/bin/busybox", "rm", "-f", "/hostpath/file")
		_, e2 := b.kubectlRun(ctx, "", "delete", "pod/ashlar-bench", "pvc/ashlar-bench", "--ignore-not-found")
		err = errors.Join(err, e1, e2)
	}()
	if _, err := b.kubectlRun(ctx, "", "wait", "pod/ashlar-bench", "--for=condition=Ready", "--timeout=3m"); err != nil {
		return err
	}
	for _, w := range where {
		if _, err := b.inPod(ctx, "", "fio", "--name=fill", "--filename="+w.dir+"/file", fmt.Sprintf("--size=%dM", o.sizeMiB),
			"--rw=write", "--bs=1M", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--end_fsync=1", "--refill_buffers"); err != nil {
			return fmt.Errorf("writing the file on %s: %w", w.name, err)
		}
	}
	for _, name := range strings.Split(o.profiles, ",") {
		r, err := b.profile(ctx, name)
		if err != nil {
			return err
		}
		file := filepath.Join(o.output, fmt.Sprintf("%s-%s-%s.json", r.Started.Format(time.DateOnly), r.Host.Name, r.Name))
		if err := errors.Join(r.Save(file), r.WriteTable(os.Stdout)); err != nil {
			return err
		}
		fmt.Println(file)
	}
	return nil
}

// profile runs all cases of a profile, on both in turns.
func (b *bench) profile(ctx context.Context, name string) (*harness.Result, error) {
	p, err := harness.LoadProfile(name)
	if err != nil {
		return nil, err
	}
	version, err := b.inPod(ctx, "", "fio", "--version")
	if err != nil {
		return nil, err
	}
	r := &harness.Result{
		Schema: harness.Schema, Name: "kube-" + name, Started: time.Now().UTC().Truncate(time.Second), Host: harness.ReadHost(b.ashlar),
		Options: harness.Options{
			Profile: name, Target: harness.Backing{Kind: harness.BackingFile, Path: "a file in a pod", Size: uint64(b.sizeMiB) << 20}, FileSystem: b.fs,
			Client: "fio", ClientVersion: strings.TrimSpace(string(version)), Rounds: b.rounds,
			RuntimeSeconds: b.runtime.Seconds(), RampSeconds: b.ramp.Seconds(), Baseline: where[1].name,
		},
	}
	for _, w := range where {
		r.Peers = append(r.Peers, harness.PeerInfo{Name: w.name, About: w.about})
	}
	for _, c := range p.Cases {
		timing, err := c.Timing()
		if err != nil {
			return nil, err
		}
		job := c.Render(timing.Override(b.ramp, b.runtime))
		for round := range b.rounds {
			for order := range where {
				w := where[(order+round)%len(where)]
				at := harness.RunResult{Case: c.Name, Peer: w.name, Round: round, Order: order, Started: time.Now().UTC(), Load1: harness.ReadHost("").Load1}
				out, err := b.inPod(ctx, job, "fio", "--output-format=json", "--eta=never", "--ioengine=libaio",
					"--filename="+w.dir+"/file", fmt.Sprintf("--filesize=%dM", b.sizeMiB), "-") // not --size: jobs with an offset would make the file longer
				if err != nil {
					return nil, fmt.Errorf("%s on %s: %w", c.Name, w.name, err)
				}
				if at.Metrics, err = harness.ParseFio(out); err != nil {
					return nil, fmt.Errorf("%s on %s: %w", c.Name, w.name, err)
				}
				r.Runs = append(r.Runs, at)
				fmt.Fprintf(os.Stderr, "%s %s round %d: %.0f IOPS\n", c.Name, w.name, round+1, at.IOPS)
			}
		}
	}
	r.Summarize()
	return r, nil
}
