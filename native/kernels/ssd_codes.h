// Products of codes and floats for Mamba2's scan, at the rate of bytes: the floats of a column become integers of 16
// bits with one scale, an upper signed byte and a lower unsigned one, and each of the two is multiplied with codes.
// The error is half a step of a column's largest number over 32767.
#pragma once

#include "simd.h"

namespace QB_ISA {
namespace {

// Where one instruction multiplies bytes and adds four products up, twice of them are faster than floats.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kCodeProducts = true;
#else
constexpr bool kCodeProducts = false;
#endif
constexpr int kSplitVectors = 2;  // columns are cut into as many vectors
constexpr int kCodeRows = kFloats == 16 ? 6 : 2;
constexpr float kSplitReach = 32767;

/// Columns as integers of 16 bits: a step is four numbers of each.
struct Split {
    vi *planes;  // [steps][upper, lower][kSplitVectors], a number of a column a byte
    vi begin[kSplitVectors];  // where sums of the upper bytes with codes + 128 begin
    vf scale[kSplitVectors];

    static int64_t vectors(int64_t count) { return (count + 3) / 4 * 2 * kSplitVectors; }
};

/// The place of number i of four in its step: so two shuffles less are needed to lay them out.
QB_INLINE int64_t place(int64_t i) { return i == 1 ? 2 : i == 2 ? 1 : i; }

/// Four bytes a word, each put at its place.
QB_INLINE void place_words(uint32_t *words, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t w = words[i];
        words[i] = (w & 0xff0000ff) | ((w >> 8) & 0xff00) | ((w & 0xff00) << 8);
    }
}

QB_INLINE vi larger(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return a > b ? a : b;
#endif
}

/// read(k, v): numbers k of the columns of vector v. A column with an infinity or a NaN gets that as its scale.
template <class Read>
QB_INLINE void split_columns(int64_t count, const Read &read, Split &out) {
    vf by[kSplitVectors];
    for (int v = 0; v < kSplitVectors; ++v) {
        vi top = {};  // as integers floats above 0 have their order, and NaN is the largest
        for (int64_t k = 0; k < count; ++k) top = larger(top, (vi)vabs(read(k, v)));
        const vi enough = (vi)((vf)top < 1e-30f);  // not for what is too small to be divided by
        out.scale[v] = (vf)(~enough & (vi)((vf)top * (1.0f / kSplitReach)));
        by[v] = (vf)(~enough & (vi)(kSplitReach / (vf)top));
        out.begin[v] = vi{};
    }
    const vu bias = (vu)(vb{} + (int8_t)-128);
    vi *to = out.planes;
    for (int64_t k = 0; k < count; k += 4, to += 2 * kSplitVectors)
        for (int v = 0; v < kSplitVectors; ++v) {
            vi number[4];
            QB_UNROLL
            for (int i = 0; i < 4; ++i) number[i] = k + i < count ? round_even(read(k + i, v) * by[v]) : vi{};
            const vi even = (number[0] & 0xffff) | (number[1] << 16), odd = (number[2] & 0xffff) | (number[3] << 16);
            const vi upper = ((even >> 8) & 0x00ff00ff) | (odd & (int32_t)0xff00ff00);
            store(to + v, upper);
            store(to + kSplitVectors + v, (even & 0x00ff00ff) | ((odd & 0x00ff00ff) << 8));
            out.begin[v] = dot(out.begin[v], bias, (vb)upper);
        }
    for (int v = 0; v < kSplitVectors; ++v) out.begin[v] = -out.begin[v];
}

/// What R rows of codes, `row` bytes each, give with split columns: integers of the columns' scales. The codes lie by
/// place(), once as they are and, `biased` bytes further on, once more with 128 added.
template <int R>
QB_INLINE void multiply_codes(vf (&acc)[R][kSplitVectors], const int8_t *codes, int64_t row, int64_t biased,
                              const Split &split, int64_t steps) {
    vi upper[R][kSplitVectors], lower[R][kSplitVectors] = {};
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kSplitVectors; ++v) upper[r][v] = split.begin[v];
    const vi *planes = split.planes;
    for (int64_t k = 0; k < steps; ++k, codes += 4, planes += 2 * kSplitVectors) {
        vi column[2 * kSplitVectors];
        for (int v = 0; v < 2 * kSplitVectors; ++v) column[v] = load<vi>(planes + v);
        for (int r = 0; r < R; ++r) {
            const vb code = splat4(codes + r * row);
            const vu above = (vu)splat4(codes + r * row + biased);
            for (int v = 0; v < kSplitVectors; ++v) {
                upper[r][v] = dot(upper[r][v], above, (vb)column[v]);
                lower[r][v] = dot(lower[r][v], (vu)column[kSplitVectors + v], code);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kSplitVectors; ++v) acc[r][v] = to_float((upper[r][v] << 8) + lower[r][v]);
}

}  // namespace
}  // namespace QB_ISA
