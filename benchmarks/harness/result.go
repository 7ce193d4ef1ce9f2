package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Schema is the version of the result format.
//
//	1: the first
const Schema = 1

// Result is a whole benchmark: what was run, where, every run, and what follows
// from them. benchmarks/README.md documents its JSON.
type Result struct {
	Schema   int           `json:"schema"`
	Name     string        `json:"name"` // of the profile or the bar
	Started  time.Time     `json:"started"`
	Host     Host          `json:"host"`
	Options  Options       `json:"options"` // as in force
	Peers    []PeerInfo    `json:"peers"`
	Runs     []RunResult   `json:"runs"`
	Cases    []CaseSummary `json:"cases"`              // derived from Runs
	Verdicts []Verdict     `json:"verdicts,omitempty"` // of a bar, derived from Runs

	Absent map[string]string `json:"absent,omitempty"` // peers that cannot run on this host, and why
}

// Options are the options of a benchmark as they were in force.
type Options struct {
	Profile        string  `json:"profile"`
	Target         Backing `json:"target"`
	FileSystem     string  `json:"file_system,omitempty"`
	Client         string  `json:"client"`
	ClientVersion  string  `json:"client_version,omitempty"`
	Rounds         int     `json:"rounds"`
	RuntimeSeconds float64 `json:"runtime_seconds"` // 0: the profile's own
	RampSeconds    float64 `json:"ramp_seconds"`    // negative: the profile's own
	ServerCPUs     []int   `json:"server_cpus"`
	ClientCPUs     []int   `json:"client_cpus"`
	Baseline       string  `json:"baseline,omitempty"`
	Poll           string  `json:"poll,omitempty"`
	Reactors       int     `json:"reactors,omitempty"`
	Volume         Volume  `json:"volume,omitempty"` // of a pool: what state it was in
}

// PeerInfo is what was measured.
type PeerInfo struct {
	Name    string   `json:"name"`
	About   string   `json:"about"`
	Version string   `json:"version,omitempty"`
	Command []string `json:"command,omitempty"` // of the last start
}

// Metrics are the numbers of one run. Latencies are completion latencies as the
// client sees them, in microseconds; 0 was not measured.
type Metrics struct {
	IOs            uint64  `json:"ios"`
	Seconds        float64 `json:"seconds"` // measured window, without the ramp
	IOPS           float64 `json:"iops"`    // reads and writes; a flush is not one
	ReadIOPS       float64 `json:"read_iops"`
	WriteIOPS      float64 `json:"write_iops"`
	BytesPerSecond float64 `json:"bytes_per_second"`
	LatencyP50     float64 `json:"latency_p50_us,omitempty"`
	LatencyP99     float64 `json:"latency_p99_us,omitempty"`
	LatencyP999    float64 `json:"latency_p999_us,omitempty"`
	LatencyMax     float64 `json:"latency_max_us,omitempty"`
	FlushP99       float64 `json:"flush_p99_us,omitempty"`

	// CPU seconds used per second inside the window, times its length.
	ClientSampled    bool    `json:"client_sampled,omitempty"`
	ServerSampled    bool    `json:"server_sampled,omitempty"`
	ClientCPUSeconds float64 `json:"client_cpu_seconds,omitempty"`
	ServerCPUSeconds float64 `json:"server_cpu_seconds,omitempty"`
	ServerResident   uint64  `json:"server_resident_bytes,omitempty"` // the largest seen

	ServerCPUPerMillion float64 `json:"server_cpu_seconds_per_million,omitempty"`
	IOPSPerServerCPU    float64 `json:"iops_per_server_cpu_second,omitempty"`

	// Bytes the client wrote, and what became of them up to the server's clean end:
	// those the server gave to devices, and those the disk took, of the whole host.
	BytesWritten       uint64 `json:"bytes_written,omitempty"`
	ServerBytesWritten uint64 `json:"server_bytes_written,omitempty"`
	DiskBytesWritten   uint64 `json:"disk_bytes_written,omitempty"`

	// Calls of the control API: those made meanwhile, such as snapshots, and one of
	// each of the others per round.
	Calls       int     `json:"calls,omitempty"`
	CallMedian  float64 `json:"call_median_us,omitempty"`
	CallMax     float64 `json:"call_max_us,omitempty"`
	CallCreate  float64 `json:"create_us,omitempty"`
	CallDelete  float64 `json:"delete_us,omitempty"`
	OpenSeconds float64 `json:"open_seconds,omitempty"`     // from the start of the process to its first answer
	OpenBytes   uint64  `json:"open_bytes,omitempty"`       // mapped in the volumes opened
	OpenTiB     float64 `json:"open_tib_seconds,omitempty"` // extrapolated to 1 TiB mapped
}

// RunResult is one run: one client process against one server process.
type RunResult struct {
	Case    string    `json:"case"`
	Peer    string    `json:"peer"`
	Round   int       `json:"round"` // from 0
	Order   int       `json:"order"` // position within the round, from 0
	Started time.Time `json:"started"`
	Load1   float64   `json:"load_average"` // of the host before the run
	Metrics
}

// Spread is a median with what lies around it.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Spread float64 `json:"spread"` // (max - min) / median
}

// Ratio compares a peer with the baseline.
type Ratio struct {
	OfMedians float64 `json:"of_medians"`
	OfRounds  float64 `json:"of_rounds"` // median of the ratios within each round
}

// PeerSummary is a peer in one case.
type PeerSummary struct {
	Peer    string            `json:"peer"`
	Rounds  int               `json:"rounds"`
	Metrics map[string]Spread `json:"metrics"`
	Ratios  map[string]Ratio  `json:"ratios,omitempty"` // to the baseline
}

// CaseSummary is what follows from the runs of one case.
type CaseSummary struct {
	Case  string        `json:"case"`
	Peers []PeerSummary `json:"peers"`
}

// Verdict is one claim, judged.
type Verdict struct {
	Claim    string  `json:"claim"`
	Case     string  `json:"case"`
	Subject  string  `json:"subject"`
	Against  string  `json:"against,omitempty"` // the best of those named in the claim
	Metric   string  `json:"metric"`
	Measured float64 `json:"measured"` // a ratio of medians, or a median
	OfRounds float64 `json:"of_rounds,omitempty"`
	Bound    float64 `json:"bound"`
	AtMost   bool    `json:"at_most,omitempty"` // the bound is an upper one
	Spread   float64 `json:"spread"`            // the larger of both sides'
	Pass     bool    `json:"pass"`

	Difference bool   `json:"difference,omitempty"` // measured is subject minus against, in the metric's unit
	Shown      bool   `json:"shown,omitempty"`      // without a bound: documented, not judged
	Absent     string `json:"absent,omitempty"`     // why there is nothing to compare with on this host
}

var errSchema = errors.New("unknown schema")

// here makes paths below the working directory relative: where a checkout lies says
// nothing about a result.
func here(command []string) {
	dir, err := os.Getwd()
	if err != nil {
		return // then the paths stay as they are
	}
	for i, word := range command {
		command[i] = strings.TrimPrefix(word, dir+string(filepath.Separator))
	}
}

// Save writes the result, whole or not at all.
func (r *Result) Save(path string) error {
	for i := range r.Peers {
		here(r.Peers[i].Command)
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".result-*")
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	_, err = f.Write(append(text, '\n'))
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the first error is the one to report
		return fmt.Errorf("result: %w", err)
	}
	return nil
}

// ReadResult reads a saved result.
func ReadResult(path string) (*Result, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	r := new(Result)
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("result %s: %w", path, err)
	}
	if r.Schema != Schema {
		return nil, fmt.Errorf("result %s: %w %d, this program knows %d", path, errSchema, r.Schema, Schema)
	}
	return r, nil
}
