package nbd

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/ashlar-storage/ashlar/datapath"
)

// Export is a device under a name.
type Export struct {
	Name        string          // what clients ask for; up to 4096 bytes of UTF-8
	Description string          // for people; what LIST and INFO show
	Device      datapath.Device // closed by whoever opened it, after the server has stopped
	// Open opens the device, where Device is nil: when a client first selects the
	// export. All its connections share the device, and the set closes it after the
	// last has left. It runs on an ordinary goroutine and may take its time.
	Open     func() (datapath.Device, error)
	ReadOnly bool // refuse changes even where the device takes them
	TLSOnly  bool // serve it over TLS only, where the server offers TLS
	// ClientNames binds the export to client certificates: one of them has to be
	// the subject's common name, a DNS name, an e-mail address or a URI of the
	// verified certificate. Empty: any client may have it.
	ClientNames []string
}

// ErrUnknownExport says that there is no export of a name.
var ErrUnknownExport = errors.New("nbd: unknown export")

// Resolver knows exports that are not in a set: too many to open them all, or made
// and removed by others. Its methods run on any ordinary goroutine.
type Resolver interface {
	// Resolve returns the export of a name, which may be the empty one. The export
	// may have another name, its own; by that one its device is shared.
	//
	// Errors: ErrUnknownExport when there is none; clients learn of others only that
	// they cannot have it now.
	Resolve(name string) (*Export, error)
	// List returns the exports there are. What they would open is not opened.
	List() []*Export
}

// ExportSet is a set of exports that may change while a server uses it. The zero
// value is empty and ready.
type ExportSet struct {
	mu       sync.RWMutex
	exports  map[string]*Export
	fallback string // which export the empty name means
	resolver Resolver
	open     map[string]*opened // by the export's own name
}

// opened is a device that connections share.
type opened struct {
	export Export        // with its device; set when ready is closed
	err    error         // of opening; set when ready is closed
	ready  chan struct{} // closed when it is open, or cannot be opened
	gone   chan struct{} // closed when it is closed again

	users   int  // guarded by ExportSet.mu
	leaving bool // guarded by ExportSet.mu; it is being closed
}

// ValidateName reports why a name cannot be an export's.
func ValidateName(name string) error {
	switch {
	case len(name) > stringMax:
		return fmt.Errorf("export name of %d bytes: at most %d", len(name), stringMax)
	case !utf8.ValidString(name):
		return fmt.Errorf("export name %q: must be UTF-8", name)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("export name %q: contains a NUL", name)
	}
	return nil
}

// Add puts e into the set. The first export is also the default one, which the
// empty name means, unless one has the empty name itself.
func (s *ExportSet) Add(e *Export) error {
	if err := ValidateName(e.Name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.exports[e.Name]; ok {
		return fmt.Errorf("export %q: the name is taken", e.Name)
	}
	if s.exports == nil {
		s.exports = make(map[string]*Export)
		s.fallback = e.Name
	}
	s.exports[e.Name] = e
	return nil
}

// Remove takes an export out of the set. Connections that have it keep it.
func (s *ExportSet) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.exports, name)
}

// SetResolver has the set ask r for what is not in it. Exports in the set go before
// those of r.
func (s *ExportSet) SetResolver(r Resolver) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resolver = r
}

// Find returns the export of a name, or ErrUnknownExport. Names are looked up as
// they are: they are no paths, and ".." is a name like any other.
func (s *ExportSet) Find(name string) (*Export, error) {
	s.mu.RLock()
	e, ok := s.exports[name]
	if !ok && name == "" {
		e, ok = s.exports[s.fallback]
	}
	resolver := s.resolver
	s.mu.RUnlock()
	if !ok && resolver != nil {
		return resolver.Resolve(name)
	}
	if !ok {
		return nil, ErrUnknownExport
	}
	return e, nil
}

// List returns the exports sorted by name, those of the resolver included.
func (s *ExportSet) List() []*Export {
	s.mu.RLock()
	list := make([]*Export, 0, len(s.exports))
	for _, e := range s.exports {
		list = append(list, e)
	}
	resolver := s.resolver
	s.mu.RUnlock()
	byName := func(a, b *Export) int { return strings.Compare(a.Name, b.Name) }
	if resolver != nil {
		list = append(list, resolver.List()...)
	}
	slices.SortStableFunc(list, byName) // an export of the set comes before one of the resolver, and hides it
	return slices.CompactFunc(list, func(a, b *Export) bool { return a.Name == b.Name })
}

// acquire gives e with its device open. The device stays so until release, which
// is called once, after the last queue of the caller is closed.
func (s *ExportSet) acquire(e *Export) (with *Export, release func() error, err error) {
	if e.Open == nil || e.Device != nil {
		return e, func() error { return nil }, nil
	}
	for {
		s.mu.Lock()
		o := s.open[e.Name]
		switch {
		case o == nil:
			o = &opened{ready: make(chan struct{}), gone: make(chan struct{}), users: 1}
			if s.open == nil {
				s.open = make(map[string]*opened)
			}
			s.open[e.Name] = o
			s.mu.Unlock()
			o.export = *e
			o.export.Device, o.err = e.Open()
			if o.err != nil {
				s.mu.Lock()
				delete(s.open, e.Name) // those who wait learn why, those who come try again
				s.mu.Unlock()
			}
			close(o.ready)
		case o.leaving:
			s.mu.Unlock()
			<-o.gone
			continue
		default:
			o.users++
			s.mu.Unlock()
			<-o.ready
		}
		if o.err != nil {
			return nil, nil, o.err
		}
		// The rules of access are those of now, the device is shared.
		with := *e
		with.Device = o.export.Device
		return &with, func() error { return s.release(e.Name, o) }, nil
	}
}

// release closes a shared device after its last user has left.
func (s *ExportSet) release(name string, o *opened) error {
	s.mu.Lock()
	if o.users--; o.users > 0 {
		s.mu.Unlock()
		return nil
	}
	o.leaving = true
	s.mu.Unlock()
	err := o.export.Device.Close()
	s.mu.Lock()
	delete(s.open, name)
	s.mu.Unlock()
	close(o.gone)
	return err
}

// admits reports whether a client that showed certificate (nil: none) may have e.
func (e *Export) admits(certificate *x509.Certificate) bool {
	if len(e.ClientNames) == 0 {
		return true
	}
	if certificate == nil {
		return false
	}
	has := func(name string) bool { return name != "" && slices.Contains(e.ClientNames, name) }
	if has(certificate.Subject.CommonName) || slices.ContainsFunc(certificate.DNSNames, has) || slices.ContainsFunc(certificate.EmailAddresses, has) {
		return true
	}
	for _, u := range certificate.URIs {
		if has(u.String()) {
			return true
		}
	}
	return false
}

// info is the device as the export shows it.
func (e *Export) info() datapath.Info {
	i := e.Device.Info()
	i.ReadOnly = i.ReadOnly || e.ReadOnly
	return i
}

// contexts are the metadata contexts of a device. base:allocation is always
// there: a device that cannot tell says that everything is allocated.
func contexts(i *datapath.Info) []string {
	if slices.Contains(i.Contexts, ContextAllocation) {
		return i.Contexts
	}
	return append([]string{ContextAllocation}, i.Contexts...)
}

// transmissionFlags is what an export shows of itself to a connection.
func transmissionFlags(i *datapath.Info, structured, extended, contexts bool) TransmissionFlags {
	f := FlagHasFlags
	set := func(have bool, flag TransmissionFlags) {
		if have {
			f |= flag
		}
	}
	set(i.ReadOnly, FlagReadOnly)
	set(i.Has(datapath.FeatureFlush), FlagSendFlush)
	set(i.Has(datapath.FeatureFUA), FlagSendFUA)
	set(i.Has(datapath.FeatureRotational), FlagRotational)
	set(i.Has(datapath.FeatureCache), FlagSendCache)
	set(i.Has(datapath.FeatureMultiQueue), FlagCanMultiConn)
	if !i.ReadOnly {
		set(i.Has(datapath.FeatureDiscard), FlagSendTrim)
		set(i.Has(datapath.FeatureWriteZeroes), FlagSendWriteZeroes)
		set(i.Has(datapath.FeatureWriteZeroes|datapath.FeatureFastZero), FlagSendFastZero)
	}
	set(structured || extended, FlagSendDF)
	set(extended && contexts, FlagBlockStatusPayload)
	return f
}
