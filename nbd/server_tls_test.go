package nbd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// serverPKI is an authority with what it has signed.
type serverPKI struct {
	t      testing.TB
	dir    string // ca.pem, and NAME.pem with NAME.key for what is issued
	root   *x509.Certificate
	key    *ecdsa.PrivateKey
	roots  *x509.CertPool
	serial int64
}

func newServerPKI(t testing.TB) *serverPKI {
	t.Helper()
	p := &serverPKI{t: t, dir: t.TempDir(), roots: x509.NewCertPool()}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, key := p.sign(template)
	p.key = key
	var err error
	if p.root, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	p.roots.AddCert(p.root)
	p.save("ca.pem", "CERTIFICATE", der)
	return p
}

func (p *serverPKI) save(name, kind string, der []byte) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// sign makes a key and a certificate for it, signed by the authority, or by
// itself when there is none yet.
func (p *serverPKI) sign(template *x509.Certificate) ([]byte, *ecdsa.PrivateKey) {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	p.serial++
	template.SerialNumber = big.NewInt(p.serial)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := template, key
	if p.root != nil {
		parent, signer = p.root, p.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		p.t.Fatal(err)
	}
	return der, key
}

// issue makes a certificate and writes it to files.
func (p *serverPKI) issue(name string, template *x509.Certificate) tls.Certificate {
	p.t.Helper()
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, key := p.sign(template)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.save(name+".pem", "CERTIFICATE", der)
	p.save(name+".key", "PRIVATE KEY", private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (p *serverPKI) path(name string) string { return filepath.Join(p.dir, name) }

// serverConfig is what LoadTLS makes of the files.
func (p *serverPKI) serverConfig(clients bool) *tls.Config {
	p.t.Helper()
	p.issue("server", &x509.Certificate{DNSNames: []string{"storage.example"}})
	ca := ""
	if clients {
		ca = p.path("ca.pem")
	}
	c, err := LoadTLS(p.path("server.pem"), p.path("server.key"), ca, false)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

func (p *serverPKI) clientConfig(certificates ...tls.Certificate) *tls.Config {
	return &tls.Config{RootCAs: p.roots, ServerName: "storage.example", Certificates: certificates}
}

// startTLSServer serves "open" and "secret", the latter over TLS only.
func startTLSServer(t testing.TB, mode TLSMode, config ServerConfig) (*serverRig, *serverPKI) {
	t.Helper()
	p := newServerPKI(t)
	config.TLS, config.TLSConfig = mode, p.serverConfig(true)
	return startServer(t, serverSetup{config: config},
		&Export{Name: "open", Device: memory(t, 1<<20)},
		&Export{Name: "secret", Device: memory(t, 2<<20), TLSOnly: true},
	), p
}

func TestServerForcedTLS(t *testing.T) {
	rig, p := startTLSServer(t, TLSForced, ServerConfig{})
	r := rig.dial()
	for _, opt := range []option{optList, optInfo, optGo, optStructuredReply, optListMetaContext, optSetMetaContext, optExtendedHeaders, optPeekExport, 0, 99, 0xffffffff} {
		if kind := r.optionResult(opt, []byte("whatever this is")); kind != repErrTLSRequired {
			t.Errorf("option %d before TLS: reply %#x", opt, uint32(kind))
		}
	}
	if kind := r.optionResult(optStartTLS, []byte("x")); kind != repErrInvalid {
		t.Errorf("STARTTLS with data: reply %#x", uint32(kind))
	}
	r.startTLS(p.clientConfig())
	for _, c := range []struct {
		opt  option
		data []byte
		want optionReply
	}{
		{optStartTLS, nil, repErrInvalid}, {optStartTLS, []byte("x"), repErrInvalid}, {99, nil, repErrUnsupported}, {optList, nil, repAck},
		{optInfo, rawInfo("third"), repErrUnknown}, {optInfo, rawInfo("secret"), repAck}, {optStructuredReply, nil, repAck},
	} {
		if kind := r.optionResult(c.opt, c.data); kind != c.want {
			t.Errorf("option %d in TLS: reply %#x, want %#x", c.opt, uint32(kind), uint32(c.want))
		}
	}
	if size, _ := r.goExport("secret"); size != 2<<20 {
		t.Errorf("size %d", size)
	}

	abort := rig.dial()
	abort.mustOption(optAbort, nil)
	abort.expectClosed()
	byName := rig.dial()
	byName.sendOption(optExportName, []byte("open"))
	byName.expectClosed()
	rawDial(t, "unix", rig.address, 0).expectClosed() // it cannot ask for TLS
}

func TestServerSelectiveTLS(t *testing.T) {
	rig, p := startTLSServer(t, TLSSelective, ServerConfig{})
	names := func(r *rawConn) (names []string) {
		for _, reply := range r.option(optList, nil) {
			if reply.kind == repServer {
				names = append(names, string(reply.data[4:4+binary.BigEndian.Uint32(reply.data)]))
			}
		}
		return names
	}
	r := rig.dial()
	for _, c := range []struct {
		opt  option
		data []byte
		want optionReply
	}{
		{99, nil, repErrUnsupported}, {optStructuredReply, nil, repAck}, {optInfo, rawInfo("open"), repAck},
		{optInfo, rawInfo("secret"), repErrTLSRequired}, {optGo, rawInfo("secret"), repErrTLSRequired},
		{optGo, rawInfo("third"), repErrTLSRequired}, // not to tell it from a secret one
		{optListMetaContext, rawContexts("open"), repAck},
	} {
		if kind := r.optionResult(c.opt, c.data); kind != c.want {
			t.Errorf("option %d %q before TLS: reply %#x, want %#x", c.opt, c.data, uint32(kind), uint32(c.want))
		}
	}
	if kind := r.optionResult(optSetMetaContext, rawContexts("secret", ContextAllocation)); kind&repError == 0 {
		t.Errorf("contexts of a secret export before TLS: reply %#x", uint32(kind))
	}
	if n := names(r); !slices.Equal(n, []string{"open"}) {
		t.Errorf("listed before TLS: %q", n)
	}
	r.startTLS(p.clientConfig())
	if n := names(r); !slices.Equal(n, []string{"open", "secret"}) {
		t.Errorf("listed in TLS: %q", n)
	}
	if kind := r.optionResult(optGo, rawInfo("third")); kind != repErrUnknown {
		t.Errorf("unknown export in TLS: reply %#x", uint32(kind))
	}
	r.goExport("secret")

	newSession(rig.dial(), HeadersStructured, "open").readAt(0, 4096) // without TLS
	byName := rawDial(t, "unix", rig.address, 0)
	byName.sendOption(optExportName, []byte("open"))
	byName.read(10 + 124)
	byName = rawDial(t, "unix", rig.address, 0)
	if kind := byName.optionResult(optStartTLS, nil); kind != repErrPolicy {
		t.Errorf("STARTTLS without fixed newstyle: reply %#x", uint32(kind))
	}
	for _, name := range []string{"secret", "third"} { // a NOTLS server never says TLS_REQD
		if kind := byName.optionResult(optGo, rawInfo(name)); kind != repErrUnknown {
			t.Errorf("%s without fixed newstyle: reply %#x", name, uint32(kind))
		}
	}
	byName.sendOption(optExportName, []byte("secret"))
	byName.expectClosed()
	byName = rig.dial()
	byName.startTLS(p.clientConfig())
	byName.sendOption(optExportName, []byte("secret"))
	byName.read(10)
}

func TestServerWithoutTLSNeverAsksForIt(t *testing.T) {
	rig := startServer(t, serverSetup{}, &Export{Name: "secret", Device: memory(t, 1<<20), TLSOnly: true})
	r := rig.dial()
	if kind := r.optionResult(optStartTLS, nil); kind != repErrPolicy {
		t.Errorf("STARTTLS: reply %#x", uint32(kind))
	}
	if kind := r.optionResult(optInfo, rawInfo("third")); kind != repErrUnknown {
		t.Errorf("reply %#x", uint32(kind))
	}
	r.goExport("secret")
}

// TestServerForgetsWhatWasNegotiatedBeforeTLS: it could have been said by
// someone in the middle.
func TestServerForgetsWhatWasNegotiatedBeforeTLS(t *testing.T) {
	rig, p := startTLSServer(t, TLSSelective, ServerConfig{})
	for _, opt := range []option{optStructuredReply, optExtendedHeaders} {
		r := rig.dial()
		r.mustOption(opt, nil)
		r.setContexts("open", ContextAllocation)
		r.startTLS(p.clientConfig())
		if kind := r.optionResult(optSetMetaContext, rawContexts("open", ContextAllocation)); kind != repErrInvalid {
			t.Errorf("SET_META_CONTEXT in TLS after option %d before: reply %#x", opt, uint32(kind))
		}
		if _, flags := r.goExport("open"); flags&(FlagSendDF|FlagBlockStatusPayload) != 0 {
			t.Errorf("flags %#x", flags)
		}
		r.sendRequest(0, CommandRead, 1, 0, 16, nil)
		if errno, cookie := r.readSimpleReply(); errno != ErrnoOK || cookie != 1 {
			t.Errorf("read: %v, cookie %d", errno, cookie)
		}
		r.read(16)

		r = rig.dial()
		r.mustOption(opt, nil)
		r.startTLS(p.clientConfig())
		r.mustOption(opt, nil) // anew
		r.setContexts("open", ContextAllocation)
	}
	// Contexts selected in TLS do not come from before either.
	r := rig.dial()
	r.mustOption(optStructuredReply, nil)
	r.setContexts("open", ContextAllocation)
	r.startTLS(p.clientConfig())
	r.mustOption(optStructuredReply, nil)
	r.goExport("open")
	r.sendRequest(0, CommandBlockStatus, 1, 0, 4096, nil)
	if chunk := r.readStructuredReply(); chunk.errno() != ErrnoInvalid {
		t.Errorf("%+v", chunk)
	}
}

// TestServerDropsPlaintextBehindStartTLS sends options in the same segment as
// STARTTLS, as an attacker in the middle would.
func TestServerDropsPlaintextBehindStartTLS(t *testing.T) {
	rig, p := startTLSServer(t, TLSSelective, ServerConfig{})
	for _, injected := range [][]byte{
		appendOption(nil, optStructuredReply, nil),
		appendOption(nil, optAbort, nil),
		appendOption(appendOption(nil, optList, nil), optGo, rawInfo("open")),
		bytes.Repeat([]byte{0}, 5),
	} {
		r := rig.dial()
		r.send(append(appendOption(nil, optStartTLS, nil), injected...))
		if reply := r.readOptionReply(); reply.kind != repAck {
			t.Fatalf("STARTTLS: reply %#x", uint32(reply.kind))
		}
		conn := tls.Client(r.conn, p.clientConfig())
		if err := conn.Handshake(); err == nil {
			// Had the bytes been dropped instead of read as TLS, they must at least
			// have had no effect.
			t.Error("the TLS handshake succeeds although bytes stood before it")
		}
	}
	if s := rig.server.Stats(); s.Connections != 0 {
		t.Errorf("%d connections in transmission", s.Connections)
	}
}

func TestServerTakesTLSFromTwelveOn(t *testing.T) {
	rig, p := startTLSServer(t, TLSForced, ServerConfig{})
	for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		r := rig.dial()
		r.mustOption(optStartTLS, nil)
		c := p.clientConfig()
		c.MinVersion, c.MaxVersion = version, version
		conn := tls.Client(r.conn, c)
		if err := conn.Handshake(); (err == nil) != ok {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		if ok {
			r = newRawConn(t, conn)
			newSession(r, HeadersExtended, "secret").readAt(0, 100)
		}
	}
	// The failed ones end, too.
	rig.connections(2)
	eventually(t, "failed TLS handshakes end", func() bool { return rig.server.Stats().Negotiating == 0 })
}

func TestServerDropsFailedTLSHandshakes(t *testing.T) {
	rig, _ := startTLSServer(t, TLSForced, ServerConfig{})
	for _, garbage := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff" + strings.Repeat("x", 100), strings.Repeat("\x00", 4096)} {
		r := rig.dial()
		r.mustOption(optStartTLS, nil)
		r.send([]byte(garbage))
		if _, err := io.Copy(io.Discard, r.conn); errors.Is(err, os.ErrDeadlineExceeded) { // alerts may come before the end
			t.Errorf("%.10q: not dropped", garbage)
		}
	}
	if n := rig.server.Stats().HandshakesFailed; n != 3 {
		t.Errorf("%d handshakes failed", n)
	}
}

func TestServerDeadlineCoversTLS(t *testing.T) {
	rig, _ := startTLSServer(t, TLSForced, ServerConfig{HandshakeTimeout: 100 * time.Millisecond})
	r := rig.dial()
	r.mustOption(optStartTLS, nil)
	r.expectClosed() // the client says nothing more
	if n := rig.server.Stats().HandshakesFailed; n != 1 {
		t.Errorf("%d handshakes failed", n)
	}
}

// tappedConn keeps what was read from a connection.
type tappedConn struct {
	net.Conn
	heard []byte
}

// Read implements net.Conn.
func (c *tappedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.heard = append(c.heard, b[:n]...)
	return n, err
}

// lastRecord is the type of the last TLS record heard.
func (c *tappedConn) lastRecord() (kind byte) {
	for b := c.heard; len(b) >= 5; {
		kind = b[0]
		b = b[min(len(b), 5+int(binary.BigEndian.Uint16(b[3:]))):]
	}
	return kind
}

// TestServerSaysGoodbyeInTLS: without close_notify a client cannot tell the end
// from a cut. In TLS 1.2 one can see it from outside.
func TestServerSaysGoodbyeInTLS(t *testing.T) {
	rig, p := startTLSServer(t, TLSForced, ServerConfig{})
	var tap *tappedConn
	dial := func() *rawConn {
		r := rig.dial()
		tap = &tappedConn{Conn: r.conn}
		r.conn = tap
		c := p.clientConfig()
		c.MaxVersion = tls.VersionTLS12
		r.startTLS(c)
		return r
	}
	clean := func(what string, r *rawConn) {
		t.Helper()
		if _, err := r.in.ReadByte(); err != io.EOF {
			t.Errorf("%s: %v, want the end", what, err)
		}
		if kind := tap.lastRecord(); kind != 21 { // alert
			t.Errorf("%s: the last record is of type %d", what, kind)
		}
	}
	r := dial()
	r.mustOption(optAbort, nil)
	clean("ABORT", r)

	r = dial()
	r.sendOption(optExportName, []byte("third"))
	clean("unknown export", r)

	r = dial()
	s := newSession(r, HeadersStructured, "open")
	s.readAt(0, 512)
	s.send(appendRequest(nil, false, 0, CommandDisconnect, 1, 0, 0))
	clean("DISC", r)

	r = dial()
	newSession(r, HeadersStructured, "open")
	rig.stop()
	clean("shutdown", r)
}

func TestServerCarriesEveryModeOverTLS(t *testing.T) {
	rig, p := startTLSServer(t, TLSForced, ServerConfig{})
	onModes(t, func(t *testing.T, mode Headers) {
		r := rig.dial()
		r.t = t
		r.startTLS(p.clientConfig())
		s := newSession(r, mode, "secret")
		data := make([]byte, 2<<20)
		_, _ = rand.Read(data) // never fails
		s.write(0, data)
		for range 4 {
			s.queue(0, CommandRead, 0, 2<<20, nil)
			s.queue(0, CommandFlush, 0, 0, nil)
		}
		s.push()
		s.waitAll()
		if got := s.readAt(1, 2<<20-1); !bytes.Equal(got, data[1:]) {
			t.Error("data differ")
		}
		// The end of the client's stream ends the connection, after the replies.
		a := s.queue(0, CommandRead, 0, 1<<20, nil)
		s.push()
		if err := r.conn.(*tls.Conn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		s.wait(a)
		s.expectClosed()
	})
}

func TestServerBindsExportsToClientCertificates(t *testing.T) {
	p := newServerPKI(t)
	uri, err := url.Parse("spiffe://example/host-u")
	if err != nil {
		t.Fatal(err)
	}
	clients := map[string][]tls.Certificate{
		"none":  nil,
		"a":     {p.issue("a", &x509.Certificate{Subject: pkix.Name{CommonName: "host-a"}})},
		"b":     {p.issue("b", &x509.Certificate{Subject: pkix.Name{CommonName: "other"}, DNSNames: []string{"x.example", "host-b"}})},
		"mail":  {p.issue("mail", &x509.Certificate{EmailAddresses: []string{"host-a"}})},
		"uri":   {p.issue("uri", &x509.Certificate{URIs: []*url.URL{uri}})},
		"empty": {p.issue("empty", &x509.Certificate{})},
	}
	rig := startServer(t, serverSetup{config: ServerConfig{TLS: TLSSelective, TLSConfig: p.serverConfig(true)}},
		&Export{Name: "any", Device: memory(t, 1<<20)},
		&Export{Name: "a", Device: memory(t, 1<<20), ClientNames: []string{"host-a"}},
		&Export{Name: "b", Device: memory(t, 1<<20), ClientNames: []string{"host-b", uri.String(), ""}},
	)
	may := map[string]string{"none": "any", "a": "any a", "b": "any b", "mail": "any a", "uri": "any b", "empty": "any"}
	for client, certificates := range clients {
		for _, export := range []string{"any", "a", "b"} {
			ok := slices.Contains(strings.Fields(may[client]), export)
			want := repErrPolicy
			if ok {
				want = repAck
			}
			r := rig.dial()
			r.startTLS(p.clientConfig(certificates...))
			r.mustOption(optStructuredReply, nil)
			if kind := r.optionResult(optSetMetaContext, rawContexts(export)); (kind == repErrPolicy) == ok {
				t.Errorf("client %s, export %s: SET_META_CONTEXT: reply %#x", client, export, uint32(kind))
			}
			if kind := r.optionResult(optInfo, rawInfo(export)); kind != want {
				t.Errorf("client %s, export %s: INFO: reply %#x, want %#x", client, export, uint32(kind), uint32(want))
			}
			if kind := r.optionResult(optGo, rawInfo(export)); kind != want {
				t.Errorf("client %s, export %s: GO: reply %#x, want %#x", client, export, uint32(kind), uint32(want))
			}
			if !ok {
				r.sendOption(optExportName, []byte(export))
				r.expectClosed()
			}
		}
	}
	// Without TLS there is no certificate to show.
	if kind := rig.dial().optionResult(optGo, rawInfo("a")); kind != repErrPolicy {
		t.Errorf("without TLS: reply %#x", uint32(kind))
	}
}

func TestServerRefusesCertificatesOfOthers(t *testing.T) {
	p, stranger := newServerPKI(t), newServerPKI(t)
	p.serverConfig(false)
	config, err := LoadTLS(p.path("server.pem"), p.path("server.key"), p.path("ca.pem"), true)
	if err != nil {
		t.Fatal(err)
	}
	rig := startServer(t, serverSetup{config: ServerConfig{TLS: TLSForced, TLSConfig: config}}, &Export{Device: memory(t, 1<<20)})
	for name, certificates := range map[string][]tls.Certificate{
		"none":     nil,
		"stranger": {stranger.issue("a", &x509.Certificate{Subject: pkix.Name{CommonName: "host-a"}})},
	} {
		r := rig.dial()
		r.mustOption(optStartTLS, nil)
		conn := tls.Client(r.conn, p.clientConfig(certificates...))
		err := conn.Handshake()
		if err == nil { // in TLS 1.3 the client learns of it at its first read
			_, err = conn.Read(make([]byte, 1))
		}
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r := rig.dial()
	r.startTLS(p.clientConfig(p.issue("a", &x509.Certificate{Subject: pkix.Name{CommonName: "host-a"}})))
	newSession(r, HeadersStructured, "").readAt(0, 512)
}

func TestLoadTLSNamesWhatIsWrong(t *testing.T) {
	p := newServerPKI(t)
	p.issue("server", &x509.Certificate{})
	p.save("none.pem", "NOTHING", nil)
	for _, c := range []struct {
		certificate, key, ca string
		require              bool
		want                 string
	}{
		{"missing.pem", "server.key", "", false, "missing.pem"},
		{"server.pem", "ca.pem", "", false, "server.pem"},
		{"server.pem", "server.key", "missing.pem", false, "missing.pem"},
		{"server.pem", "server.key", "none.pem", false, "no PEM certificate"},
		{"server.pem", "server.key", "", true, "authority"},
	} {
		ca := c.ca
		if ca != "" {
			ca = p.path(ca)
		}
		if _, err := LoadTLS(p.path(c.certificate), p.path(c.key), ca, c.require); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	c, err := LoadTLS(p.path("server.pem"), p.path("server.key"), p.path("ca.pem"), true)
	if err != nil || c.MinVersion < tls.VersionTLS12 || c.ClientAuth != tls.RequireAndVerifyClientCert {
		t.Errorf("%+v, %v", c, err)
	}
}
