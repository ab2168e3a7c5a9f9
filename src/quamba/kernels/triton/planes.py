"""Packed codes taken apart for tensor cores, without moving them between threads.

A tile is loaded in elements of P codes (a byte of int4, 16 bits of int4 or int8) and becomes P tiles, the
*planes*: plane p holds the codes at p, P + p, 2P + p, ... Activations are loaded P at a time too, so their
planes belong to those of the weight, and the sum over planes is the product.

On a GPU a 32-bit register of packed codes becomes registers that tensor cores read as they are; under
Triton's interpreter, which knows no instructions, plain operations give the same numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quamba.kernels.triton.words import NATIVE, round_code

_NIBBLES = tl.constexpr("shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;")

# Or-ing a nibble u (a code plus 8) into 0x6400 gives the float16 1024 + u, or 1024 + 16 u from the upper half
# of a byte; subtracting, or one exact fma (times 1/16, minus 72), leaves the code.
_CONSTANTS = (
    ".reg .b32 u, low, ratio, high;\n"
    "mov.b32 low, 0x64086408; mov.b32 ratio, 0x2C002C00; mov.b32 high, 0xD480D480;\n"
)
_LOW = "lop3.b32 {0}, {1}, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 {0}, {0}, low;\n"
_HIGH = "lop3.b32 {0}, {1}, 0x00F000F0, 0x64006400, 0xEA; fma.rn.f16x2 {0}, {0}, ratio, high;\n"
# times the scale and plus 1536, where float16 has steps of 1, is rounded half to even; then clamped.
_LEVEL_CONSTANTS = ".reg .b32 one, least, most;\n" + (
    "mov.b32 one, 0x66006600; mov.b32 least, 0x65806580; mov.b32 most, 0x667F667F;\n"
)
_LEVEL = "fma.rn.f16x2 {0}, {0}, {1}, one; max.f16x2 {0}, {0}, least; min.f16x2 {0}, {0}, most;\n"

_HALVES = tl.constexpr(
    "{"
    + _CONSTANTS
    + "xor.b32 u, $4, 0x88888888;\n"
    + _LOW.format("$0", "u")
    + _HIGH.format("$1", "u")
    + "shr.u32 u, u, 8;\n"
    + _LOW.format("$2", "u")
    + _HIGH.format("$3", "u")
    + "}"
)
_LEVEL_HALVES = tl.constexpr(
    "{"
    + _CONSTANTS
    + _LEVEL_CONSTANTS
    + "xor.b32 u, $4, 0x88888888;\n"
    + _LOW.format("$0", "u")
    + _HIGH.format("$1", "u")
    + "shr.u32 u, u, 8;\n"
    + _LOW.format("$2", "u")
    + _HIGH.format("$3", "u")
    + "".join(_LEVEL.format(f"${i}", "$5") + f"sub.rn.f16x2 ${i}, ${i}, one;\n" for i in range(4))
    + "}"
)
#: Bytes 0 to 3 of $2 have the scale $3 (and $4, the same): int8 of low and of high nibbles. The last byte of
#: 1536 + n is n.
_LEVEL_BYTES = tl.constexpr(
    "{"
    + _CONSTANTS
    + _LEVEL_CONSTANTS
    + ".reg .b32 a, b, c, d, e, f;\n"
    + "xor.b32 u, $2, 0x88888888; prmt.b32 e, u, 0, 0x4140; prmt.b32 f, u, 0, 0x4342;\n"
    + _LOW.format("a", "e")
    + _LOW.format("b", "f")
    + _HIGH.format("c", "e")
    + _HIGH.format("d", "f")
    + "".join(_LEVEL.format(name, scale) for name, scale in zip("abcd", ("$3", "$4") * 2, strict=True))
    + "prmt.b32 $0, a, b, 0x6420; prmt.b32 $1, c, d, 0x6420; }"
)
# int8 plus 128 in the last byte of 0x6400 is the float16 1152 + code.
_BYTE_HALVES = tl.constexpr(
    "{ .reg .b32 u, k; mov.b32 k, 0x64806480; xor.b32 u, $2, 0x80808080;\n"
    "lop3.b32 $0, u, 0x00FF00FF, 0x64006400, 0xEA; sub.rn.f16x2 $0, $0, k; shr.u32 u, u, 8;\n"
    "lop3.b32 $1, u, 0x00FF00FF, 0x64006400, 0xEA; sub.rn.f16x2 $1, $1, k; }"
)
_PAIRS_OF_BYTES = tl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")
_PAIRS_OF_HALVES = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;")
_FOURS_OF_HALVES = tl.constexpr(
    "{ .reg .b32 a, b, c, d; mov.b64 {a, b}, $4; mov.b64 {c, d}, $5;\n"
    "prmt.b32 $0, a, c, 0x5410; prmt.b32 $1, a, c, 0x7632;\n"
    "prmt.b32 $2, b, d, 0x5410; prmt.b32 $3, b, d, 0x7632; }"
)


@triton.jit
def weight_planes(w, level, BITS: tl.constexpr, FLOAT: tl.constexpr, TWO_LEVEL: tl.constexpr):
    """Planes of a tile of weights, int8 or float16 as the activations are.

    w      int8; or uint8 of two int4; with FLOAT int16 of four int4 or of two int8
    level  TWO_LEVEL: float16 scales of the shape of w; codes become round(scale * code), clamped to int8
    Of int4 that become int8 with one level, the planes are 16 times the codes.
    """
    if BITS == 8:
        planes = _int8_as_halves(w) if FLOAT else (w,)
    elif FLOAT:
        planes = _int4_as_halves(w, level, TWO_LEVEL)
    else:
        planes = _int4_as_bytes(w, level, TWO_LEVEL)
    return planes


@triton.jit
def _int4_as_bytes(w, level, TWO_LEVEL: tl.constexpr):
    if NATIVE:
        if TWO_LEVEL:
            planes = tl.inline_asm_elementwise(
                _LEVEL_BYTES,
                "=&r,=&r,r,r,r",
                [w, level],
                dtype=(tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            planes = tl.inline_asm_elementwise(
                _NIBBLES, "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
    else:
        low, high = (w << 4).to(tl.int8, bitcast=True), (w & 0xF0).to(tl.int8, bitcast=True)
        if TWO_LEVEL:
            planes = (_rounded(low >> 4, level).to(tl.int8), _rounded(high >> 4, level).to(tl.int8))
        else:
            planes = (low, high)
    return planes


@triton.jit
def _int4_as_halves(w, level, TWO_LEVEL: tl.constexpr):
    if NATIVE:
        if TWO_LEVEL:
            planes = tl.inline_asm_elementwise(
                _LEVEL_HALVES,
                "=&r,=&r,=&r,=&r,r,r",
                [w, level],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            planes = tl.inline_asm_elementwise(
                _HALVES,
                "=&r,=&r,=&r,=&r,r",
                [w],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        word = w.to(tl.int32)
        a, b, c, d = word << 28 >> 28, word << 24 >> 28, word << 20 >> 28, word << 16 >> 28
        if TWO_LEVEL:
            a, b, c, d = _rounded(a, level), _rounded(b, level), _rounded(c, level), _rounded(d, level)
        planes = (a.to(tl.float16), b.to(tl.float16), c.to(tl.float16), d.to(tl.float16))
    return planes


@triton.jit
def _int8_as_halves(w):
    if NATIVE:
        planes = tl.inline_asm_elementwise(
            _BYTE_HALVES, "=&r,=&r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        word = w.to(tl.int32)
        planes = ((word << 24 >> 24).to(tl.float16), (word << 16 >> 24).to(tl.float16))
    return planes


@triton.jit
def _rounded(code, level):
    return round_code(code.to(tl.float32) * level.to(tl.float32))


@triton.jit
def x_planes(x, FLOAT: tl.constexpr, P: tl.constexpr):
    """Planes of a tile of activations, loaded P at a time: int8, int16 of two int8, int32 of two or int64 of
    four float16."""
    if P > 1 and NATIVE:
        planes = _native_x_planes(x, FLOAT, P)
    elif P == 4:
        planes = (_half(x, 0), _half(x, 1), _half(x, 2), _half(x, 3))
    elif P == 2:
        planes = (_half(x, 0), _half(x, 1)) if FLOAT else (x.to(tl.int8), (x >> 8).to(tl.int8))
    else:
        planes = (x,)
    return planes


@triton.jit
def _native_x_planes(x, FLOAT: tl.constexpr, P: tl.constexpr):
    if not FLOAT:
        planes = tl.inline_asm_elementwise(
            _PAIRS_OF_BYTES, "=&r,=&r,r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif P == 2:
        planes = tl.inline_asm_elementwise(
            _PAIRS_OF_HALVES, "=&r,=&r,r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        planes = tl.inline_asm_elementwise(
            _FOURS_OF_HALVES,
            "=&r,=&r,=&r,=&r,l,l",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return planes


@triton.jit
def _half(x, i: tl.constexpr):
    return ((x >> (16 * i)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def level_words(word, level):
    """int32 words of four int8, round(level * code), of the low and of the high nibbles of an int32 word.

    level  float16, of the shape of word
    """
    if NATIVE:
        bits = level.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair = bits | (bits << 16)
        words = tl.inline_asm_elementwise(
            _LEVEL_BYTES,
            "=&r,=&r,r,r,r",
            [word, pair, pair],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = word * 0, word * 0
        for i in tl.static_range(4):
            low |= (_rounded(word << (28 - 8 * i) >> 28, level).to(tl.int32) & 0xFF) << (8 * i)
            high |= (_rounded(word << (24 - 8 * i) >> 28, level).to(tl.int32) & 0xFF) << (8 * i)
        words = (low, high)
    return words
