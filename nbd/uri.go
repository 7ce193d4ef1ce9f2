package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"
)

// DefaultPort is the port IANA assigned to NBD.
const DefaultPort = 10809

// URI is a parsed NBD URI (github.com/NetworkBlockDevice/nbd, doc/uri.md).
//
// The TLS parameters beyond that document (tls-certificates, tls-psk-file) are
// those of libnbd.
type URI struct {
	TLS    bool   // scheme nbds or nbds+unix: never go on in plaintext
	Unix   bool   // scheme nbd+unix or nbds+unix
	User   string // for TLS methods that need a user name; unused with certificates
	Host   string // TCP only; no brackets; "" means localhost
	Port   uint16 // TCP only; 0 in a URI without one, which means [DefaultPort]
	Socket string // unix only; a leading NUL byte is the abstract namespace
	Export string

	TLSType         string // "", "x509", "psk" or "anon"
	TLSHostname     string // the name the server's certificate must carry, if not Host
	TLSNoVerify     bool   // tls-verify-peer=0
	TLSCertificates string // directory of ca-cert.pem, client-cert.pem, client-key.pem
	TLSPSKFile      string

	// Experimental holds the parameters that begin with "x-", undecided here.
	Experimental []URIParameter
}

// URIParameter is a query parameter with its value, both unescaped.
type URIParameter struct{ Name, Value string }

// ParseURI reads an NBD URI. Whatever it does not understand is an error,
// parameters that begin with "x-" aside.
func ParseURI(s string) (*URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return nil, fmt.Errorf("nbd: URI %q: %w", s, err)
	}
	return u, nil
}

func parseURI(s string) (*URI, error) {
	parsed, err := url.Parse(s)
	if err != nil {
		var inner *url.Error
		if errors.As(err, &inner) {
			err = inner.Err // the URI itself is added by ParseURI
		}
		return nil, err
	}
	u := new(URI)
	switch parsed.Scheme {
	case "nbd":
	case "nbds":
		u.TLS = true
	case "nbd+unix":
		u.Unix = true
	case "nbds+unix":
		u.TLS, u.Unix = true, true
	default:
		return nil, fmt.Errorf("scheme %q (want nbd, nbds, nbd+unix or nbds+unix)", parsed.Scheme)
	}
	if parsed.Opaque != "" {
		return nil, errors.New("no // behind the scheme")
	}
	if parsed.Fragment != "" || strings.Contains(s, "#") {
		return nil, errors.New("a fragment (#) has no meaning in it")
	}
	if err := u.parseAuthority(parsed); err != nil {
		return nil, err
	}
	// Only the first slash separates; the rest belongs to the export name.
	u.Export = strings.TrimPrefix(parsed.Path, "/")
	if len(u.Export) > stringMax {
		return nil, fmt.Errorf("export name of %d bytes (at most %d)", len(u.Export), stringMax)
	}
	if strings.ContainsRune(u.Export, 0) || !utf8.ValidString(u.Export) {
		return nil, errors.New("export name is not UTF-8 without NUL")
	}
	if err := u.parseQuery(parsed.RawQuery); err != nil {
		return nil, err
	}
	if u.Unix && u.Socket == "" {
		return nil, errors.New("no socket parameter")
	}
	return u, nil
}

func (u *URI) parseAuthority(parsed *url.URL) error {
	if parsed.User != nil {
		if _, has := parsed.User.Password(); has {
			return errors.New("a password has no meaning in it")
		}
		u.User = parsed.User.Username()
	}
	u.Host = parsed.Hostname()
	if port := parsed.Port(); port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("port %q", port)
		}
		u.Port = uint16(n)
	}
	if u.Unix && parsed.Host != "" {
		return errors.New("a host and a unix socket at once (nbd+unix wants three slashes)")
	}
	if strings.Contains(u.Host, ":") {
		if ip, err := netip.ParseAddr(u.Host); err != nil || strings.ContainsFunc(ip.Zone(), notInHost) {
			return fmt.Errorf("host %q is not an IPv6 address", u.Host)
		}
	} else if strings.ContainsFunc(u.Host, notInHost) {
		return fmt.Errorf("host %q", u.Host)
	}
	return nil
}

func notInHost(r rune) bool { return !unreserved(r) }

// unreserved is the set of RFC 3986 section 2.3.
func unreserved(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._~", r)
}

// parseQuery does not use net/url's form decoding, which turns "+" into a space:
// RFC 3986 has no such rule, and a socket's name may hold one.
func (u *URI) parseQuery(query string) error {
	seen := make(map[string]bool)
	for _, part := range strings.Split(query, "&") {
		if part == "" {
			continue
		}
		name, value, _ := strings.Cut(part, "=")
		name, err := url.PathUnescape(name)
		if err != nil {
			return err
		}
		if value, err = url.PathUnescape(value); err != nil {
			return err
		}
		if seen[name] {
			return fmt.Errorf("parameter %s appears twice", name)
		}
		seen[name] = true
		if err := u.parameter(name, value); err != nil {
			return err
		}
	}
	return nil
}

func (u *URI) parameter(name, value string) error {
	switch {
	case name == "socket":
		if !u.Unix {
			return errors.New("a socket parameter needs the scheme nbd+unix or nbds+unix")
		}
		if value == "" || value == "\x00" || strings.ContainsRune(value[1:], 0) {
			return fmt.Errorf("socket %q", value)
		}
		u.Socket = value
	case name == "tls-type":
		if value != "x509" && value != "psk" && value != "anon" {
			return fmt.Errorf("tls-type %q (want x509, psk or anon)", value)
		}
		u.TLSType = value
	case name == "tls-hostname":
		u.TLSHostname = value
	case name == "tls-verify-peer":
		if value != "0" && value != "1" {
			return fmt.Errorf("tls-verify-peer %q (want 0 or 1)", value)
		}
		u.TLSNoVerify = value == "0"
	case name == "tls-certificates":
		u.TLSCertificates = value
	case name == "tls-psk-file":
		u.TLSPSKFile = value
	case strings.HasPrefix(name, "x-"):
		u.Experimental = append(u.Experimental, URIParameter{name, value})
	default:
		return fmt.Errorf("unknown parameter %q", name)
	}
	return nil
}

// String writes u as a URI. ParseURI of the result gives u again.
func (u *URI) String() string {
	var b strings.Builder
	b.WriteString("nbd")
	if u.TLS {
		b.WriteByte('s')
	}
	if u.Unix {
		b.WriteString("+unix")
	}
	b.WriteString("://")
	if u.User != "" {
		b.WriteString(escapeURI(u.User, ""))
		b.WriteByte('@')
	}
	if !u.Unix {
		if strings.Contains(u.Host, ":") {
			b.WriteString("[" + strings.ReplaceAll(u.Host, "%", "%25") + "]")
		} else {
			b.WriteString(u.Host)
		}
		if u.Port != 0 {
			b.WriteByte(':')
			b.WriteString(strconv.Itoa(int(u.Port)))
		}
	}
	b.WriteByte('/')
	b.WriteString(escapeURI(u.Export, "/:@+,="))
	separator := byte('?')
	for _, p := range u.parameters() {
		b.WriteByte(separator)
		separator = '&'
		b.WriteString(escapeURI(p.Name, "") + "=" + escapeURI(p.Value, "/:@+,"))
	}
	return b.String()
}

// parameters lists what String writes behind the question mark.
func (u *URI) parameters() []URIParameter {
	var list []URIParameter
	add := func(name, value string) {
		if value != "" {
			list = append(list, URIParameter{name, value})
		}
	}
	add("socket", u.Socket)
	add("tls-type", u.TLSType)
	add("tls-hostname", u.TLSHostname)
	if u.TLSNoVerify {
		add("tls-verify-peer", "0")
	}
	add("tls-certificates", u.TLSCertificates)
	add("tls-psk-file", u.TLSPSKFile)
	return append(list, u.Experimental...)
}

// escapeURI percent-encodes every byte of s that is neither unreserved nor in
// also.
func escapeURI(s, also string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c < utf8.RuneSelf && (unreserved(rune(c)) || strings.IndexByte(also, c) >= 0) {
			b.WriteByte(c)
		} else {
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
	return b.String()
}

// Address returns what [Dial] wants: network "tcp" with a host and port, or
// "unix" with a socket in the form of package net.
func (u *URI) Address() (network, address string) {
	if u.Unix {
		switch {
		case strings.HasPrefix(u.Socket, "\x00"):
			return "unix", "@" + u.Socket[1:]
		case strings.HasPrefix(u.Socket, "@"):
			return "unix", "./" + u.Socket // a file; "@" alone would be the abstract namespace
		}
		return "unix", u.Socket
	}
	host, port := u.Host, u.Port
	if host == "" {
		host = "localhost"
	}
	if port == 0 {
		port = DefaultPort
	}
	return "tcp", net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// Options returns base with the export and the TLS demands of u filled in. It
// reads the files that u names. A base with a TLSConfig keeps it; u can only add
// to its demands.
func (u *URI) Options(base Options) (Options, error) {
	options := base
	options.Export = u.Export
	if u.TLS {
		options.TLSRequired = true
	}
	if u.TLSType == "psk" || u.TLSType == "anon" || u.TLSPSKFile != "" {
		return options, fmt.Errorf("nbd: URI %s: TLS with pre-shared keys or without certificates is not supported (x509 is)", u)
	}
	if options.TLSConfig != nil || !u.wantsTLS() {
		return options, nil
	}
	config, err := u.tlsConfig()
	if err != nil {
		return options, fmt.Errorf("nbd: URI %s: %w", u, err)
	}
	options.TLSConfig = config
	return options, nil
}

func (u *URI) wantsTLS() bool {
	return u.TLS || u.TLSType != "" || u.TLSCertificates != "" || u.TLSHostname != ""
}

// tlsConfig reads the certificates as libnbd names them: ca-cert.pem must exist,
// client-cert.pem and client-key.pem may.
func (u *URI) tlsConfig() (*tls.Config, error) {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         u.TLSHostname,
		InsecureSkipVerify: u.TLSNoVerify, // the URI said so: tls-verify-peer=0
	}
	if u.TLSCertificates == "" {
		return config, nil
	}
	pem, err := os.ReadFile(filepath.Join(u.TLSCertificates, "ca-cert.pem"))
	if err != nil {
		return nil, err
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in ca-cert.pem", u.TLSCertificates)
	}
	certificate := filepath.Join(u.TLSCertificates, "client-cert.pem")
	if _, err := os.Stat(certificate); errors.Is(err, os.ErrNotExist) {
		return config, nil
	}
	pair, err := tls.LoadX509KeyPair(certificate, filepath.Join(u.TLSCertificates, "client-key.pem"))
	if err != nil {
		return nil, err
	}
	config.Certificates = []tls.Certificate{pair}
	return config, nil
}
