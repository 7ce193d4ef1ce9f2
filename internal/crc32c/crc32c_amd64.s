#include "textflag.h"

// A polynomial of 128 bits that stands D bits before another is congruent to a sum of
// two products in the place of that other: its first 64 bits by x^(D+32) mod P, its
// last 64 by x^(D-32) mod P. The constants are these powers, bits reflected and
// shifted left by one, as the reflected product is short of one bit. (Intel, "Fast CRC
// Computation for Generic Polynomials Using PCLMULQDQ", 2009.) The test computes them.

DATA ·folding2048+0(SB)/8, $0x00000000dcb17aa4
DATA ·folding2048+8(SB)/8, $0x00000000b9e02b86
GLOBL ·folding2048(SB), RODATA|NOPTR, $16

DATA ·folding512+0(SB)/8, $0x00000000740eef02
DATA ·folding512+8(SB)/8, $0x000000009e4addf8
GLOBL ·folding512(SB), RODATA|NOPTR, $16

DATA ·folding128+0(SB)/8, $0x00000000f20c0dfe
DATA ·folding128+8(SB)/8, $0x000000014cd00bd6
GLOBL ·folding128(SB), RODATA|NOPTR, $16

// func fold(crc uint32, b []byte) uint32
TEXT ·fold(SB), NOSPLIT, $0-36
	MOVL crc+0(FP), AX
	MOVQ b_base+8(FP), SI
	MOVQ b_len+16(FP), CX

	// The state goes into the first 32 bits.
	VMOVDQU64 (SI), Z0
	VMOVDQU64 64(SI), Z1
	VMOVDQU64 128(SI), Z2
	VMOVDQU64 192(SI), Z3
	VMOVD     AX, X4
	VPXORQ    Z4, Z0, Z0
	ADDQ      $256, SI
	SUBQ      $256, CX
	JZ        reduce

	VBROADCASTI32X4 ·folding2048(SB), Z10

stride:
	VPCLMULQDQ $0x00, Z10, Z0, Z4
	VPCLMULQDQ $0x00, Z10, Z1, Z5
	VPCLMULQDQ $0x00, Z10, Z2, Z6
	VPCLMULQDQ $0x00, Z10, Z3, Z7
	VPCLMULQDQ $0x11, Z10, Z0, Z0
	VPCLMULQDQ $0x11, Z10, Z1, Z1
	VPCLMULQDQ $0x11, Z10, Z2, Z2
	VPCLMULQDQ $0x11, Z10, Z3, Z3
	VPTERNLOGQ $0x96, (SI), Z4, Z0
	VPTERNLOGQ $0x96, 64(SI), Z5, Z1
	VPTERNLOGQ $0x96, 128(SI), Z6, Z2
	VPTERNLOGQ $0x96, 192(SI), Z7, Z3
	ADDQ       $256, SI
	SUBQ       $256, CX
	JNZ        stride

reduce:
	// Four registers into the last, four lanes of that into its last.
	VBROADCASTI32X4 ·folding512(SB), Z10
	VPCLMULQDQ      $0x00, Z10, Z0, Z4
	VPCLMULQDQ      $0x11, Z10, Z0, Z0
	VPTERNLOGQ      $0x96, Z4, Z0, Z1
	VPCLMULQDQ      $0x00, Z10, Z1, Z4
	VPCLMULQDQ      $0x11, Z10, Z1, Z1
	VPTERNLOGQ      $0x96, Z4, Z1, Z2
	VPCLMULQDQ      $0x00, Z10, Z2, Z4
	VPCLMULQDQ      $0x11, Z10, Z2, Z2
	VPTERNLOGQ      $0x96, Z4, Z2, Z3

	VMOVDQU       ·folding128(SB), X10
	VEXTRACTI32X4 $1, Z3, X0
	VEXTRACTI32X4 $2, Z3, X1
	VEXTRACTI32X4 $3, Z3, X2
	VPCLMULQDQ    $0x00, X10, X3, X4
	VPCLMULQDQ    $0x11, X10, X3, X3
	VPXOR         X4, X0, X0
	VPXOR         X3, X0, X0
	VPCLMULQDQ    $0x00, X10, X0, X4
	VPCLMULQDQ    $0x11, X10, X0, X0
	VPXOR         X4, X1, X1
	VPXOR         X0, X1, X1
	VPCLMULQDQ    $0x00, X10, X1, X4
	VPCLMULQDQ    $0x11, X10, X1, X1
	VPXOR         X4, X2, X2
	VPXOR         X1, X2, X2

	// The CRC of 16 bytes that are congruent to all of b.
	VMOVQ   X2, BX
	VPEXTRQ $1, X2, CX
	XORL    AX, AX
	CRC32Q  BX, AX
	CRC32Q  CX, AX
	VZEROUPPER
	MOVL    AX, ret+32(FP)
	RET
