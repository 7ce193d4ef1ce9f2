package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/nbd"
)

// Bounds and defaults of Config.
const (
	ioMax               = 4 << 20 // bytes of one read or write: a quarter of the least that is retained
	linkDepth           = 128     // requests on one connection; servers take 16 (nbdkit's threads) to some hundred
	connectionsMax      = 16
	defaultDeadTimeout  = 5 * time.Minute
	defaultStallTimeout = 30 * time.Second
	defaultRetain       = 64 << 20
	retainMin           = 4 * ioMax

	// resendAfter is how old a connection's end has to be before a change that was on
	// it is sent again on another: the server may still find the first copy among
	// what it received. Ours does not begin changes of a client that is gone when
	// they are older than half a second (nbd/resend.go); others have had the time.
	resendAfter = 600 * time.Millisecond
)

// Config says which export to use, and how.
type Config struct {
	URI string // nbd://, nbds://, nbd+unix:// or nbds+unix://; see nbd.ParseURI

	// TLS is used instead of what the URI says of certificates. TLSRequired
	// refuses to go on in plaintext; nbds:// does too.
	TLS         *tls.Config
	TLSRequired bool

	Connections  int           // most connections, where the server allows several; 1 when 0, at most 16
	DeadTimeout  time.Duration // how long requests wait for a server that is away; 5 min when 0
	StallTimeout time.Duration // how long a server may be silent before it is given up; 30 s when 0
	RetainBytes  int           // memory for acknowledged, unflushed data; 64 MiB when 0, at least 16 MiB

	Engine reactor.EngineKind // of the device's reactor; EngineAuto when empty
	Poll   reactor.PollMode   // of the device's reactor; PollAuto when empty

	Log *slog.Logger // slog.Default() when nil

	// For tests: the best form of messages to ask for, the first wait between attempts
	// to connect (backoffMin when 0), and resendAfter.
	headers         nbd.Headers
	backoff, resend time.Duration
}

func (c *Config) setDefaults() error {
	if c.Connections == 0 {
		c.Connections = 1
	}
	if c.DeadTimeout == 0 {
		c.DeadTimeout = defaultDeadTimeout
	}
	if c.StallTimeout == 0 {
		c.StallTimeout = defaultStallTimeout
	}
	if c.RetainBytes == 0 {
		c.RetainBytes = defaultRetain
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.backoff == 0 {
		c.backoff = backoffMin
	}
	if c.resend == 0 {
		c.resend = resendAfter
	}
	switch {
	case c.Connections < 0 || c.Connections > connectionsMax:
		return fmt.Errorf("remote: %d connections: must be 1 to %d", c.Connections, connectionsMax)
	case c.DeadTimeout < 0 || c.StallTimeout < 0:
		return fmt.Errorf("remote: a timeout must not be negative")
	case c.RetainBytes < retainMin:
		return fmt.Errorf("remote: %d bytes to retain unflushed data: must be at least %d", c.RetainBytes, retainMin)
	}
	return nil
}

// Device is an export of an NBD server as a device.
type Device struct {
	config           Config // immutable
	network, address string // immutable
	options          nbd.Options
	log              *slog.Logger
	reactor          *reactor.Reactor // immutable; runs core

	info  atomic.Pointer[datapath.Info] // written by the core
	state atomic.Pointer[State]         // written by the core

	core core // owned by the reactor

	// The connector is one goroutine from Open to Close.
	cancel context.CancelFunc
	want   chan bool // a session was lost; true when it had served
	done   chan struct{}

	mu    sync.Mutex
	ended []*nbd.Link // guarded by mu: cut, to be waited for
}

// Open connects to the export and makes a device of it. ctx bounds that; later
// connections are made by the device itself.
//
// Errors: what keeps it from connecting now. Close ends the device.
func Open(ctx context.Context, c Config) (*Device, error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	u, err := nbd.ParseURI(c.URI)
	if err != nil {
		return nil, err
	}
	d := &Device{config: c, want: make(chan bool, 1), done: make(chan struct{})}
	d.network, d.address = u.Address()
	d.log = c.Log.With("remote", c.URI)
	if d.options, err = u.Options(nbd.Options{TLSConfig: c.TLS, TLSRequired: c.TLSRequired}); err != nil {
		return nil, err
	}
	d.options.MetaContexts = []string{datapath.ContextAllocation, datapath.ContextDepth}
	d.options.Depth, d.options.Headers = linkDepth, c.headers
	links, err := d.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("remote: %s: %w", c.URI, err)
	}
	if err := d.start(links); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	ctx, d.cancel = context.WithCancel(context.Background())
	go d.keepConnected(ctx) // ends when Close cancels its context
	return d, nil
}

// start makes the reactor and gives it the first session.
func (d *Device) start(links []*nbd.Link) (err error) {
	d.setInfo(links[0])
	d.reactor, err = reactor.Start(reactor.Config{
		Name: "remote", Engine: d.config.Engine, Poll: d.config.Poll, BufferBytes: 1 << 20, Log: d.config.Log,
	})
	if err != nil {
		return errors.Join(err, d.abandon(links))
	}
	var adoptErr error
	err = d.reactor.Run(func(*reactor.Reactor) {
		if adoptErr = d.core.start(d); adoptErr == nil {
			adoptErr = d.core.adopt(links)
		} else {
			adoptErr = errors.Join(adoptErr, d.abandon(links))
		}
	})
	return errors.Join(err, adoptErr)
}

// abandon closes links that serve nobody.
func (d *Device) abandon(links []*nbd.Link) error {
	for _, l := range links {
		l.Close()
	}
	d.bury(links)
	return nil
}

// bury has links that were cut waited for.
func (d *Device) bury(links []*nbd.Link) {
	d.mu.Lock()
	d.ended = append(d.ended, links...)
	d.mu.Unlock()
}

// waitEnded waits for the links that were cut.
func (d *Device) waitEnded() {
	d.mu.Lock()
	links := d.ended
	d.ended = nil
	d.mu.Unlock()
	for _, l := range links {
		l.Wait()
	}
}

// Info implements [datapath.Device]. The size grows with the server's.
func (d *Device) Info() datapath.Info { return *d.info.Load() }

// Close implements [datapath.Device]. It flushes nothing: what was acknowledged
// and not flushed is the server's to keep.
func (d *Device) Close() error {
	if d.cancel != nil {
		d.cancel()
		<-d.done
	}
	if d.reactor != nil {
		_ = d.reactor.Run(func(*reactor.Reactor) { d.core.close() }) // it runs until Stop
		d.reactor.Stop()
	}
	d.waitEnded()
	return nil
}

// Abandon ends all requests with StatusShutdown, and those to come with StatusIO: for
// a process that has to end and cannot wait for the server. Close follows.
//
// Context: any goroutine that may wait.
func (d *Device) Abandon() {
	d.cancel()
	_ = d.reactor.Run(func(*reactor.Reactor) { // stopped: nothing is left
		const reason = "the device was abandoned"
		d.core.lost(errors.New(reason))
		d.core.failAll(datapath.StatusShutdown)
		d.core.refuse(reason)
	})
}

// features are what the device offers, by what the server does.
var features = []struct {
	flag    nbd.TransmissionFlags
	feature datapath.Features
	name    string
}{
	{nbd.FlagSendFlush, datapath.FeatureFlush, "flush"},
	{nbd.FlagSendFUA, datapath.FeatureFUA, "FUA"},
	{nbd.FlagSendTrim, datapath.FeatureDiscard, "trim"},
	{nbd.FlagSendWriteZeroes, datapath.FeatureWriteZeroes, "write-zeroes"},
	{nbd.FlagSendFastZero, datapath.FeatureFastZero, "fast zero"},
	{nbd.FlagSendCache, datapath.FeatureCache, "cache"},
}

// describe is what a server's export is as a device.
func describe(uri string, l *nbd.Link) datapath.Info {
	export := l.Info()
	info := datapath.Info{
		Description: uri, Size: export.Size, ReadOnly: export.Flags&nbd.FlagReadOnly != 0,
		// A server that says nothing takes any length, by the protocol's word; 512
		// is what it advises clients to keep to ("Size constraints").
		MinIO: max(export.BlockMin, 1), PreferredIO: max(export.BlockPreferred, datapath.BlockSize), MaxIO: ioMax,
		Features: datapath.FeatureMultiQueue, // one owner of all writes
	}
	if export.BlockMin == 0 && export.Size%512 == 0 {
		info.MinIO = 512
	}
	info.Size -= info.Size % uint64(info.MinIO) // the rest cannot be reached
	info.PreferredIO = min(info.PreferredIO, ioMax)
	for _, f := range features {
		if export.Flags&f.flag != 0 {
			info.Features |= f.feature
		}
	}
	if export.Flags&nbd.FlagRotational != 0 {
		info.Features |= datapath.FeatureRotational
	}
	for _, c := range l.Contexts() {
		info.Contexts = append(info.Contexts, c.Name)
		if c.Name == datapath.ContextAllocation {
			info.Features |= datapath.FeatureExtents
		}
	}
	if !info.Has(datapath.FeatureExtents) {
		info.Contexts = nil
	}
	return info
}

func (d *Device) setInfo(l *nbd.Link) {
	info := describe(d.config.URI, l)
	d.info.Store(&info)
}

// check says why an export cannot be the one the device was opened on, or "".
func (d *Device) check(l *nbd.Link) string {
	have, now := d.info.Load(), describe(d.config.URI, l)
	switch {
	case now.Size < have.Size:
		return fmt.Sprintf("the server came back with %d bytes instead of %d", now.Size, have.Size)
	case now.ReadOnly && !have.ReadOnly:
		return "the server came back with a read-only export"
	case now.MinIO > have.MinIO:
		return fmt.Sprintf("the server came back with blocks of %d bytes instead of %d", now.MinIO, have.MinIO)
	}
	for _, f := range features {
		if have.Has(f.feature) && !now.Has(f.feature) {
			return "the server came back without " + f.name
		}
	}
	for _, c := range have.Contexts {
		if contextIndex(l, c) < 0 {
			return "the server came back without the metadata context " + c
		}
	}
	return ""
}

func contextIndex(l *nbd.Link, name string) int {
	for i, c := range l.Contexts() {
		if c.Name == name {
			return i
		}
	}
	return -1
}
