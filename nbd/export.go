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
	ReadOnly    bool            // refuse changes even where the device takes them
	TLSOnly     bool            // serve it over TLS only, where the server offers TLS
	// ClientNames binds the export to client certificates: one of them has to be
	// the subject's common name, a DNS name, an e-mail address or a URI of the
	// verified certificate. Empty: any client may have it.
	ClientNames []string
}

// ErrUnknownExport says that there is no export of a name.
var ErrUnknownExport = errors.New("nbd: unknown export")

// ExportSet is a set of exports that may change while a server uses it. The zero
// value is empty and ready.
type ExportSet struct {
	mu       sync.RWMutex
	exports  map[string]*Export
	fallback string // which export the empty name means
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

// Find returns the export of a name, or ErrUnknownExport. Names are looked up as
// they are: they are no paths, and ".." is a name like any other.
func (s *ExportSet) Find(name string) (*Export, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e, ok := s.exports[name]
	if !ok && name == "" {
		e, ok = s.exports[s.fallback]
	}
	if !ok {
		return nil, ErrUnknownExport
	}
	return e, nil
}

// List returns the exports sorted by name.
func (s *ExportSet) List() []*Export {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]*Export, 0, len(s.exports))
	for _, e := range s.exports {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b *Export) int { return strings.Compare(a.Name, b.Name) })
	return list
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
