package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// version is the first byte of every message. 1: the first.
const version = 1

// Bounds of what an entry may hold, in bytes, and of how many a keeper has.
const (
	NameMax    = 1 << 10
	StateMax   = 4 << 10
	EntriesMax = 1 << 14

	headerSize = 12
	messageMax = headerSize + NameMax + StateMax
)

// kind says what a message asks.
type kind uint8

const (
	kindPut     kind = iota + 1 // hold the descriptor that comes with it; the sender owns it
	kindTake                    // own an entry, and have its state and descriptor
	kindRelease                 // own an entry no more
	kindRemove                  // forget an entry and close its descriptor
	kindNext                    // the entry whose name follows the given one
	kindAnswer
)

// code is the result in an answer.
type code uint8

const (
	codeOK code = iota
	codeNotFound
	codeOwned // by another connection
	codeExists
	codeInvalid
	codeFull
	codeEnd // there is no next entry
	codeCount
)

// The errors of a keeper.
var (
	// ErrNotFound says that the keeper has no entry of that name.
	ErrNotFound = errors.New("keeper: no such entry")
	// ErrOwned says that a process that lives owns the entry.
	ErrOwned = errors.New("keeper: the entry is another process's")
	// ErrExists says that an entry of that name waits for somebody to take it.
	ErrExists = errors.New("keeper: the entry exists")
	// ErrFull says that the keeper has as many entries as it can hold.
	ErrFull = fmt.Errorf("keeper: it holds %d entries and takes no more", EntriesMax)
	// ErrProtocol says that the other side does not speak this protocol.
	ErrProtocol = errors.New("keeper: the other side does not speak version 1 of the protocol (is it of another version of ashlar?)")
	// ErrAway says that no keeper listens at the socket.
	ErrAway = errors.New("keeper: nobody listens")
)

var codeErrors = [codeCount]error{nil, ErrNotFound, ErrOwned, ErrExists, ErrProtocol, ErrFull, nil}

// message is a request or an answer.
//
//	offset size meaning
//	     0    1 version
//	     1    1 kind
//	     2    1 answers: code
//	     3    1 answers: 1 when the entry has an owner
//	     4    2 length of the name, little-endian
//	     6    2 length of the state
//	     8    4 answers: process of the owner
//	    12      name, state
//
// With put, and with the answer to take, comes one descriptor.
type message struct {
	kind  kind
	code  code
	owned bool
	pid   int32
	name  string
	state []byte
}

func (m *message) encode() []byte {
	b := make([]byte, headerSize, headerSize+len(m.name)+len(m.state))
	b[0], b[1], b[2] = version, byte(m.kind), byte(m.code)
	if m.owned {
		b[3] = 1
	}
	binary.LittleEndian.PutUint16(b[4:], uint16(len(m.name)))
	binary.LittleEndian.PutUint16(b[6:], uint16(len(m.state)))
	binary.LittleEndian.PutUint32(b[8:], uint32(m.pid))
	b = append(b, m.name...)
	return append(b, m.state...)
}

// decode takes a message apart; it keeps nothing of b.
func (m *message) decode(b []byte) error {
	if len(b) < headerSize || b[0] != version {
		return ErrProtocol
	}
	name, state := int(binary.LittleEndian.Uint16(b[4:])), int(binary.LittleEndian.Uint16(b[6:]))
	*m = message{kind: kind(b[1]), code: code(b[2]), owned: b[3] == 1, pid: int32(binary.LittleEndian.Uint32(b[8:]))}
	if m.kind < kindPut || m.kind > kindAnswer || m.code >= codeCount || b[3] > 1 ||
		name > NameMax || state > StateMax || len(b) != headerSize+name+state {
		return ErrProtocol
	}
	m.name = string(b[headerSize : headerSize+name])
	m.state = append([]byte(nil), b[headerSize+name:]...)
	return nil
}

// named tells whether a message that is about one entry names one.
func (m *message) named() bool { return m.name != "" }
