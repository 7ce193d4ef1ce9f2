package harness

import (
	"context"
	"slices"
	"time"
)

// meanwhile is what a plan does while the client runs.
type meanwhile struct {
	cancel context.CancelFunc
	ended  chan struct{}

	// Owned by the goroutine until ended closes.
	calls []time.Duration
	err   error
}

// startMeanwhile begins during, which may be nil; it ends with Stop.
func startMeanwhile(ctx context.Context, during func(context.Context) ([]time.Duration, error)) *meanwhile {
	m := &meanwhile{cancel: func() {}, ended: make(chan struct{})}
	if during == nil {
		close(m.ended)
		return m
	}
	ctx, m.cancel = context.WithCancel(ctx)
	go func() { // ends when Stop cancels ctx
		defer close(m.ended)
		m.calls, m.err = during(ctx)
	}()
	return m
}

// Stop ends it and gives how long each call took. A second Stop gives the same.
func (m *meanwhile) Stop() ([]time.Duration, error) {
	m.cancel()
	<-m.ended
	return m.calls, m.err
}

// addCalls keeps what the calls made meanwhile took.
func (r *RunResult) addCalls(calls []time.Duration) {
	if len(calls) == 0 {
		return
	}
	values := make([]float64, len(calls))
	for i, d := range calls {
		values[i] = micros(d)
	}
	r.Calls, r.CallMedian, r.CallMax = len(calls), median(values), slices.Max(values)
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
