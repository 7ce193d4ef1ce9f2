package nbd

import (
	"encoding/binary"
	"fmt"
)

// unmeasuredBlockMax is the largest block that the client of readUnmeasured takes.
const unmeasuredBlockMax = 4096

// readUnmeasured reads the data of a GO that says it has none, by the lengths in it: so
// the client of github.com/pojntfx/go-nbd sends it, up to v0.3.2 (pkg/client, Connect).
// No other client is taken for it: this one does not say that it speaks fixed newstyle,
// and to such clients proto.md grants no GO at all.
func (h *handshake) readUnmeasured(uint32) ([]byte, error) {
	b, err := h.read(4)
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(b)
	if n > stringMax {
		return nil, fmt.Errorf("nbd: handshake: GO without a length: export name of %d bytes", n)
	}
	data := append(make([]byte, 0, 4+n+2), b...)
	if b, err = h.read(n + 2); err != nil {
		return nil, err
	}
	data = append(data, b...)
	rest := 2 * uint32(binary.BigEndian.Uint16(b[n:]))
	if len(data)+int(rest) > infoDataMax {
		return nil, fmt.Errorf("nbd: handshake: GO without a length: %d information requests", rest/2)
	}
	if b, err = h.read(rest); err != nil {
		return nil, err
	}
	return append(data, b...), nil
}
