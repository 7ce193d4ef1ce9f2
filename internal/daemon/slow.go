package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filter"
)

const (
	// slowBurst and slowRate bound the lines about slow requests: a disk that hangs
	// makes thousands of them, and the first ones say it all.
	slowBurst = 20
	slowRate  = 5 // lines a second
	// slowKeys bounds how many exports and operations are remembered; names come and go.
	slowKeys = 4096
)

// slowLog writes about requests that took long. One goroutine does, away from the
// reactors; it ends with stop.
type slowLog struct {
	requests  *filter.SlowRequests
	threshold time.Duration
	log       *slog.Logger
	tracer    trace.Tracer // nil: none
	ended     chan struct{}
	done      chan struct{}

	// Owned by the goroutine.
	tokens     float64
	filled     time.Time
	suppressed uint64 // lines left out since the last one
	dropped    uint64 // as of the last line

	mu     sync.Mutex
	counts map[slowKey]*slowCount
}

type slowKey struct {
	name string
	op   datapath.Op
}

// slowCount is what is known of one export and operation.
type slowCount struct {
	count   uint64
	latest  time.Time
	seconds float64
	trace   string
}

// startSlowLog takes requests of at least threshold; 0: none, and the log is nil,
// which is ready for use, too.
func startSlowLog(threshold time.Duration, log *slog.Logger, tracer trace.Tracer) *slowLog {
	if threshold <= 0 {
		return nil
	}
	l := &slowLog{
		requests: filter.NewSlowRequests(threshold), threshold: threshold, log: log, tracer: tracer,
		ended: make(chan struct{}), done: make(chan struct{}), tokens: slowBurst, filled: time.Now(), counts: map[slowKey]*slowCount{},
	}
	go l.run() // ends with stop
	return l
}

// taking is where the data path puts slow requests; nil: nowhere.
func (l *slowLog) taking() *filter.SlowRequests {
	if l == nil {
		return nil
	}
	return l.requests
}

// stop ends the goroutine, after what waits. Requests have ended before.
func (l *slowLog) stop() {
	if l == nil {
		return
	}
	close(l.ended)
	<-l.done
}

func (l *slowLog) run() {
	defer close(l.done)
	for {
		select {
		case r := <-l.requests.Waiting():
			l.take(&r)
		case <-l.ended:
			for {
				select {
				case r := <-l.requests.Waiting():
					l.take(&r)
				default:
					return
				}
			}
		}
	}
}

// take counts a request, writes of it, and traces it.
func (l *slowLog) take(r *filter.SlowRequest) {
	id := l.trace(r)
	l.mu.Lock()
	key := slowKey{r.Name, r.Op}
	c := l.counts[key]
	if c == nil {
		if len(l.counts) >= slowKeys {
			clear(l.counts)
		}
		c = &slowCount{}
		l.counts[key] = c
	}
	c.count++
	c.latest, c.seconds, c.trace = r.Ended, r.Total.Seconds(), id
	l.mu.Unlock()
	if !l.allowed(time.Now()) {
		l.suppressed++
		return
	}
	stages := []any{}
	for _, s := range r.Stages() {
		stages = append(stages, slog.Duration(s.Stage.String(), s.Time))
	}
	attributes := []any{
		"volume", r.Name, "op", r.Op.String(), "offset", r.Offset, "length", r.Length, "status", r.Status.String(),
		"total", r.Total, slog.Group("stages", stages...), "trace_id", id,
	}
	dropped := l.requests.Dropped()
	if left := l.suppressed + dropped - l.dropped; left > 0 {
		attributes = append(attributes, "not_logged", left)
	}
	l.suppressed, l.dropped = 0, dropped
	l.log.Warn("slow request", attributes...)
}

// allowed takes a line from what the rate gives.
func (l *slowLog) allowed(now time.Time) bool {
	l.tokens = min(l.tokens+now.Sub(l.filled).Seconds()*slowRate, slowBurst)
	l.filled = now
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}

// trace makes a span of the request, with one below it for each stage, and returns
// the id of its trace. Without tracing the id is only for the log and the metrics.
func (l *slowLog) trace(r *filter.SlowRequest) string {
	if l.tracer == nil {
		var b [16]byte
		_, _ = rand.Read(b[:]) // never fails
		return hex.EncodeToString(b[:])
	}
	at := r.Ended.Add(-r.Total)
	ctx, span := l.tracer.Start(context.Background(), "request "+r.Op.String(), trace.WithNewRoot(), trace.WithTimestamp(at), trace.WithAttributes(
		attribute.String("ashlar.volume", r.Name), attribute.Int64("ashlar.offset", int64(r.Offset)), attribute.Int64("ashlar.length", int64(r.Length)),
		attribute.String("ashlar.status", r.Status.String())))
	for _, s := range r.Stages() { // one after the other, as if each had been entered once
		_, stage := l.tracer.Start(ctx, s.Stage.String(), trace.WithTimestamp(at))
		at = at.Add(s.Time)
		stage.End(trace.WithTimestamp(at))
	}
	if r.Status != datapath.StatusOK {
		span.SetStatus(codes.Error, r.Status.String())
	}
	span.End(trace.WithTimestamp(r.Ended))
	return span.SpanContext().TraceID().String()
}

// exemplars are the latest slow request of an export and operation, or none. Any
// goroutine.
func (l *slowLog) exemplars(name string, op datapath.Op) []prometheus.Exemplar {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.counts[slowKey{name, op}]
	if c == nil {
		return nil
	}
	return []prometheus.Exemplar{{Value: c.seconds, Timestamp: c.latest, Labels: prometheus.Labels{"trace_id": c.trace}}}
}

// slowCollector shows what slow requests there were.
type slowCollector struct{ log *slowLog }

const slowFamily = family(sectionSlow)

var (
	metricSlow          = slowFamily.counter("export_slow_requests_total", "Requests that took at least the threshold.", "export", "op")
	metricSlowDropped   = slowFamily.counter("export_slow_requests_dropped_total", "Slow requests of which nothing but their latency is known: too many ended at once.")
	metricSlowThreshold = slowFamily.gauge("export_slow_request_threshold_seconds", "How long a request takes to count as slow (--slow-io).")
)

// Describe implements prometheus.Collector.
func (c *slowCollector) Describe(ch chan<- *prometheus.Desc) { slowFamily.describe(ch) }

// Collect implements prometheus.Collector.
func (c *slowCollector) Collect(ch chan<- prometheus.Metric) {
	if c.log == nil {
		return
	}
	metricSlowThreshold.send(ch, c.log.threshold.Seconds())
	metricSlowDropped.send(ch, float64(c.log.requests.Dropped()))
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	for key, n := range c.log.counts {
		metricSlow.send(ch, float64(n.count), key.name, key.op.String())
	}
}
