"""Arithmetic on 32-bit words that hold four int8, eight int4 or two float16.

On a GPU each function is one or a few instructions; under Triton's interpreter, which knows no instructions,
plain operations that give the same bits.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

NATIVE = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")
HIGH_NIBBLES = tl.constexpr(-252645136)  # 0xF0F0F0F0


@triton.jit
def dot4(a, b, c):
    """c + the sum of products of four int8; all int32 tensors."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    for i in tl.static_range(4):
        c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return c


@triton.jit
def even_bytes(a, b):
    """Bytes 0 and 2 of a, then of b."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return (a & 0xFF) | ((a >> 8) & 0xFF00) | ((b & 0xFF) << 16) | ((b << 8) & -16777216)


@triton.jit
def odd_bytes(a, b):
    """Bytes 1 and 3 of a, then of b."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return ((a >> 8) & 0xFF) | ((a >> 16) & 0xFF00) | ((b << 8) & 0xFF0000) | (b & -16777216)


@triton.jit
def low_halves(a, b):
    """The lower 16 bits of a, then of b."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return (a & 0xFFFF) | (b << 16)


@triton.jit
def high_halves(a, b):
    """The upper 16 bits of a, then of b."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return ((a >> 16) & 0xFFFF) | (b & -65536)


# Codes i and i + 4 of a word become the float16 pair 1032 + code (0x6400 is 1024, and codes are offset by 8)
# less 1032: exact. Four products with the pairs of x are added in float16, two by two, then in float32.
_INT4_TIMES_HALF = tl.constexpr(
    "{ .reg .b32 u, h, p, k; .reg .b16 a, b; .reg .f32 f, g;\n"
    "mov.b32 k, 0x64086408; xor.b32 u, $1, 0x88888888;\n"
    "lop3.b32 h, u, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 h, h, k; mul.rn.f16x2 p, h, $2;\n"
    "shr.u32 u, u, 4;\n"
    "lop3.b32 h, u, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 h, h, k; fma.rn.f16x2 p, h, $3, p;\n"
    "mov.b32 {a, b}, p; cvt.f32.f16 f, a; cvt.f32.f16 g, b; add.f32 $0, f, g;\n"
    "shr.u32 u, u, 4;\n"
    "lop3.b32 h, u, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 h, h, k; mul.rn.f16x2 p, h, $4;\n"
    "shr.u32 u, u, 4;\n"
    "lop3.b32 h, u, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 h, h, k; fma.rn.f16x2 p, h, $5, p;\n"
    "mov.b32 {a, b}, p; cvt.f32.f16 f, a; cvt.f32.f16 g, b; add.f32 f, f, g; add.f32 $0, $0, f; }"
)


@triton.jit
def int4_times_half(word, x04, x15, x26, x37):
    """float32 sum of the eight products of the int4 codes of ``word`` with x.

    x04 and the others hold x[0] and x[4] of the eight as a pair of float16, and so on. A pair of products of
    one half is added in float16: an error of 2^-12 of it, as large as that of rounding the result to float16.
    """
    if NATIVE:
        return tl.inline_asm_elementwise(
            _INT4_TIMES_HALF,
            "=&f,r,r,r,r,r",
            [word, x04, x15, x26, x37],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    total = tl.zeros_like(word).to(tl.float32)
    total += _code_times_half(word, x04, 0) + _code_times_half(word, x15, 1)
    total += _code_times_half(word, x26, 2) + _code_times_half(word, x37, 3)
    return total


@triton.jit
def _code_times_half(word, pair, i: tl.constexpr):
    low = ((word << (28 - 4 * i)) >> 28).to(tl.float32)
    high = ((word << (12 - 4 * i)) >> 28).to(tl.float32)
    a = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    b = ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low * a + high * b


@triton.jit
def round_code(y):
    """Half to even, saturated to int8: float32 of this size has steps of 1, and the code in its last byte."""
    y = tl.minimum(tl.maximum(y, -128.0), 127.0)
    return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def reciprocal(x):
    """1 / x to one or two units in the last place; 0 for the inverse of what is above 2^126."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


_SATURATED_BYTES = tl.constexpr(
    "{ .reg .b32 a, b, c, d;\n"
    "cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;\n"
    "cvt.pack.sat.s8.s32.b32 d, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, d; }"
)


@triton.jit
def saturated_bytes(a, b, c, d):
    """A word of four float32, rounded half to even and saturated to int8; a is the lowest byte."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            _SATURATED_BYTES, "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1
        )
    low = (round_code(a).to(tl.int32) & 0xFF) | ((round_code(b).to(tl.int32) & 0xFF) << 8)
    high = (round_code(c).to(tl.int32) & 0xFF) | ((round_code(d).to(tl.int32) & 0xFF) << 8)
    return low | (high << 16)


# The last 16 bits of 1.5 * 2^23 + n are n; adding 128 rounds to the high byte, as the low one is signed.
_WIDE_BYTES = tl.constexpr(
    "{ .reg .f32 e, f, g, h; .reg .b32 a, b, c, d, u, v;\n"
    "add.rn.f32 e, $2, 0f4B400000; add.rn.f32 f, $3, 0f4B400000;\n"
    "add.rn.f32 g, $4, 0f4B400000; add.rn.f32 h, $5, 0f4B400000;\n"
    "mov.b32 a, e; mov.b32 b, f; mov.b32 c, g; mov.b32 d, h;\n"
    "prmt.b32 u, a, b, 0x0040; prmt.b32 v, c, d, 0x0040; prmt.b32 $1, u, v, 0x5410;\n"
    "add.s32 a, a, 128; add.s32 b, b, 128; add.s32 c, c, 128; add.s32 d, d, 128;\n"
    "prmt.b32 u, a, b, 0x0051; prmt.b32 v, c, d, 0x0051; prmt.b32 $0, u, v, 0x5410; }"
)


@triton.jit
def wide_bytes(a, b, c, d):
    """Words (high, low) of four float32 rounded half to even, up to 32639 in size: each is 256 high + low in
    two int8; a is in the lowest bytes."""
    if NATIVE:
        words = tl.inline_asm_elementwise(
            _WIDE_BYTES, "=&r,=&r,f,f,f,f", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        e, f, g, h = _whole(a), _whole(b), _whole(c), _whole(d)
        low = (e & 255) | ((f & 255) << 8) | ((g & 255) << 16) | (h << 24)
        e, f, g, h = (e + 128) >> 8, (f + 128) >> 8, (g + 128) >> 8, (h + 128) >> 8
        words = ((e & 255) | ((f & 255) << 8) | ((g & 255) << 16) | (h << 24), low)
    return words


@triton.jit
def _whole(v):
    return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
