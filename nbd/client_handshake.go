package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"slices"
	"strings"
	"time"
)

// Bounds on what a server can make a client read and keep in a handshake.
const (
	clientExportsMax = 1 << 16         // exports in a list; with the longest names that is 512 MiB, hence:
	clientListMax    = 16 << 20        // bytes of names and descriptions in a list
	clientInfosMax   = 64              // replies to one INFO or GO; the protocol has 4 kinds
	serverReplyMax   = 4 + 2*stringMax // length, name, description
	infoReplyMax     = 2 + stringMax   // type, name or description
	contextReplyMax  = 4 + stringMax   // id, name
	clientBlockMin   = 64 << 10        // the largest minimum block size (proto.md, "Size constraints")
	clientSizeMax    = 1<<63 - 1       // bytes of an export, so that an offset fits into an int64
)

// Sizes of messages, in bytes.
const (
	sizeGreeting     = 8 + 8 + 2     // two magics, flags
	sizeExportReply  = 8 + 2         // size, flags: the reply to EXPORT_NAME
	exportNameZeroes = 124           // behind it
	sizeInfoExport   = 2 + 8 + 2     // type, size, flags
	sizeInfoBlocks   = 2 + 4 + 4 + 4 // type, minimum, preferred, most payload
)

const clientReadBuffer = 128 << 10 // takes many small replies, or a 64 KiB read with its header, per system call

// clientHandshake is a connection on its way to transmission.
type clientHandshake struct {
	conn    net.Conn
	in      *bufio.Reader
	options *Options

	fixed    bool // the server speaks fixed newstyle, which has options with replies
	noZeroes bool
	tls      bool
	headers  Headers
	contexts []Context
	info     ExportInfo
}

// negotiateClient runs the part of a handshake that all uses share, and then rest. On
// an error it closes conn. It returns without a deadline on the connection.
func negotiateClient(ctx context.Context, conn net.Conn, options *Options, rest func(*clientHandshake) error) (*clientHandshake, error) {
	ctx, cancel := context.WithTimeout(ctx, options.HandshakeTimeout)
	defer cancel()
	// A deadline in the past makes every read and write on conn return.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	h := &clientHandshake{conn: conn, in: bufio.NewReaderSize(conn, clientReadBuffer), options: options, headers: HeadersSimple}
	err := h.begin(ctx)
	if err == nil {
		err = rest(h)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil {
		return h, nil
	}
	_ = clientCloseConn(conn) // err says more
	if cause := ctx.Err(); cause != nil && !errors.As(err, new(*ViolationError)) {
		return nil, fmt.Errorf("nbd: handshake: %w", cause)
	}
	if errors.As(err, new(*ViolationError)) || errors.As(err, new(*OptionError)) {
		return nil, err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("nbd: handshake: %w", err)
}

// begin greets, and starts TLS before anything that has a meaning is said.
func (h *clientHandshake) begin(ctx context.Context) error {
	var greeting [sizeGreeting]byte
	if _, err := io.ReadFull(h.in, greeting[:]); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint64(greeting[:]); magic != magicInit {
		return violationf("greeting begins with %#x: not an NBD server", magic)
	}
	switch magic := binary.BigEndian.Uint64(greeting[8:]); magic {
	case magicOption:
	case magicOldstyle:
		return violationf("oldstyle handshake, which is not supported")
	default:
		return violationf("greeting goes on with %#x", magic)
	}
	flags := binary.BigEndian.Uint16(greeting[16:])
	h.fixed = flags&handshakeFixedNewstyle != 0
	h.noZeroes = flags&handshakeNoZeroes != 0
	var answer uint32
	if h.fixed {
		answer |= clientFixedNewstyle
	}
	if h.noZeroes {
		answer |= clientNoZeroes
	}
	if _, err := h.conn.Write(binary.BigEndian.AppendUint32(nil, answer)); err != nil {
		return err
	}
	return h.startTLS(ctx)
}

// startTLS never lets a connection that must be encrypted go on in plaintext
// (CVE-2019-14842 was a client that did after an error reply).
func (h *clientHandshake) startTLS(ctx context.Context) error {
	config, required := h.options.TLSConfig, h.options.TLSRequired
	if config == nil && !required {
		return nil
	}
	if !h.fixed {
		if required {
			return fmt.Errorf("%w: its handshake has no options", ErrDowngrade)
		}
		return nil
	}
	if err := h.simpleOption(optStartTLS); err != nil {
		if refusal := new(OptionError); errors.As(err, &refusal) {
			if required {
				return fmt.Errorf("%w: %w", ErrDowngrade, err)
			}
			return nil
		}
		return err
	}
	// Whatever came behind the reply was not protected by TLS, and a server has
	// no reason to speak before the client's first TLS message.
	if n := h.in.Buffered(); n != 0 {
		return violationf("%d bytes of plaintext behind the reply to STARTTLS", n)
	}
	t := tls.Client(h.conn, clientTLSConfig(config, h.conn))
	if err := t.HandshakeContext(ctx); err != nil {
		return err
	}
	h.conn, h.tls = t, true
	h.in = bufio.NewReaderSize(t, clientReadBuffer)
	return nil
}

// clientTLSConfig raises the version to what NBD wants, and lets a certificate
// be verified without a name where the peer has none: on a unix socket. A name
// that is missing elsewhere is an error, by crypto/tls.
func clientTLSConfig(config *tls.Config, conn net.Conn) *tls.Config {
	config = config.Clone()
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	if peer := conn.RemoteAddr(); config.ServerName != "" || config.InsecureSkipVerify || peer == nil || peer.Network() != "unix" {
		return config
	}
	config.InsecureSkipVerify = true // replaced by the same verification, name aside
	next := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		intermediates := x509.NewCertPool()
		for _, c := range state.PeerCertificates[1:] {
			intermediates.AddCert(c)
		}
		now := time.Time{} // the present
		if config.Time != nil {
			now = config.Time()
		}
		if _, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: config.RootCAs, Intermediates: intermediates, CurrentTime: now}); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
		}
		if next != nil {
			return next(state)
		}
		return nil
	}
	return config
}

// open negotiates headers and contexts and enters transmission.
func (h *clientHandshake) open() error {
	if !h.fixed || h.options.ExportNameOnly {
		return h.exportName()
	}
	if err := h.negotiateHeaders(); err != nil {
		return err
	}
	if len(h.options.MetaContexts) > 0 && h.headers != HeadersSimple {
		err := h.metaContexts(optSetMetaContext, h.options.MetaContexts)
		if refusal := new(OptionError); errors.As(err, &refusal) {
			h.contexts, err = nil, nil // GO says what is wrong with the export, if anything
		}
		if err != nil {
			return err
		}
	}
	err := h.exportInfo(optGo, infoBlockSize)
	if refusal := new(OptionError); errors.As(err, &refusal) && optionReply(refusal.Reply) == repErrUnsupported {
		if h.headers == HeadersExtended {
			return violationf("extended headers without GO")
		}
		return h.exportName()
	}
	return err
}

// negotiateHeaders asks for the best form and takes less when refused.
func (h *clientHandshake) negotiateHeaders() error {
	for _, try := range []struct {
		headers Headers
		opt     option
	}{{HeadersExtended, optExtendedHeaders}, {HeadersStructured, optStructuredReply}} {
		if try.headers < h.options.Headers {
			continue
		}
		err := h.simpleOption(try.opt)
		if err == nil {
			h.headers = try.headers
			return nil
		}
		refusal := new(OptionError)
		if !errors.As(err, &refusal) {
			return err
		}
		switch optionReply(refusal.Reply) {
		case repErrTLSRequired, repErrShutdown:
			return err // every further option would get the same
		}
	}
	return nil
}

// exportName enters transmission as old servers know it. They have no way to
// refuse but to hang up.
func (h *clientHandshake) exportName() error {
	if err := h.sendOption(optExportName, []byte(h.options.Export)); err != nil {
		return err
	}
	reply := make([]byte, sizeExportReply+exportNameZeroes)
	if h.noZeroes {
		reply = reply[:sizeExportReply]
	}
	if n, err := io.ReadFull(h.in, reply); err != nil {
		if n == 0 && errors.Is(err, io.EOF) {
			return fmt.Errorf("the server hung up on export %q", h.options.Export)
		}
		return err
	}
	h.info.Name = h.options.Export
	h.contexts = nil // contexts are bound to GO
	return h.setExport(binary.BigEndian.Uint64(reply), binary.BigEndian.Uint16(reply[8:]))
}

func (h *clientHandshake) setExport(size uint64, flags uint16) error {
	if size > clientSizeMax {
		return violationf("export of %d bytes (at most 2^63-1)", size)
	}
	h.info.Size = size
	h.info.Flags = TransmissionFlags(flags)
	if h.info.Flags&FlagHasFlags == 0 {
		h.info.Flags = 0
	}
	return nil
}

// exportInfo sends INFO or GO and reads the answers into h.info.
func (h *clientHandshake) exportInfo(opt option, requests ...uint16) error {
	h.info = ExportInfo{Name: h.options.Export}
	data := appendOptionString(nil, h.options.Export)
	data = binary.BigEndian.AppendUint16(data, uint16(len(requests)))
	for _, request := range requests {
		data = binary.BigEndian.AppendUint16(data, request)
	}
	if err := h.sendOption(opt, data); err != nil {
		return err
	}
	seen := false
	for count := 0; ; count++ {
		reply, data, err := h.readReply(opt, repInfo, infoReplyMax)
		if err != nil {
			return err
		}
		if reply == repAck {
			break
		}
		if count == clientInfosMax {
			return violationf("more than %d replies to %s", clientInfosMax, clientOptionNames[opt])
		}
		export, err := h.readInfo(data)
		if err != nil {
			return err
		}
		seen = seen || export
	}
	if !seen {
		return violationf("%s without INFO_EXPORT", clientOptionNames[opt])
	}
	return nil
}

// readInfo decodes one answer to INFO or GO and reports whether it was
// INFO_EXPORT.
func (h *clientHandshake) readInfo(data []byte) (export bool, err error) {
	if len(data) < 2 {
		return false, violationf("information of %d bytes", len(data))
	}
	switch kind, rest := binary.BigEndian.Uint16(data), data[2:]; kind {
	case infoExport:
		if len(data) != sizeInfoExport {
			return false, violationf("INFO_EXPORT of %d bytes (want %d)", len(data), sizeInfoExport)
		}
		return true, h.setExport(binary.BigEndian.Uint64(rest), binary.BigEndian.Uint16(rest[8:]))
	case infoName:
		h.info.Name = string(rest)
	case infoDescription:
		h.info.Description = string(rest)
	case infoBlockSize:
		if len(data) != sizeInfoBlocks {
			return false, violationf("INFO_BLOCK_SIZE of %d bytes (want %d)", len(data), sizeInfoBlocks)
		}
		least, preferred, most := binary.BigEndian.Uint32(rest), binary.BigEndian.Uint32(rest[4:]), binary.BigEndian.Uint32(rest[8:])
		if bits.OnesCount32(least) != 1 || least > clientBlockMin || bits.OnesCount32(preferred) != 1 || preferred < least || most < preferred {
			return false, violationf("block sizes %d, %d, %d", least, preferred, most)
		}
		h.info.BlockMin, h.info.BlockPreferred, h.info.PayloadMax = least, preferred, most
	}
	return false, nil // a kind we do not know may be ignored
}

// metaContexts sends LIST or SET_META_CONTEXT and reads the contexts.
func (h *clientHandshake) metaContexts(opt option, queries []string) error {
	h.contexts = nil
	data := appendOptionString(nil, h.options.Export)
	data = binary.BigEndian.AppendUint32(data, uint32(len(queries)))
	for _, query := range queries {
		data = appendOptionString(data, query)
	}
	if err := h.sendOption(opt, data); err != nil {
		return err
	}
	for {
		reply, data, err := h.readReply(opt, repMetaContext, contextReplyMax)
		if err != nil {
			return err
		}
		if reply == repAck {
			return nil
		}
		if len(data) < 5 {
			return violationf("metadata context of %d bytes", len(data))
		}
		if len(h.contexts) == clientContextsMax {
			return violationf("more than %d metadata contexts", clientContextsMax)
		}
		found := Context{ID: binary.BigEndian.Uint32(data), Name: string(data[4:])}
		if opt == optSetMetaContext {
			if !slices.ContainsFunc(queries, func(query string) bool { return selects(query, found.Name) }) {
				return violationf("metadata context %q, which was not asked for", found.Name)
			}
			if slices.ContainsFunc(h.contexts, func(c Context) bool { return c.ID == found.ID || c.Name == found.Name }) {
				return violationf("metadata context %q (id %d) appears twice", found.Name, found.ID)
			}
		}
		h.contexts = append(h.contexts, found)
	}
}

// selects reports whether a server may answer query with the context name: it is
// the same, or the query is a wildcard of its namespace.
func selects(query, name string) bool {
	if query == name {
		return true
	}
	return len(query) > 0 && query[len(query)-1] == ':' && strings.HasPrefix(name, query)
}

// ListedExport is an export in a server's list.
type ListedExport struct{ Name, Description string }

// List returns the exports a server is willing to name. Options.Export is not
// used.
func List(ctx context.Context, network, address string, options Options) ([]ListedExport, error) {
	conn, err := dialConn(ctx, network, address, &options)
	if err != nil {
		return nil, err
	}
	var exports []ListedExport
	_, err = negotiateClient(ctx, conn, &options, func(h *clientHandshake) (err error) {
		if exports, err = h.list(); err != nil {
			return err
		}
		return h.abort()
	})
	if err != nil {
		return nil, err
	}
	return exports, nil
}

// Info asks a server about Options.Export, without opening it.
func Info(ctx context.Context, network, address string, options Options) (ExportInfo, error) {
	conn, err := dialConn(ctx, network, address, &options)
	if err != nil {
		return ExportInfo{}, err
	}
	h, err := negotiateClient(ctx, conn, &options, (*clientHandshake).inquire)
	if err != nil {
		return ExportInfo{}, err
	}
	return h.info, nil
}

// Negotiate runs the handshake on conn for somebody else who carries the
// transmission: the kernel's nbd driver, which is given a socket that has opened its
// export. Messages are in the simple form, whatever options say of it, since that is
// all the driver knows. TLS and metadata contexts cannot be handed over and are
// refused here. ctx bounds the handshake.
//
// Ownership: conn stays the caller's; nothing that arrived on it is kept here. On an
// error it is closed.
func Negotiate(ctx context.Context, conn net.Conn, options Options) (ExportInfo, error) {
	err := options.setDefaults()
	if err == nil && (options.TLSConfig != nil || len(options.MetaContexts) > 0) {
		err = errors.New("nbd: a connection to hand over has neither TLS nor metadata contexts")
	}
	if err != nil {
		_ = conn.Close() // nothing was said on it
		return ExportInfo{}, err
	}
	options.Headers = HeadersSimple
	h, err := negotiateClient(ctx, conn, &options, (*clientHandshake).open)
	if err != nil {
		return ExportInfo{}, err
	}
	if n := h.in.Buffered(); n != 0 { // they would be lost with h
		_ = conn.Close() // the server's mistake says more
		return ExportInfo{}, violationf("%d bytes behind the handshake, before any request", n)
	}
	return h.info, nil
}

func (h *clientHandshake) inquire() error {
	if !h.fixed {
		return errors.New("the server's handshake has no options")
	}
	if err := h.negotiateHeaders(); err != nil {
		return err
	}
	if err := h.exportInfo(optInfo, infoName, infoDescription, infoBlockSize); err != nil {
		return err
	}
	if h.headers != HeadersSimple {
		err := h.metaContexts(optListMetaContext, nil)
		if err != nil && !errors.As(err, new(*OptionError)) {
			return err
		}
		for _, offered := range h.contexts {
			h.info.Contexts = append(h.info.Contexts, offered.Name)
		}
	}
	return h.abort()
}

func (h *clientHandshake) list() ([]ListedExport, error) {
	if !h.fixed {
		return nil, errors.New("the server's handshake has no options")
	}
	if err := h.sendOption(optList, nil); err != nil {
		return nil, err
	}
	var exports []ListedExport
	for total := 0; ; {
		reply, data, err := h.readReply(optList, repServer, serverReplyMax)
		if err != nil {
			return nil, err
		}
		if reply == repAck {
			return exports, nil
		}
		export, err := readListed(data)
		if err != nil {
			return nil, err
		}
		total += len(data)
		if len(exports) == clientExportsMax || total > clientListMax {
			return nil, violationf("list of more than %d exports or %d bytes", clientExportsMax, clientListMax)
		}
		exports = append(exports, export)
	}
}

func readListed(data []byte) (ListedExport, error) {
	if len(data) < 4 {
		return ListedExport{}, violationf("listed export of %d bytes", len(data))
	}
	length, rest := binary.BigEndian.Uint32(data), data[4:]
	if uint64(length) > uint64(len(rest)) || length > stringMax {
		return ListedExport{}, violationf("listed export's name of %d bytes in a reply of %d", length, len(data))
	}
	return ListedExport{Name: string(rest[:length]), Description: string(rest[length:])}, nil
}

// abort takes leave of the server and closes the connection.
func (h *clientHandshake) abort() error {
	if err := h.sendOption(optAbort, nil); err == nil {
		_, _, _ = h.readReply(optAbort, repAck, 0) // a server may hang up instead of its reply
	}
	_ = h.conn.Close() // nothing is in flight
	return nil
}

// simpleOption sends an option without data whose success is a bare ACK.
func (h *clientHandshake) simpleOption(opt option) error {
	if err := h.sendOption(opt, nil); err != nil {
		return err
	}
	_, _, err := h.readReply(opt, repAck, 0)
	return err
}

func (h *clientHandshake) sendOption(opt option, data []byte) error {
	_, err := h.conn.Write(appendOption(nil, opt, data))
	return err
}

// appendOption appends the message of an option: magic u64, option u32, length
// u32, data.
func appendOption(b []byte, opt option, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// appendString appends a string behind its u32 length.
func appendOptionString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// readReply reads one reply to opt: an ACK, or one of type want with at most
// lengthMax bytes of data. A reply of an error type is returned as *OptionError.
//
// The header is magic u64, option u32, type u32, length u32.
func (h *clientHandshake) readReply(opt option, want optionReply, lengthMax uint32) (optionReply, []byte, error) {
	var header [sizeOptionReplyHeader]byte
	if _, err := io.ReadFull(h.in, header[:]); err != nil {
		return 0, nil, err
	}
	if magic := binary.BigEndian.Uint64(header[:]); magic != magicOptionReply {
		return 0, nil, violationf("option reply begins with %#x", magic)
	}
	if got := option(binary.BigEndian.Uint32(header[8:])); got != opt {
		return 0, nil, violationf("reply to option %d while %d was sent", got, opt)
	}
	reply := optionReply(binary.BigEndian.Uint32(header[12:]))
	length := binary.BigEndian.Uint32(header[16:])
	limit := uint32(0)
	switch {
	case reply&repError != 0:
		limit = stringMax
	case reply == repAck:
	case reply == want:
		limit = lengthMax
	default:
		return 0, nil, violationf("reply of type %d to %s", reply, clientOptionNames[opt])
	}
	if length > limit {
		return 0, nil, violationf("reply of type %#x to %s has %d bytes (at most %d)", uint32(reply), clientOptionNames[opt], length, limit)
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(h.in, data); err != nil {
		return 0, nil, err
	}
	if reply&repError != 0 {
		return 0, nil, &OptionError{Option: uint32(opt), Reply: uint32(reply), Message: string(data)}
	}
	return reply, data, nil
}
