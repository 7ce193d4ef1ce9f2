package crc32c

import (
	"hash/crc32"

	"golang.org/x/sys/cpu"
)

// accelerated: the CPU, and the system that saves its registers, have what fold uses.
var accelerated = cpu.X86.HasAVX512F && cpu.X86.HasAVX512VL && cpu.X86.HasAVX512VPCLMULQDQ && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE42

// foldMin is the shortest input that fold takes, in bytes; below some 600 hash/crc32
// is as fast.
const foldMin = 512

func update(crc uint32, b []byte) uint32 {
	if !accelerated || len(b) < foldMin {
		return crc32.Update(crc, table, b)
	}
	n := len(b) &^ (foldStride - 1)
	crc = ^fold(^crc, b[:n])
	if n == len(b) {
		return crc
	}
	return crc32.Update(crc, table, b[n:])
}

// foldStride is what fold takes in one step, in bytes.
const foldStride = 256

// fold goes on from the state crc, which is not inverted, over b, whose length is a
// multiple of foldStride and not 0.
//
//go:noescape
func fold(crc uint32, b []byte) uint32
