package daemon

import (
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// StartHTTP serves /metrics, /healthz and /debug/pprof on a loopback address until
// stop is called. health says how the process is, in one or more lines; not ok is
// answered with 503.
func StartHTTP(address string, health func() (ok bool, text string), metrics ...prometheus.Collector) (where net.Addr, stop func(), err error) {
	if err := httpAddress(address); err != nil {
		return nil, nil, err
	}
	l, err := ListenTCP(address, false, false)
	if err != nil {
		return nil, nil, err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registry.MustRegister(metrics...)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		ok, text := health()
		if !ok {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = w.Write([]byte(text + "\n")) // a client that left
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { // ends with Close
		defer close(done)
		_ = server.Serve(l)
	}()
	return l.Addr(), func() {
		_ = server.Close() // and whoever reads
		<-done
	}, nil
}

// httpAddress refuses an address that other hosts reach: what is served there is plain
// text for everybody, profiles of the process included.
func httpAddress(address string) error {
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", address, err)
	}
	if !a.IP.IsLoopback() {
		return fmt.Errorf("listen on %s: metrics and profiles are served on a loopback address only, such as 127.0.0.1:%d; have an agent or a proxy of this host pass them on", address, a.Port)
	}
	return nil
}

// Healthy is the health of a process that serves as long as it lives.
func Healthy() (ok bool, text string) { return true, "ok" }
