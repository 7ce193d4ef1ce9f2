package crc32c

import (
	"fmt"
	"hash/crc32"
	"math/bits"
	"math/rand/v2"
	"testing"
)

// random are n bytes, at an address that is no multiple of anything.
func random(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n+3)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b[3:]
}

func TestChecksum(t *testing.T) {
	// RFC 3720, appendix B.4.
	if got := Checksum(make([]byte, 32)); got != 0x8a9136aa {
		t.Errorf("32 zeros: %08x", got)
	}
	b := random(70000, 1)
	for n := range 5000 {
		if got, want := Checksum(b[:n]), crc32.Checksum(b[:n], table); got != want {
			t.Fatalf("%d bytes: %08x, want %08x", n, got, want)
		}
	}
	for _, n := range []int{4096, 8192, 65536, 69999} {
		for offset := range 70 {
			if offset+n > len(b) {
				break
			}
			for _, state := range []uint32{0, 1, 0xffffffff, 0x12345678} {
				if got, want := Update(state, b[offset:offset+n]), crc32.Update(state, table, b[offset:offset+n]); got != want {
					t.Fatalf("%d bytes at %d after %08x: %08x, want %08x", n, offset, state, got, want)
				}
			}
		}
	}
}

// TestEveryBitCounts: each bit of a block changes the checksum as it should.
func TestEveryBitCounts(t *testing.T) {
	b := random(4096, 2)
	for i := range len(b) * 8 {
		b[i/8] ^= 1 << (i % 8)
		if got, want := Checksum(b), crc32.Checksum(b, table); got != want {
			t.Fatalf("bit %d: %08x, want %08x", i, got, want)
		}
		b[i/8] ^= 1 << (i % 8)
	}
}

// TestConstants computes the powers that the assembly has.
func TestConstants(t *testing.T) {
	if !Accelerated() {
		t.Log("this CPU does not use them")
	}
	const polynomial = 0x11edc6f41
	power := func(n int) uint64 { // x^n mod P, reflected, shifted
		r := uint64(1)
		for range n {
			if r <<= 1; r>>32 != 0 {
				r ^= polynomial
			}
		}
		return uint64(bits.Reverse32(uint32(r))) << 1
	}
	for distance, want := range map[int][2]uint64{2048: {0xdcb17aa4, 0xb9e02b86}, 512: {0x740eef02, 0x9e4addf8}, 128: {0xf20c0dfe, 0x14cd00bd6}} {
		if got := [2]uint64{power(distance + 32), power(distance - 32)}; got != want {
			t.Errorf("%d bits: %#x, want %#x", distance, got, want)
		}
	}
}

func TestAllocatesNothing(t *testing.T) {
	b := random(4096, 3)
	if n := testing.AllocsPerRun(100, func() { Checksum(b) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzUpdate(f *testing.F) {
	f.Add(uint32(0), random(600, 4), uint8(0))
	f.Add(uint32(0xffffffff), random(4096, 5), uint8(9))
	f.Fuzz(func(t *testing.T, crc uint32, b []byte, cut uint8) {
		b = b[min(int(cut), len(b)):]
		if got, want := Update(crc, b), crc32.Update(crc, table, b); got != want {
			t.Errorf("%d bytes after %08x: %08x, want %08x", len(b), crc, got, want)
		}
	})
}

func BenchmarkChecksum(b *testing.B) {
	const much = 64 << 20 // more than caches hold
	memory := random(much, 6)
	for _, n := range []int{512, 4096, 128 << 10} {
		for _, cold := range []bool{false, true} {
			for name, f := range map[string]func([]byte) uint32{"crc32c": Checksum, "hash": func(b []byte) uint32 { return crc32.Checksum(b, table) }} {
				b.Run(fmt.Sprintf("%d/cold=%v/%s", n, cold, name), func(b *testing.B) {
					b.SetBytes(int64(n))
					at := 0
					for range b.N {
						f(memory[at : at+n])
						if cold {
							if at += n; at+n > much {
								at = 0
							}
						}
					}
				})
			}
		}
	}
}
