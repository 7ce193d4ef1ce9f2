// Package crc32c computes CRC32C (Castagnoli; RFC 3720, appendix B.4), as hash/crc32
// does, and faster where the CPU multiplies polynomials in vectors (VPCLMULQDQ with
// AVX-512): 4 KiB that are in the cache take a fifth of the time. Elsewhere it is
// hash/crc32.
package crc32c

import "hash/crc32"

var table = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC32C of b. Any goroutine; it allocates nothing.
func Checksum(b []byte) uint32 { return update(0, b) }

// Update is the CRC32C of what crc is that of, followed by b.
func Update(crc uint32, b []byte) uint32 { return update(crc, b) }

// Accelerated reports whether the CPU does more than hash/crc32 uses.
func Accelerated() bool { return accelerated }
