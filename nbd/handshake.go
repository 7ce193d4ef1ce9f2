package nbd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ashlar-storage/ashlar/datapath"
)

// TLSMode is how a server treats TLS, by the names of proto.md, "TLS support".
type TLSMode string

// The modes.
const (
	TLSOff       TLSMode = "off"     // NOTLS
	TLSSelective TLSMode = "on"      // SELECTIVETLS: offered; exports marked TLSOnly need it
	TLSForced    TLSMode = "require" // FORCEDTLS
)

// Bounds of the handshake. Each option is bounded before memory is given to it;
// what is longer is read away and refused.
const (
	optionsMax     = 256 // options a client may send
	infoDataMax    = 4 + stringMax + 2 + 2*512
	contextDataMax = 64 << 10 // LIST_META_CONTEXT, SET_META_CONTEXT
	queriesMax     = 1024     // queries in one of these
	contextsMax    = 64       // contexts one connection may select
	discardMax     = 32 << 20 // a longer option ends the connection
	listBytesMax   = 8 << 20  // what LIST may send in one connection
)

// errDisconnect ends a handshake in which nothing went wrong: the client left, or
// asked to.
var errDisconnect = errors.New("nbd: client disconnected")

// handshakeConfig is what a handshake needs to know of its server.
type handshakeConfig struct {
	exports   *ExportSet
	tlsMode   TLSMode
	tlsConfig *tls.Config
	listing   bool // LIST is allowed
	closing   func() bool
	log       *slog.Logger
}

// negotiated is the result of a handshake.
type negotiated struct {
	conn       net.Conn // the TLS stream when there is one
	export     *Export
	release    func() error // of the export's device; the caller's
	info       datapath.Info
	structured bool
	extended   bool
	contexts   []string // selected metadata contexts; the id of one is 1 + its index
	tls        *tls.Conn
}

// handshake is the server's side of one negotiation. It reads exactly what
// belongs to the present message and never ahead, so that nothing sent in
// plaintext can be taken for what follows STARTTLS.
type handshake struct {
	config handshakeConfig
	conn   net.Conn
	out    bytes.Buffer
	data   []byte // of the present option; grown up to its bound and reused

	// fixed: the client said that it speaks fixed newstyle. Where it did not, its
	// options are honoured all the same, as proto.md allows (go-nbd relies on it),
	// but TLS does not exist for it.
	fixed      bool
	noZeroes   bool
	tls        *tls.Conn
	structured bool
	extended   bool
	contexts   []string
	contextsOf string // the export name the contexts were selected for
	haveSet    bool
	held       *Export      // the export asked for last, its device open
	release    func() error // of that device
	listed     int
	scratch    [sizeOptionReplyHeader + 128]byte
}

// negotiate runs the handshake on conn, whose deadline the caller has set.
//
// Errors: errDisconnect when the client ended it properly; anything else is a
// violation, a timeout or a broken connection, and the caller closes. With an
// error the result holds nothing but the TLS stream, if there is one; without, the
// caller calls its release.
func negotiate(conn net.Conn, c handshakeConfig) (*negotiated, error) {
	h := &handshake{config: c, conn: conn}
	if c.tlsMode == "" {
		h.config.tlsMode = TLSOff
	}
	if c.log == nil {
		h.config.log = slog.Default()
	}
	n, err := h.run()
	if err != nil && h.tls != nil {
		_ = h.tls.Close() // close_notify, where it still gets through
	}
	if err == nil {
		n.release = h.release
	} else {
		h.letGo()
	}
	return n, err
}

func (h *handshake) run() (*negotiated, error) {
	h.put64(magicInit)
	h.put64(magicOption)
	h.put16(handshakeFixedNewstyle | handshakeNoZeroes)
	if err := h.flush(); err != nil {
		return nil, err
	}
	b := h.scratch[:4]
	if _, err := io.ReadFull(h.conn, b); err != nil {
		return nil, disconnected(err)
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(clientFixedNewstyle|clientNoZeroes) != 0 {
		return nil, fmt.Errorf("nbd: handshake: client flags %#x: unknown bits", flags)
	}
	h.fixed = flags&clientFixedNewstyle != 0
	if !h.fixed && h.config.tlsMode == TLSForced {
		return nil, errors.New("nbd: handshake: a client without fixed newstyle, where TLS is required")
	}
	h.noZeroes = flags&clientNoZeroes != 0
	for range optionsMax {
		n, err := h.option()
		if err != nil {
			_ = h.flush() // an answer that is due goes out; the connection ends either way
			return nil, err
		}
		if err := h.flush(); err != nil {
			return nil, err
		}
		if n != nil {
			return n, nil
		}
	}
	return nil, fmt.Errorf("nbd: handshake: more than %d options", optionsMax)
}

// disconnected tells a client that left between messages from a broken one.
func disconnected(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return errDisconnect
	}
	return fmt.Errorf("nbd: handshake: %w", err)
}

// option handles one option. A non-nil result enters transmission.
func (h *handshake) option() (*negotiated, error) {
	b := h.scratch[:sizeOptionHeader]
	if _, err := io.ReadFull(h.conn, b); err != nil {
		return nil, disconnected(err)
	}
	if m := binary.BigEndian.Uint64(b); m != magicOption {
		return nil, fmt.Errorf("nbd: handshake: option magic %#x", m)
	}
	opt, length := option(binary.BigEndian.Uint32(b[8:])), binary.BigEndian.Uint32(b[12:])
	if length > discardMax {
		return nil, fmt.Errorf("nbd: handshake: option %d of %d bytes: at most %d", opt, length, discardMax)
	}
	if h.config.tlsMode == TLSForced && h.tls == nil && opt != optStartTLS && opt != optAbort {
		if opt == optExportName {
			return nil, errors.New("nbd: handshake: EXPORT_NAME without TLS, which is required")
		}
		return nil, h.refuse(opt, length, repErrTLSRequired, "TLS is required: send STARTTLS first")
	}
	if h.config.closing != nil && h.config.closing() && opt != optAbort {
		if opt == optExportName {
			return nil, errDisconnect
		}
		return nil, h.refuse(opt, length, repErrShutdown, "the server is shutting down")
	}
	switch opt {
	case optExportName:
		return h.exportName(length)
	case optAbort:
		_ = h.discard(length) // the client may be gone already
		h.reply(opt, repAck, nil)
		return nil, errDisconnect
	case optList:
		return nil, h.list(length)
	case optStartTLS:
		return nil, h.startTLS(length)
	case optInfo, optGo:
		return h.info(opt, length)
	case optStructuredReply:
		return nil, h.structuredReply(length)
	case optListMetaContext, optSetMetaContext:
		return nil, h.metaContext(opt, length)
	case optExtendedHeaders:
		return nil, h.extendedHeaders(length)
	}
	return nil, h.refuse(opt, length, repErrUnsupported, "")
}

// read takes the data of an option, up to limit bytes.
func (h *handshake) read(length uint32) ([]byte, error) {
	if int(length) > cap(h.data) {
		h.data = make([]byte, length)
	}
	b := h.data[:length]
	if _, err := io.ReadFull(h.conn, b); err != nil {
		return nil, fmt.Errorf("nbd: handshake: option data: %w", err)
	}
	return b, nil
}

// discard reads length bytes away.
func (h *handshake) discard(length uint32) error {
	if _, err := io.CopyN(io.Discard, h.conn, int64(length)); err != nil {
		return fmt.Errorf("nbd: handshake: option data: %w", err)
	}
	return nil
}

// refuse reads the option's data away and answers with an error.
func (h *handshake) refuse(opt option, length uint32, code optionReply, message string) error {
	if err := h.discard(length); err != nil {
		return err
	}
	h.reply(opt, code, []byte(message))
	return nil
}

func (h *handshake) reply(opt option, code optionReply, data []byte) {
	h.put64(magicOptionReply)
	h.put32(uint32(opt))
	h.put32(uint32(code))
	h.put32(uint32(len(data)))
	h.out.Write(data)
}

func (h *handshake) put64(v uint64) { h.out.Write(binary.BigEndian.AppendUint64(h.scratch[:0], v)) }
func (h *handshake) put32(v uint32) { h.out.Write(binary.BigEndian.AppendUint32(h.scratch[:0], v)) }
func (h *handshake) put16(v uint16) { h.out.Write(binary.BigEndian.AppendUint16(h.scratch[:0], v)) }

func (h *handshake) flush() error {
	if h.out.Len() == 0 {
		return nil
	}
	_, err := h.conn.Write(h.out.Bytes())
	h.out.Reset()
	if err != nil {
		return fmt.Errorf("nbd: handshake: %w", err)
	}
	return nil
}

func (h *handshake) list(length uint32) error {
	switch {
	case length != 0:
		return h.refuse(optList, length, repErrInvalid, "LIST takes no data")
	case !h.config.listing:
		h.reply(optList, repErrPolicy, []byte("listing is switched off"))
		return nil
	}
	for _, e := range h.config.exports.List() {
		if e.TLSOnly && h.tls == nil && h.config.tlsMode != TLSOff {
			continue
		}
		description := truncate(e.Description)
		data := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		data = append(append(data, e.Name...), description...)
		if h.listed += len(data); h.listed > listBytesMax {
			return fmt.Errorf("nbd: handshake: LIST repeated beyond %d bytes", listBytesMax)
		}
		h.reply(optList, repServer, data)
	}
	h.reply(optList, repAck, nil)
	return nil
}

// truncate cuts s to what a string on the wire may hold, at a character.
func truncate(s string) string {
	if len(s) <= stringMax {
		return s
	}
	n := stringMax
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

func (h *handshake) startTLS(length uint32) error {
	switch {
	case length != 0:
		return h.refuse(optStartTLS, length, repErrInvalid, "STARTTLS takes no data")
	case h.tls != nil:
		h.reply(optStartTLS, repErrInvalid, []byte("TLS is already in use"))
		return nil
	case h.config.tlsMode == TLSOff || h.config.tlsConfig == nil || !h.fixed:
		h.reply(optStartTLS, repErrPolicy, []byte("this server does not offer TLS"))
		return nil
	}
	h.reply(optStartTLS, repAck, nil)
	if err := h.flush(); err != nil {
		return err
	}
	t := tls.Server(h.conn, h.config.tlsConfig)
	if err := t.Handshake(); err != nil {
		return fmt.Errorf("nbd: TLS handshake: %w", err)
	}
	// Whatever was said in plaintext could have been said by someone else.
	h.conn, h.tls = t, t
	h.structured, h.extended = false, false
	h.contexts, h.contextsOf, h.haveSet = nil, "", false
	return nil
}

func (h *handshake) structuredReply(length uint32) error {
	switch {
	case length != 0:
		return h.refuse(optStructuredReply, length, repErrInvalid, "STRUCTURED_REPLY takes no data")
	case h.extended:
		h.reply(optStructuredReply, repErrExtendedNeeded, []byte("extended headers are already in use"))
	case h.structured:
		h.reply(optStructuredReply, repErrInvalid, []byte("structured replies are already in use"))
	default:
		h.structured = true
		h.reply(optStructuredReply, repAck, nil)
	}
	return nil
}

func (h *handshake) extendedHeaders(length uint32) error {
	switch {
	case length != 0:
		return h.refuse(optExtendedHeaders, length, repErrInvalid, "EXTENDED_HEADERS takes no data")
	case h.extended:
		h.reply(optExtendedHeaders, repErrInvalid, []byte("extended headers are already in use"))
	default:
		h.extended, h.structured = true, true
		h.reply(optExtendedHeaders, repAck, nil)
	}
	return nil
}

// find looks an export up for an option that may be answered with an error.
func (h *handshake) find(name string) (*Export, optionReply, string) {
	e, err := h.config.exports.Find(name)
	secret := h.tls == nil && h.config.tlsMode == TLSSelective
	switch {
	case !h.fixed && secret && err == nil && e.TLSOnly:
		return nil, repErrUnknown, "no such export"
	case err != nil && secret && h.fixed && h.anyTLSOnly():
		// Not to tell an export that needs TLS from one that does not exist.
		return nil, repErrTLSRequired, "this export needs TLS: send STARTTLS first"
	case err != nil && !errors.Is(err, ErrUnknownExport):
		h.config.log.Warn("nbd: an export cannot be found", "export", name, "error", err)
		return nil, repErrUnknown, "this export cannot be opened now"
	case err != nil:
		return nil, repErrUnknown, "no such export"
	case e.TLSOnly && secret:
		return nil, repErrTLSRequired, "this export needs TLS: send STARTTLS first"
	case !e.admits(h.peer()):
		return nil, repErrPolicy, "this export is not for this client certificate"
	}
	return h.hold(e)
}

// hold opens the device of an export, if it is not the one held already. One
// handshake holds one device: a client that asks about many has them opened and
// closed in turn.
func (h *handshake) hold(e *Export) (*Export, optionReply, string) {
	if h.held != nil && h.held.Name == e.Name && h.held.Open != nil && e.Open != nil {
		return h.held, 0, ""
	}
	h.letGo()
	held, release, err := h.config.exports.acquire(e)
	if err != nil {
		h.config.log.Warn("nbd: an export cannot be opened", "export", e.Name, "error", err)
		return nil, repErrUnknown, "this export cannot be opened now"
	}
	h.held, h.release = held, release
	return held, 0, ""
}

// letGo ends the hold on the export asked for last.
func (h *handshake) letGo() {
	if h.release == nil {
		return
	}
	if err := h.release(); err != nil {
		h.config.log.Error("nbd: closing a device", "export", h.held.Name, "error", err)
	}
	h.held, h.release = nil, nil
}

func (h *handshake) anyTLSOnly() bool {
	return slices.ContainsFunc(h.config.exports.List(), func(e *Export) bool { return e.TLSOnly })
}

// peer is the client's verified certificate, or nil.
func (h *handshake) peer() *x509.Certificate {
	if h.tls == nil {
		return nil
	}
	chains := h.tls.ConnectionState().VerifiedChains
	if len(chains) == 0 {
		return nil
	}
	return chains[0][0]
}

func (h *handshake) exportName(length uint32) (*negotiated, error) {
	if length > stringMax {
		return nil, fmt.Errorf("nbd: handshake: export name of %d bytes", length)
	}
	if h.extended {
		return nil, errors.New("nbd: handshake: EXPORT_NAME after EXTENDED_HEADERS")
	}
	b, err := h.read(length)
	if err != nil {
		return nil, err
	}
	name := string(b)
	e, code, message := h.find(name)
	if code != 0 {
		return nil, fmt.Errorf("nbd: handshake: EXPORT_NAME %q: %s", name, message)
	}
	n := h.enter(e, name)
	h.put64(n.info.Size)
	h.put16(uint16(h.flags(n)))
	if !h.noZeroes {
		h.out.Write(make([]byte, 124))
	}
	return n, nil
}

func (h *handshake) enter(e *Export, name string) *negotiated {
	n := &negotiated{conn: h.conn, tls: h.tls, export: e, info: e.info(), structured: h.structured, extended: h.extended}
	if h.haveSet && h.contextsOf == name {
		n.contexts = h.contexts
	}
	return n
}

func (h *handshake) flags(n *negotiated) TransmissionFlags {
	return transmissionFlags(&n.info, n.structured, n.extended, len(n.contexts) > 0)
}

func (h *handshake) info(opt option, length uint32) (*negotiated, error) {
	if length > infoDataMax {
		return nil, h.refuse(opt, length, repErrTooBig, fmt.Sprintf("at most %d bytes", infoDataMax))
	}
	unmeasured, read := opt == optGo && length == 0 && !h.fixed, h.read
	if unmeasured {
		read = h.readUnmeasured
	}
	b, err := read(length)
	if err != nil {
		return nil, err
	}
	name, wanted, ok := parseInfo(b)
	if unmeasured { // it goes by the block size, and does not ask for it
		wanted = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	}
	if !ok {
		h.reply(opt, repErrInvalid, []byte("malformed request"))
		return nil, nil
	}
	e, code, message := h.find(name)
	if code != 0 {
		h.reply(opt, code, []byte(message))
		return nil, nil
	}
	n := h.enter(e, name)
	var data [14]byte
	export := binary.BigEndian.AppendUint16(data[:0], infoExport)
	export = binary.BigEndian.AppendUint64(export, n.info.Size)
	h.reply(opt, repInfo, binary.BigEndian.AppendUint16(export, uint16(h.flags(n))))
	for len(wanted) >= 2 {
		switch kind := binary.BigEndian.Uint16(wanted); kind {
		case infoName:
			h.reply(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, kind), e.Name...))
		case infoDescription:
			if e.Description != "" {
				h.reply(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, kind), truncate(e.Description)...))
			}
		case infoBlockSize:
			s := binary.BigEndian.AppendUint16(data[:0], kind)
			s = binary.BigEndian.AppendUint32(s, max(n.info.MinIO, 1))
			preferred := max(n.info.PreferredIO, n.info.MinIO, 512)
			if unmeasured {
				preferred = max(min(preferred, unmeasuredBlockMax), n.info.MinIO)
			}
			s = binary.BigEndian.AppendUint32(s, preferred)
			h.reply(opt, repInfo, binary.BigEndian.AppendUint32(s, payloadMax))
		}
		wanted = wanted[2:]
	}
	h.reply(opt, repAck, nil)
	if opt == optInfo {
		return nil, nil
	}
	return n, nil
}

// parseInfo takes the data of INFO and GO apart: u32 name length, name, u16
// count, count times u16. The lengths have to agree exactly.
func parseInfo(b []byte) (name string, wanted []byte, ok bool) {
	name, b, ok = parseString(b)
	if !ok || len(b) < 2 {
		return "", nil, false
	}
	count := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; len(b) != 2*count {
		return "", nil, false
	}
	// An information type asked for twice is answered once.
	seen := make(map[uint16]bool, min(count, 8))
	wanted = make([]byte, 0, min(len(b), 16))
	for ; len(b) >= 2; b = b[2:] {
		if kind := binary.BigEndian.Uint16(b); !seen[kind] {
			seen[kind] = true
			wanted = append(wanted, b[:2]...)
		}
	}
	return name, wanted, true
}

func parseString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	b = b[4:]
	if uint64(n) > uint64(len(b)) || n > stringMax || !utf8.Valid(b[:n]) || bytes.IndexByte(b[:n], 0) >= 0 {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}

// parseContexts takes the data of the metadata context options apart: u32 name
// length, name, u32 count, count times (u32 length, query).
func parseContexts(b []byte) (name string, queries []string, ok bool) {
	name, b, ok = parseString(b)
	if !ok || len(b) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(b)
	b = b[4:]
	if uint64(count)*4 > uint64(len(b)) {
		return "", nil, false
	}
	queries = make([]string, 0, min(count, queriesMax+1))
	for range count {
		var q string
		if q, b, ok = parseString(b); !ok {
			return "", nil, false
		}
		if len(queries) <= queriesMax { // one more shows that there are too many
			queries = append(queries, q)
		}
	}
	return name, queries, len(b) == 0
}

func (h *handshake) metaContext(opt option, length uint32) error {
	if opt == optSetMetaContext {
		h.contexts, h.contextsOf, h.haveSet = nil, "", false // a failed attempt clears too
	}
	if length > contextDataMax {
		return h.refuse(opt, length, repErrTooBig, fmt.Sprintf("at most %d bytes", contextDataMax))
	}
	b, err := h.read(length)
	if err != nil {
		return err
	}
	name, queries, ok := parseContexts(b)
	switch {
	case !ok:
		h.reply(opt, repErrInvalid, []byte("malformed request"))
		return nil
	case len(queries) > queriesMax:
		h.reply(opt, repErrTooBig, []byte(fmt.Sprintf("at most %d queries", queriesMax)))
		return nil
	case opt == optSetMetaContext && !h.structured:
		h.reply(opt, repErrInvalid, []byte("structured replies have to be negotiated first"))
		return nil
	}
	e, code, message := h.find(name)
	if code != 0 {
		h.reply(opt, code, []byte(message))
		return nil
	}
	i := e.info()
	var chosen []string
	for _, c := range contexts(&i) {
		if matchContext(opt, queries, c) {
			chosen = append(chosen, c)
		}
	}
	if opt == optSetMetaContext && len(chosen) > contextsMax {
		h.reply(opt, repErrTooBig, []byte(fmt.Sprintf("at most %d contexts", contextsMax)))
		return nil
	}
	for index, c := range chosen {
		id := uint32(0)
		if opt == optSetMetaContext {
			id = uint32(index) + 1
		}
		h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), c...))
	}
	h.reply(opt, repAck, nil)
	if opt == optSetMetaContext {
		h.contexts, h.contextsOf, h.haveSet = chosen, name, true
	}
	return nil
}

// matchContext reports whether a context answers the queries. To LIST, no query
// means everything, and "base:", "qemu:" and "qemu:dirty-bitmap:" mean all that
// begin so; to SET, only exact names select.
func matchContext(opt option, queries []string, context string) bool {
	if opt == optListMetaContext {
		if len(queries) == 0 {
			return true
		}
		for _, q := range queries {
			if (q == "base:" || q == "qemu:" || q == datapath.ContextDirtyPrefix) && strings.HasPrefix(context, q) {
				return true
			}
		}
	}
	return slices.Contains(queries, context)
}

// handshakeDeadline bounds the whole negotiation, TLS included.
func handshakeDeadline(conn net.Conn, limit time.Duration) error {
	return conn.SetDeadline(time.Now().Add(limit))
}
