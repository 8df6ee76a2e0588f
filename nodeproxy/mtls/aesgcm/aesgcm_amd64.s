// AES-GCM on 512-bit registers, four blocks in each.
//
// The method is that of NIST SP 800-38D with what Intel's "Carry-Less Multiplication Instruction and its Usage for
// Computing the GCM Mode" says about GHASH:
//
// Counters. CTR holds four counter blocks with their bytes reversed, so that the counter of 32 bits is the lowest
// dword of each and VPADDD is inc32; SWAP turns them, and blocks for GHASH, round. The nonce has 12 bytes: its first
// counter, 1, is the tag's, and a message of at most 2^36-32 bytes does not reach it again.
//
// GHASH. A block with its bytes reversed is a polynomial whose highest bit has the lowest exponent. The product of two
// such is one bit too far right in its 256, which is put right once, in the powers of H: they are kept times x. From
// the low end two steps of 64 bits take the product modulo x^128 + x^7 + x^2 + x + 1: a multiple of the reversed
// polynomial, 1 + x^121 + x^126 + x^127 + x^128, clears the lowest 64 bits L, which adds L times POLY (bits 57, 62 and
// 63) to what follows and L itself to what is 128 bits up. LO, MID and HI are the three parts of a sum of products, 64
// bits apart, and are reduced once for each sum.
//
// Batches. Of sixteen blocks B0 … B15 the four registers hold four each. In the loop each lane sums on its own: (ACC +
// B0…3) H^16 + B4…7 H^12 + B8…11 H^8 + B12…15 H^4, the same power in all lanes, and nothing crosses lanes. The last
// batch takes the powers H^16 … H^1 in place of these and adds the lanes up, which makes up for their positions.
// GHASH is one batch behind and fills the time that the rounds of AES wait. What is left, less than a batch, goes four
// blocks at a time with the powers that end in H^2, and the block of the lengths with H.
//
// Registers: Z0-Z3 AES; Z4-Z7 the batch before, for GHASH; Z8 its sum so far; Z9-Z13 products; Z14-Z16 constants and
// counters; Z17-Z31 the keys, the last always in Z31.

#include "textflag.h"

#define ACC Z8
#define LO Z9
#define MID Z10
#define HI Z11
#define POW Z12
#define T Z13
#define POLY Z14
#define SWAP Z15
#define CTR Z16

DATA swap<>+0(SB)/8, $0x08090a0b0c0d0e0f
DATA swap<>+8(SB)/8, $0x0001020304050607
GLOBL swap<>(SB), RODATA|NOPTR, $16

DATA poly<>+0(SB)/8, $0xc200000000000000
DATA poly<>+8(SB)/8, $0xc200000000000000
GLOBL poly<>(SB), RODATA|NOPTR, $16

// The reversed polynomial without x^128, and what a first counter of 1 lacks in each lane, and in the next four.
DATA modulus<>+0(SB)/8, $0x0000000000000001
DATA modulus<>+8(SB)/8, $0xc200000000000000
GLOBL modulus<>(SB), RODATA|NOPTR, $16

DATA first<>+0(SB)/8, $1
DATA first<>+8(SB)/8, $0
DATA first<>+16(SB)/8, $2
DATA first<>+24(SB)/8, $0
DATA first<>+32(SB)/8, $3
DATA first<>+40(SB)/8, $0
DATA first<>+48(SB)/8, $4
DATA first<>+56(SB)/8, $0
GLOBL first<>(SB), RODATA|NOPTR, $64

DATA four<>+0(SB)/8, $4
DATA four<>+8(SB)/8, $0
DATA four<>+16(SB)/8, $4
DATA four<>+24(SB)/8, $0
DATA four<>+32(SB)/8, $4
DATA four<>+40(SB)/8, $0
DATA four<>+48(SB)/8, $4
DATA four<>+56(SB)/8, $0
GLOBL four<>(SB), RODATA|NOPTR, $64

// Offsets in vector.
#define KEYS 256
#define ROUNDS 496

// COUNTERS is the next sixteen counters with the first key added.
#define COUNTERS \
	VPSHUFB SWAP, CTR, Z0        \
	VPADDD  four<>(SB), CTR, CTR \
	VPSHUFB SWAP, CTR, Z1        \
	VPADDD  four<>(SB), CTR, CTR \
	VPSHUFB SWAP, CTR, Z2        \
	VPADDD  four<>(SB), CTR, CTR \
	VPSHUFB SWAP, CTR, Z3        \
	VPADDD  four<>(SB), CTR, CTR \
	VPXORQ  Z17, Z0, Z0          \
	VPXORQ  Z17, Z1, Z1          \
	VPXORQ  Z17, Z2, Z2          \
	VPXORQ  Z17, Z3, Z3

#define ROUND(key) \
	VAESENC key, Z0, Z0 \
	VAESENC key, Z1, Z1 \
	VAESENC key, Z2, Z2 \
	VAESENC key, Z3, Z3

#define LAST \
	VAESENCLAST Z31, Z0, Z0 \
	VAESENCLAST Z31, Z1, Z1 \
	VAESENCLAST Z31, Z2, Z2 \
	VAESENCLAST Z31, Z3, Z3

// ADD3 adds two more to a sum.
#define ADD3(a, b, sum) VPTERNLOGQ $0x96, a, b, sum

// GHASH0 … GHASH3 add the products of Z4 … Z7 with POW; what is not added yet is in Z4, Z5, Z8 and T between them.
#define GHASH0 \
	VPXORQ     ACC, Z4, Z4        \
	VPCLMULQDQ $0x01, POW, Z4, MID \
	VPCLMULQDQ $0x10, POW, Z4, T   \
	VPCLMULQDQ $0x00, POW, Z4, LO  \
	VPCLMULQDQ $0x11, POW, Z4, HI

#define GHASH1 \
	VPCLMULQDQ $0x01, POW, Z5, Z8 \
	ADD3(T, Z8, MID)              \
	VPCLMULQDQ $0x10, POW, Z5, T  \
	VPCLMULQDQ $0x00, POW, Z5, Z4 \
	VPCLMULQDQ $0x11, POW, Z5, Z5

#define GHASH2 \
	VPCLMULQDQ $0x01, POW, Z6, Z8 \
	ADD3(T, Z8, MID)              \
	VPCLMULQDQ $0x10, POW, Z6, T  \
	VPCLMULQDQ $0x00, POW, Z6, Z8 \
	ADD3(Z4, Z8, LO)              \
	VPCLMULQDQ $0x11, POW, Z6, Z6 \
	ADD3(Z5, Z6, HI)

#define GHASH3 \
	VPCLMULQDQ $0x01, POW, Z7, Z8 \
	ADD3(T, Z8, MID)              \
	VPCLMULQDQ $0x10, POW, Z7, T  \
	VPXORQ     T, MID, MID        \
	VPCLMULQDQ $0x00, POW, Z7, Z8 \
	VPXORQ     Z8, LO, LO         \
	VPCLMULQDQ $0x11, POW, Z7, Z7 \
	VPXORQ     Z7, HI, HI

// REDUCE1 and REDUCE2 take the sums modulo the polynomial, each lane for itself.
#define REDUCE1 \
	VPCLMULQDQ $0x00, POLY, LO, T \
	VPSHUFD    $0x4e, LO, LO      \
	ADD3(T, LO, MID)

#define REDUCE2 \
	VPCLMULQDQ $0x00, POLY, MID, T \
	VPSHUFD    $0x4e, MID, ACC     \
	ADD3(T, HI, ACC)

// FOLD adds the lanes of ACC up, into its lowest; the others are zero.
#define FOLD \
	VEXTRACTI64X4 $1, ACC, Y9   \
	VPXOR         Y9, Y8, Y8    \
	VEXTRACTI128  $1, Y8, X9    \
	VPXOR         X9, X8, X8

// TIMES is product = a × b, reduced, in the lowest lanes.
#define TIMES(a, b, product) \
	VPCLMULQDQ $0x00, a, b, X9      \
	VPCLMULQDQ $0x01, a, b, X10     \
	VPCLMULQDQ $0x10, a, b, X13     \
	VPCLMULQDQ $0x11, a, b, X11     \
	VPXOR      X13, X10, X10        \
	VPCLMULQDQ $0x00, X14, X9, X13  \
	VPSHUFD    $0x4e, X9, X9        \
	ADD3(X13, X9, X10)              \
	VPCLMULQDQ $0x00, X14, X10, X13 \
	VPSHUFD    $0x4e, X10, X10      \
	VPXOR      X13, X11, X11        \
	VPXOR      X10, X11, product

// LENGTHS is the block of the lengths in bits, its bytes reversed.
#define LENGTHS(x) \
	LEAQ    (R14*8), R13     \
	VMOVQ   R13, x           \
	LEAQ    (R10*8), R13     \
	VPINSRQ $1, R13, x, x

// func crypt(v *vector, open bool, dst, src *byte, n uint64, nonce, data *byte, dataLen uint64, tag *[16]byte)
TEXT ·crypt(SB), NOSPLIT, $0-72
	MOVQ    v+0(FP), AX
	MOVBLZX open+8(FP), BX
	MOVQ    dst+16(FP), DI
	MOVQ    src+24(FP), SI
	MOVQ    n+32(FP), CX
	MOVQ    nonce+40(FP), R8
	MOVQ    data+48(FP), R9
	MOVQ    dataLen+56(FP), R10
	MOVQ    tag+64(FP), R11
	MOVQ    CX, R15

	VBROADCASTI32X4 swap<>(SB), SWAP
	VBROADCASTI32X4 poly<>(SB), POLY
	MOVQ            ROUNDS(AX), DX
	SHLQ            $4, DX
	VBROADCASTI32X4 KEYS+0(AX), Z17
	VBROADCASTI32X4 KEYS+16(AX), Z18
	VBROADCASTI32X4 KEYS+32(AX), Z19
	VBROADCASTI32X4 KEYS+48(AX), Z20
	VBROADCASTI32X4 KEYS+64(AX), Z21
	VBROADCASTI32X4 KEYS+80(AX), Z22
	VBROADCASTI32X4 KEYS+96(AX), Z23
	VBROADCASTI32X4 KEYS+112(AX), Z24
	VBROADCASTI32X4 KEYS+128(AX), Z25
	VBROADCASTI32X4 KEYS+144(AX), Z26
	VBROADCASTI32X4 KEYS+160(AX), Z27
	VBROADCASTI32X4 KEYS+176(AX), Z28
	VBROADCASTI32X4 KEYS+192(AX), Z29
	VBROADCASTI32X4 KEYS+208(AX), Z30
	VBROADCASTI32X4 KEYS(AX)(DX*1), Z31

	// The first counter, encrypted, waits in the tag.
	MOVL        $0x01000000, R12
	VMOVQ       (R8), X0
	VPINSRD     $2, 8(R8), X0, X0
	VPINSRD     $3, R12, X0, X0
	VPSHUFB     X15, X0, X1
	VSHUFI64X2  $0, Z1, Z1, Z1
	VPADDD      first<>(SB), Z1, CTR
	VPXORQ      X17, X0, X0
	VAESENC     X18, X0, X0
	VAESENC     X19, X0, X0
	VAESENC     X20, X0, X0
	VAESENC     X21, X0, X0
	VAESENC     X22, X0, X0
	VAESENC     X23, X0, X0
	VAESENC     X24, X0, X0
	VAESENC     X25, X0, X0
	VAESENC     X26, X0, X0
	CMPQ        DX, $160
	JEQ         tagLast
	VAESENC     X27, X0, X0
	VAESENC     X28, X0, X0
	VAESENC     X29, X0, X0
	VAESENC     X30, X0, X0

tagLast:
	VAESENCLAST X31, X0, X0
	VMOVDQU     X0, (R11)

	// The additional data, a block at a time.
	VPXOR   X8, X8, X8
	VMOVDQU 240(AX), X12
	MOVQ    R10, R12
	MOVQ    $-1, R14
	TESTQ   R12, R12
	JEQ     dataDone

dataBlock:
	BZHIQ      R12, R14, R13
	CMPQ       R12, $16
	CMOVQCC    R14, R13
	KMOVW      R13, K1
	VMOVDQU8.Z (R9), K1, X4
	VPSHUFB    X15, X4, X4
	VPXOR      X8, X4, X4
	TIMES(X4, X12, X8)
	ADDQ       $16, R9
	SUBQ       $16, R12
	JHI        dataBlock

dataDone:
	MOVQ R15, R14
	SUBQ $256, CX
	JCS  tail

	// The first batch: nothing to hash yet.
	COUNTERS
	ROUND(Z18)
	ROUND(Z19)
	ROUND(Z20)
	ROUND(Z21)
	ROUND(Z22)
	ROUND(Z23)
	ROUND(Z24)
	ROUND(Z25)
	ROUND(Z26)
	CMPQ DX, $160
	JEQ  batchLast
	ROUND(Z27)
	ROUND(Z28)
	ROUND(Z29)
	ROUND(Z30)
	JMP  batchLast

batch:
	COUNTERS
	VBROADCASTI32X4 (AX), POW
	ROUND(Z18)
	GHASH0
	ROUND(Z19)
	VBROADCASTI32X4 64(AX), POW
	ROUND(Z20)
	GHASH1
	ROUND(Z21)
	VBROADCASTI32X4 128(AX), POW
	ROUND(Z22)
	GHASH2
	VBROADCASTI32X4 192(AX), POW
	ROUND(Z23)
	GHASH3
	ROUND(Z24)
	REDUCE1
	ROUND(Z25)
	REDUCE2
	ROUND(Z26)
	CMPQ DX, $160
	JEQ  batchLast
	ROUND(Z27)
	ROUND(Z28)
	ROUND(Z29)
	ROUND(Z30)

batchLast:
	LAST
	VMOVDQU64 (SI), Z4
	VMOVDQU64 64(SI), Z5
	VMOVDQU64 128(SI), Z6
	VMOVDQU64 192(SI), Z7
	VPXORQ    Z4, Z0, Z0
	VPXORQ    Z5, Z1, Z1
	VPXORQ    Z6, Z2, Z2
	VPXORQ    Z7, Z3, Z3
	VMOVDQU64 Z0, (DI)
	VMOVDQU64 Z1, 64(DI)
	VMOVDQU64 Z2, 128(DI)
	VMOVDQU64 Z3, 192(DI)
	TESTL     BX, BX
	JNE       batchHash
	VMOVDQA64 Z0, Z4
	VMOVDQA64 Z1, Z5
	VMOVDQA64 Z2, Z6
	VMOVDQA64 Z3, Z7

batchHash:
	VPSHUFB SWAP, Z4, Z4
	VPSHUFB SWAP, Z5, Z5
	VPSHUFB SWAP, Z6, Z6
	VPSHUFB SWAP, Z7, Z7
	ADDQ    $256, SI
	ADDQ    $256, DI
	SUBQ    $256, CX
	JCC     batch

	// The last batch, with the powers of each position.
	VMOVDQU64 (AX), POW
	GHASH0
	VMOVDQU64 64(AX), POW
	GHASH1
	VMOVDQU64 128(AX), POW
	GHASH2
	VMOVDQU64 192(AX), POW
	GHASH3
	REDUCE1
	REDUCE2
	FOLD

tail:
	// CX is 0 … 255 less 256; R8 the blocks of it.
	ADDQ $256, CX
	LEAQ 15(CX), R8
	SHRQ $4, R8
	JEQ  lengths

	VPXORQ LO, LO, LO
	VPXORQ MID, MID, MID
	VPXORQ HI, HI, HI
	MOVQ   AX, R12
	CMPQ   R8, $16
	JEQ    tailBlocks

	// Powers that end in H^2, for there is one for the lengths, too.
	MOVQ $15, R12
	SUBQ R8, R12
	SHLQ $4, R12
	ADDQ AX, R12
	VMOVDQU    240(AX), X12
	LENGTHS(X4)
	VPCLMULQDQ $0x00, X12, X4, X9
	VPCLMULQDQ $0x01, X12, X4, X10
	VPCLMULQDQ $0x10, X12, X4, X13
	VPCLMULQDQ $0x11, X12, X4, X11
	VPXOR      X13, X10, X10

tailBlocks:
	MOVQ        $-1, R13
	BZHIQ       CX, R13, R13
	KMOVQ       R13, K1
	VMOVDQU8.Z  (SI), K1, Z4
	VMOVDQU64   (R12), POW
	VPSHUFB     SWAP, CTR, Z0
	VPADDD      four<>(SB), CTR, CTR
	VPXORQ      Z17, Z0, Z0
	VAESENC     Z18, Z0, Z0
	VAESENC     Z19, Z0, Z0
	VAESENC     Z20, Z0, Z0
	VAESENC     Z21, Z0, Z0
	VAESENC     Z22, Z0, Z0
	VAESENC     Z23, Z0, Z0
	VAESENC     Z24, Z0, Z0
	VAESENC     Z25, Z0, Z0
	VAESENC     Z26, Z0, Z0
	CMPQ        DX, $160
	JEQ         tailLast
	VAESENC     Z27, Z0, Z0
	VAESENC     Z28, Z0, Z0
	VAESENC     Z29, Z0, Z0
	VAESENC     Z30, Z0, Z0

tailLast:
	VAESENCLAST Z31, Z0, Z0
	VPXORQ      Z4, Z0, Z0
	VMOVDQU8    Z0, K1, (DI)
	TESTL       BX, BX
	JNE         tailHash
	VMOVDQU8.Z  Z0, K1, Z4

tailHash:
	VPSHUFB    SWAP, Z4, Z4
	VPXORQ     ACC, Z4, Z4
	VPXORQ     ACC, ACC, ACC
	VPCLMULQDQ $0x00, POW, Z4, T
	VPXORQ     T, LO, LO
	VPCLMULQDQ $0x11, POW, Z4, T
	VPXORQ     T, HI, HI
	VPCLMULQDQ $0x01, POW, Z4, T
	VPCLMULQDQ $0x10, POW, Z4, Z5
	ADD3(T, Z5, MID)
	ADDQ       $64, SI
	ADDQ       $64, DI
	ADDQ       $64, R12
	SUBQ       $64, CX
	JHI        tailBlocks
	REDUCE1
	REDUCE2
	FOLD
	CMPQ       R8, $16
	JNE        done

lengths:
	VMOVDQU 240(AX), X12
	LENGTHS(X4)
	VPXOR   X8, X4, X4
	TIMES(X4, X12, X8)

done:
	VPSHUFB X15, X8, X8
	VPXOR   (R11), X8, X8
	VMOVDQU X8, (R11)
	VZEROUPPER
	RET

// WORDS adds to each word of a round's key those before it, and X1, made of the word before the key; see FIPS 197.
#define WORDS(key, offset) \
	VPSLLDQ $4, key, X2 \
	VPXOR   X2, key, key \
	VPSLLDQ $4, X2, X2  \
	VPXOR   X2, key, key \
	VPSLLDQ $4, X2, X2  \
	VPXOR   X2, key, key \
	VPXOR   X1, key, key \
	VMOVDQU key, KEYS+offset(AX)

#define KEY128(rcon, offset) \
	VAESKEYGENASSIST rcon, X0, X1 \
	VPSHUFD          $0xff, X1, X1 \
	WORDS(X0, offset)

#define KEY256A(rcon, offset) \
	VAESKEYGENASSIST rcon, X3, X1 \
	VPSHUFD          $0xff, X1, X1 \
	WORDS(X0, offset)

#define KEY256B(offset) \
	VAESKEYGENASSIST $0, X0, X1 \
	VPSHUFD          $0xaa, X1, X1 \
	WORDS(X3, offset)

// func expand(v *vector, key *byte)
TEXT ·expand(SB), NOSPLIT, $0-16
	MOVQ    v+0(FP), AX
	MOVQ    key+8(FP), SI
	MOVQ    ROUNDS(AX), CX
	VMOVDQU (SI), X0
	VMOVDQU X0, KEYS+0(AX)
	CMPQ    CX, $10
	JNE     key256
	KEY128($0x01, 16)
	KEY128($0x02, 32)
	KEY128($0x04, 48)
	KEY128($0x08, 64)
	KEY128($0x10, 80)
	KEY128($0x20, 96)
	KEY128($0x40, 112)
	KEY128($0x80, 128)
	KEY128($0x1b, 144)
	KEY128($0x36, 160)
	JMP     hash

key256:
	VMOVDQU 16(SI), X3
	VMOVDQU X3, KEYS+16(AX)
	KEY256A($0x01, 32)
	KEY256B(48)
	KEY256A($0x02, 64)
	KEY256B(80)
	KEY256A($0x04, 96)
	KEY256B(112)
	KEY256A($0x08, 128)
	KEY256B(144)
	KEY256A($0x10, 160)
	KEY256B(176)
	KEY256A($0x20, 192)
	KEY256B(208)
	KEY256A($0x40, 224)

hash:
	// H is what the cipher makes of zeros.
	VMOVDQU KEYS(AX), X0
	LEAQ    KEYS+16(AX), SI
	DECQ    CX

hashRound:
	VAESENC (SI), X0, X0
	ADDQ    $16, SI
	DECQ    CX
	JNE     hashRound
	VAESENCLAST (SI), X0, X0

	// Times x: one bit up, and if one is lost at the top, the modulus.
	VPSHUFB swap<>(SB), X0, X0
	VPSRAD  $31, X0, X1
	VPSHUFD $0xff, X1, X1
	VPAND   modulus<>(SB), X1, X1
	VPSRLQ  $63, X0, X2
	VPSLLDQ $8, X2, X2
	VPADDQ  X0, X0, X0
	VPOR    X2, X0, X0
	VPXOR   X1, X0, X0

	VMOVDQU poly<>(SB), X14
	VMOVDQU X0, 240(AX)
	VMOVDQA X0, X8
	LEAQ    240(AX), SI

power:
	TIMES(X8, X0, X8)
	SUBQ    $16, SI
	VMOVDQU X8, (SI)
	CMPQ    SI, AX
	JNE     power
	VZEROUPPER
	RET
