// y = x w^T, the weights read as they are stored: codes of 8 and 4 bits, and at the end floats.
//
// Inputs become signed bytes, weights unsigned ones (a code plus kBias), because that is what the instructions
// multiply; what the bias adds is taken off by where the sums begin. Integer inputs are bytes already. Float inputs
// become integers of 15 bits with a scale for each row and segment of at most 128 columns, 128 * high + low: two
// planes of bytes, whose sums are put together as integers.
//
// Few rows of x: each row of w is read once, a dot product with all of them. Many rows: tiles of w are laid out for
// outer products first, four columns of one output next to each other.
#include "simd.h"

namespace QB_ISA {
namespace {

constexpr int kBias4 = 8;
#if defined(__x86_64__)
constexpr int kBias8 = 128;
#else
constexpr int kBias8 = 0;  // products of signed bytes exist
#endif

// Columns of a float input that share a scale.
constexpr int64_t kFloatSegment = 128;
// The largest of its integers: 127 * 128, so that the upper byte does not overflow.
constexpr float kReach = 16256;
// Rows of x from which on tiles are laid out.
constexpr int64_t kManyRows = 12;
constexpr int64_t kMostAtOnce = 4;
// Bytes of weights that are asked for before few rows need them, into the L2 cache: 4 KiB ahead and into the L1 cache
// took a quarter longer.
constexpr int64_t kAhead = 8192;

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 2;
#else
constexpr int kTileRows = 8, kTileVectors = 2;
#endif
constexpr int kTileOutputs = kTileVectors * kFloats;

template <int bits>
QB_INLINE vi dot_weight(vi acc, vu w, vb x) {
    if constexpr (bits == 4) return dot_small(acc, w, x);
#if defined(__x86_64__)
    return dot(acc, w, x);
#else
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x);
#endif
}

// How the columns are cut: groups of weights, in them segments after which sums become floats, in those blocks of
// what a vector of weights holds. Inputs are laid out so, each segment filled up with zeros.
struct Cut {
    int64_t columns, groups, group, segments, per_group, block, blocks, line;

    Cut(const QbLinear &p, bool nibbles) : columns(p.columns) {
        // With two levels of scales, a row's integers are summed without scales in between.
        groups = p.channel_scale ? 1 : p.groups;
        group = columns / groups;
        per_group = p.x.dtype == QB_I8 ? 1 : (group + kFloatSegment - 1) / kFloatSegment;
        segments = groups * per_group;
        block = nibbles ? 2 * kBytes : kBytes;
        blocks = (size(0) + block - 1) / block;
        line = segments * blocks * block;
    }
    int64_t first(int64_t s) const {
        return per_group == 1 ? s * group : s / per_group * group + s % per_group * kFloatSegment;
    }
    int64_t size(int64_t s) const {
        return per_group == 1 ? group : least(kFloatSegment, group - s % per_group * kFloatSegment);
    }
};

QB_INLINE float scale_at(const QbLinear &p, int64_t output, int64_t g) {
    const int64_t i = (p.scale_rows == 1 ? 0 : output * p.groups) + g;
    return p.scale_dtype == QB_F32 ? ((const float *)p.scale)[i] : f16_value(((const uint16_t *)p.scale)[i]);
}

// What makes integers of the codes of a group: its scale, or its multiple of the row's number.
QB_INLINE float level_at(const QbLinear &p, int64_t output, int64_t g) {
    const float scale = scale_at(p, output, g);
    return p.row_unit ? scale / p.row_unit[output] : scale;
}

// What the sums of the segments of some outputs are multiplied with, but for the scale of x: out [count][segments].
QB_INLINE void segment_scales(const QbLinear &p, const Cut &cut, int64_t output, int64_t count, float *out) {
    if (cut.per_group == 1 && cut.groups > 1 && p.scale_rows > 1) {
        // The scales of these outputs lie next to each other.
        const int64_t from = output * p.groups, all = count * p.groups;
        if (p.scale_dtype == QB_F32) {
            __builtin_memcpy(out, (const float *)p.scale + from, 4 * all);
            return;
        }
        const uint16_t *halves = (const uint16_t *)p.scale + from;
        int64_t i = 0;
        for (; i + kFloats <= all; i += kFloats) store(out + i, from_f16(halves + i));
        for (; i < all; ++i) out[i] = f16_value(halves[i]);
        return;
    }
    for (int64_t o = 0; o < count; ++o)
        for (int64_t g = 0; g < cut.groups; ++g) {
            const float one = p.channel_scale ? p.channel_scale[output + o] : scale_at(p, output + o, g);
            for (int64_t i = 0; i < cut.per_group; ++i) *out++ = one;
        }
}

// Vectors of weights.

typedef uint16_t vs __attribute__((vector_size(kBytes)));

QB_INLINE vu biased8(vu w) { return kBias8 ? w ^ (vu)(vb{} + (int8_t)-128) : w; }

// Bytes of w from `part` on; none beyond the end of all weights are touched.
QB_INLINE vu load_weights(const uint8_t *part, const uint8_t *end, bool at_end) {
    if (!at_end || part + kBytes <= end) return load<vu>(part);
    vu raw = {};
    if (part < end) __builtin_memcpy(&raw, part, end - part);
    return raw;
}

// The integers of two levels, by nibble: round(scale * code) and the bias, sixteen bytes again and again.
QB_INLINE vu levels_of(float scale) {
    alignas(64) int8_t table[16];
    const vi lane = lanes();
    for (int i = 0; i < 16; i += kFloats) {
        const vi nibble = lane + i;
        const vf code = to_float(nibble < 8 ? nibble : nibble - 16);
        narrow(table + i, round_even(vmin(vmax(code * scale, splat(-128.0f)), splat(127.0f))));
    }
#if defined(__AVX512F__)
    const vu all = (vu)_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)table));
#elif defined(__AVX2__)
    const vu all = (vu)_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table));
#else
    const vu all = load<vu>(table);
#endif
    return biased8(all);
}

QB_INLINE vu look_up(vu table, vu nibbles) {
#if defined(__AVX512F__)
    return (vu)_mm512_shuffle_epi8((__m512i)table, (__m512i)nibbles);
#elif defined(__AVX2__)
    return (vu)_mm256_shuffle_epi8((__m256i)table, (__m256i)nibbles);
#else
    return (vu)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)nibbles);
#endif
}

enum Way { kGroups, kWhole, kLevels };

// The biased weights in a vector of bytes: for 4 bits those of even columns, then those of odd ones.
template <Way way, int bits>
QB_INLINE void unpack(vu raw, vu table, vu *w) {
    if constexpr (bits == 8) {
        w[0] = biased8(raw);
    } else if constexpr (way == kLevels) {
        w[0] = look_up(table, raw & 0x0f);
        w[1] = look_up(table, (vu)((vs)raw >> 4) & 0x0f);
    } else {
        raw ^= 0x88;
        w[0] = raw & 0x0f;
        w[1] = (vu)((vs)raw >> 4) & 0x0f;
    }
}

// Rows of x as bytes.

// Floats as two planes of bytes, [columns] each, and a scale a segment.
void split_row(const QbLinear &p, const Cut &cut, int64_t row, int8_t *high, int8_t *low, float *scales) {
    float *values = (float *)quamba::scratch(0, 4 * (cut.columns + kFloats));
    read_row(values, p.x, 0, row, 0, cut.columns);
    for (int64_t s = 0; s < cut.segments; ++s) {
        const int64_t first = cut.first(s), size = cut.size(s), whole = size / kFloats * kFloats;
        const float *v = values + first;
        vf reaches = {};
        for (int64_t i = 0; i < whole; i += kFloats) reaches = vmax(reaches, vabs(loadf(v + i)));
        float reach = 0;
        for (int i = 0; i < kFloats; ++i) reach = most(reach, reaches[i]);
        for (int64_t i = whole; i < size; ++i) reach = most(reach, __builtin_fabsf(v[i]));
        scales[s] = reach / kReach;
        const float by = reach > 0 ? kReach / reach : 0;
        int64_t i = 0;
        for (; i < whole; i += kFloats) {
            const vi number = round_even(loadf(v + i) * by), upper = (number + 64) >> 7;
            narrow(high + first + i, upper);
            narrow(low + first + i, number - (upper << 7));
        }
        for (; i < size; ++i) {
            const int32_t number = (int32_t)__builtin_rintf(v[i] * by), upper = (number + 64) >> 7;
            high[first + i] = (int8_t)upper;
            low[first + i] = (int8_t)(number - upper * 128);
        }
    }
}

// Even bytes, then odd bytes, of two vectors.
QB_INLINE void split_bytes(const int8_t *in, int8_t *out) {
#if defined(__AVX512F__)
    for (int i = 0; i < 2; ++i) {
        const __m512i pairs = _mm512_loadu_si512(in + 64 * i);
        _mm256_storeu_si256((__m256i *)(out + 32 * i), _mm512_cvtepi16_epi8(pairs));
        _mm256_storeu_si256((__m256i *)(out + 64 + 32 * i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(pairs, 8)));
    }
#else
    for (int i = 0; i < kBytes; ++i) {
        out[i] = in[2 * i];
        out[kBytes + i] = in[2 * i + 1];
    }
#endif
}

// A plane of a row as a line: out [segments][blocks][block]; begin(s, sums) is given the products with the bias.
template <bool nibbles, int bias, class Begin>
QB_INLINE void lay_out_line(const Cut &cut, const int8_t *plane, int8_t *out, const Begin &begin) {
    for (int64_t s = 0; s < cut.segments; ++s) {
        const int8_t *in = plane + cut.first(s);
        const int64_t size = cut.size(s);
        vi sums = {};
        for (int64_t b = 0; b < cut.blocks; ++b, out += cut.block) {
            const int64_t left = size - b * cut.block;
            if (left >= cut.block && nibbles) {
                split_bytes(in + b * cut.block, out);
            } else if (left >= cut.block) {
                store(out, load<vb>(in + b * cut.block));
            } else {
                for (int64_t i = 0; i < cut.block; ++i) {
                    const int64_t column = nibbles ? 2 * (i % kBytes) + i / kBytes : i;
                    out[i] = column < left ? in[b * cut.block + column] : 0;
                }
            }
            for (int64_t v = 0; v < cut.block; v += kBytes)
                sums = dot(sums, (vu)(vb{} + (int8_t)bias), load<vb>(out + v));
        }
        begin(s, sums);
    }
}

// The planes of a row: one of codes, or two of floats, which are put at `plain`, their scales at `scales`.
QB_INLINE void planes_of(const QbLinear &p, const Cut &cut, int64_t row, int8_t *plain, float *scales,
                         const int8_t **planes) {
    if (p.x.dtype == QB_I8) {
        planes[0] = (const int8_t *)at(p.x, 0, row);
        return;
    }
    split_row(p, cut, row, plain, plain + cut.columns, scales);
    planes[0] = plain;
    planes[1] = plain + cut.columns;
}

// Few rows.

struct Few {
    int8_t *x;      // [rows * planes] lines
    vi *begin;      // [rows * planes][segments], minus the bias times the sums of x
    float *scales;  // [rows][segments], of floats
};

template <bool nibbles, int bias, bool planes>
Few prepare_few(const QbLinear &p, const Cut &cut) {
    constexpr int64_t kPlanes = planes ? 2 : 1;
    const int64_t lines = p.rows * kPlanes;
    Few few;
    few.x = (int8_t *)quamba::scratch(4, lines * cut.line);
    few.begin = (vi *)quamba::scratch(5, lines * cut.segments * (int64_t)sizeof(vi));
    few.scales = (float *)quamba::scratch(6, 4 * p.rows * cut.segments);
    int8_t *plain = (int8_t *)quamba::scratch(7, 2 * cut.columns + kBytes);
    for (int64_t row = 0; row < p.rows; ++row) {
        const int8_t *both[2];
        planes_of(p, cut, row, plain, few.scales + row * cut.segments, both);
        for (int64_t plane = 0; plane < kPlanes; ++plane) {
            const int64_t line = row * kPlanes + plane;
            vi *begin = few.begin + line * cut.segments;
            // Of two planes the lower one begins for both, since their sums are put together.
            const vi *upper = plane == 1 ? begin - cut.segments : nullptr;
            lay_out_line<nibbles, bias>(cut, both[plane], few.x + line * cut.line, [&](int64_t s, vi sums) {
                begin[s] = (upper ? upper[s] << 7 : vi{}) - sums;
            });
        }
    }
    return few;
}

// Sums of a row of w with some rows of x, a vector each that is still to be added up: total [rows].
// scales [segments], of one row of floats times those of x; blocks_known 0: any number of blocks. One row at a time
// keeps memory in one stream, which is twice as fast as two.
template <Way way, int bits, int rows, bool planes, bool at_end, int blocks_known>
QB_INLINE void few_totals(const QbLinear &p, const Cut &cut, const Few &few, int64_t output, int64_t row,
                          const float *scales, vf *total) {
    constexpr int lines = planes ? 2 * rows : rows, vectors = bits == 4 ? 2 : 1;
    constexpr int64_t block = vectors * kBytes;
    const int64_t row_bytes = bits == 4 ? cut.columns / 2 : cut.columns;
    const uint8_t *w = (const uint8_t *)p.weight + output * row_bytes;
    const uint8_t *end = (const uint8_t *)p.weight + p.outputs * row_bytes;
    const int64_t first_line = planes ? 2 * row : row;
    const int64_t segments = cut.segments, line = cut.line, per_group = cut.per_group, group = cut.group;
    const int64_t blocks = blocks_known ? blocks_known : cut.blocks;
    const int8_t *x = few.x + first_line * line;
    const vi *begin = few.begin + first_line * segments;
    const float *x_scales = few.scales + row * segments;
    // Of two levels: the group at hand, and where the next one begins.
    vu table = {};
    int64_t level = 0, next_level = 0;
    const int64_t level_size = way == kLevels ? cut.columns / p.groups : 0;
    vf sums[rows] = {};
    int64_t group_first = 0, in_group = 0;
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t first = group_first + in_group * kFloatSegment;
        if (++in_group == per_group) {
            in_group = 0;
            group_first += group;
        }
        vi acc[lines];
        for (int i = 0; i < lines; ++i) acc[i] = planes && i % 2 == 0 ? vi{} : begin[i * segments + s];
        for (int64_t b = 0; b < blocks; ++b, x += block) {
            const int64_t column = first + b * block;
            if constexpr (way == kLevels) {
                if (column >= next_level && column < cut.columns) {
                    table = levels_of(level_at(p, output, level++));
                    next_level += level_size;
                }
            }
            const uint8_t *part = w + (bits == 4 ? column / 2 : column);
            vu unpacked[vectors];
            __builtin_prefetch(part + kAhead, 0, 2);
            unpack<way, bits>(load_weights(part, end, at_end), table, unpacked);
            for (int i = 0; i < lines; ++i)
                for (int v = 0; v < vectors; ++v)
                    acc[i] = dot_weight<way == kLevels ? 8 : bits>(acc[i], unpacked[v],
                                                                  load<vb>(x + i * line + v * kBytes));
        }
        for (int i = 0; i < rows; ++i) {
            if constexpr (planes)
                sums[i] += to_float((acc[2 * i] << 7) + acc[2 * i + 1]) *
                           (rows == 1 ? scales[s] : scales[s] * x_scales[i * segments + s]);
            else
                sums[i] += to_float(acc[i]) * scales[s];
        }
    }
    for (int i = 0; i < rows; ++i) total[i] = sums[i];
}

// One scale a row and integer inputs: the sum stays an integer to its end, as the definition has it. total [lines].
template <int lines, bool at_end>
QB_INLINE void few_whole(const QbLinear &p, const Cut &cut, const Few &few, int64_t output, int64_t first_line,
                         vi *total) {
    const uint8_t *w = (const uint8_t *)p.weight + output * cut.columns;
    const uint8_t *end = (const uint8_t *)p.weight + p.outputs * cut.columns;
    const int64_t line = cut.line, blocks = cut.blocks;
    const int8_t *x = few.x + first_line * line;
    vi acc[lines], more[lines] = {};
    for (int i = 0; i < lines; ++i) acc[i] = few.begin[first_line + i];
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) {
        const vu even = biased8(load_weights(w + b * kBytes, end, at_end));
        const vu odd = biased8(load_weights(w + (b + 1) * kBytes, end, at_end));
        __builtin_prefetch(w + b * kBytes + kAhead, 0, 2);
        __builtin_prefetch(w + b * kBytes + kAhead + kBytes, 0, 2);
        for (int i = 0; i < lines; ++i) {
            acc[i] = dot_weight<8>(acc[i], even, load<vb>(x + i * line + b * kBytes));
            more[i] = dot_weight<8>(more[i], odd, load<vb>(x + i * line + (b + 1) * kBytes));
        }
    }
    if (b < blocks) {
        const vu last = biased8(load_weights(w + b * kBytes, end, at_end));
        for (int i = 0; i < lines; ++i) acc[i] = dot_weight<8>(acc[i], last, load<vb>(x + i * line + b * kBytes));
    }
    for (int i = 0; i < lines; ++i) total[i] = acc[i] + more[i];
}

// Outputs [first, last) of some rows of x: out [rows][stride].
template <Way way, int bits, int rows, bool planes>
void few_part(const QbLinear &p, const Cut &cut, const Few &few, int64_t first, int64_t last, int64_t row,
              float *out, int64_t stride) {
    const int64_t row_bytes = bits == 4 ? cut.columns / 2 : cut.columns;
    // Vectors reach beyond a row, but must not beyond the last one.
    const auto at_end = [&](int64_t output) { return (p.outputs - output - 1) * row_bytes < 4 * kBytes + 256; };
    const float by = !planes && p.x_scale ? *p.x_scale : 1.0f;
    if constexpr (way == kWhole) {
        for (int64_t start = first; start < last; start += kFloats) {
            const int64_t count = least(kFloats, last - start);
            vi totals[rows][kFloats] = {};
            float scales[kFloats] = {};
            for (int64_t o = 0; o < count; ++o) {
                vi some[rows];
                if (at_end(start + o))
                    few_whole<rows, true>(p, cut, few, start + o, row, some);
                else
                    few_whole<rows, false>(p, cut, few, start + o, row, some);
                for (int i = 0; i < rows; ++i) totals[i][o] = some[i];
                scales[o] = scale_at(p, start + o, 0);
            }
            for (int i = 0; i < rows; ++i)
                store_upto(out + i * stride + start - first, to_float(sums_of(totals[i])) * loadf(scales) * by, count);
        }
    } else {
        float *all_scales = (float *)quamba::scratch(2, 4 * kFloats * cut.segments);
        for (int64_t start = first; start < last; start += kFloats) {
            const int64_t count = least(kFloats, last - start);
            vf totals[rows][kFloats] = {};
            segment_scales(p, cut, start, count, all_scales);
            if (planes && rows == 1)
                for (int64_t o = 0; o < count; ++o)
                    for (int64_t g = 0; g < cut.segments; ++g)
                        all_scales[o * cut.segments + g] *= few.scales[row * cut.segments + g];
            for (int64_t o = 0; o < count; ++o) {
                const int64_t output = start + o;
                const float *scales = all_scales + o * cut.segments;
                vf some[rows];
                if (at_end(output))
                    few_totals<way, bits, rows, planes, true, 0>(p, cut, few, output, row, scales, some);
                else if (cut.blocks == 1)
                    few_totals<way, bits, rows, planes, false, 1>(p, cut, few, output, row, scales, some);
                else if (cut.blocks == 2)
                    few_totals<way, bits, rows, planes, false, 2>(p, cut, few, output, row, scales, some);
                else
                    few_totals<way, bits, rows, planes, false, 0>(p, cut, few, output, row, scales, some);
                for (int i = 0; i < rows; ++i) totals[i][o] = some[i];
            }
            for (int i = 0; i < rows; ++i)
                store_upto(out + i * stride + start - first, sums_of(totals[i]) * by, count);
        }
    }
}

template <Way way, int bits, bool planes>
void few_rows(const QbLinear &p) {
    const Cut cut(p, bits == 4);
    const Few few = prepare_few<bits == 4, bits == 4 && way != kLevels ? kBias4 : kBias8, planes>(p, cut);
    // 32 KiB of weights are a microsecond of memory: enough to be worth a part.
    const int64_t size = part_size(p.outputs, most(32768 * 8 / bits / cut.columns, 1), kFloats);
    each((p.outputs + size - 1) / size, [&](int64_t part) {
        const int64_t first = part * size, last = least(first + size, p.outputs), count = last - first;
        float *out = (float *)quamba::scratch(1, 4 * kMostAtOnce * size);
        for (int64_t row = 0; row < p.rows;) {
            const int64_t left = p.rows - row, rows = planes ? least(left, 2) : least(left, kMostAtOnce);
            if (rows == 4)
                few_part<way, bits, planes ? 1 : 4, planes>(p, cut, few, first, last, row, out, size);
            else if (rows == 3)
                few_part<way, bits, planes ? 1 : 3, planes>(p, cut, few, first, last, row, out, size);
            else if (rows == 2)
                few_part<way, bits, 2, planes>(p, cut, few, first, last, row, out, size);
            else
                few_part<way, bits, 1, planes>(p, cut, few, first, last, row, out, size);
            for (int64_t i = 0; i < rows; ++i) {
                if (p.bias)
                    for (int64_t j = 0; j < count; ++j) out[i * size + j] += p.bias[first + j];
                write_row(p.y, 0, row + i, first, count, out + i * size);
            }
            row += rows;
        }
    });
}

// Many rows.

// A tile of w for outer products: [segments][steps of 4 bytes of a line][kTileOutputs][4] biased bytes.
struct Tile {
    uint8_t *w;
    float *scales;  // [segments][kTileOutputs]
};

struct Many {
    int64_t lines, steps;
    int8_t *x;       // lines; the planes of a row are neighbours
    int32_t *begin;  // [lines][segments]
    float *scales;   // [rows][segments], of floats
};

template <bool nibbles, int bias, bool planes>
Many prepare_many(const QbLinear &p, const Cut &cut) {
    constexpr int64_t kPlanes = planes ? 2 : 1, kRows = 8;
    Many many;
    many.lines = p.rows * kPlanes;
    many.steps = cut.blocks * cut.block / 4;
    // The last tile reads kTileRows lines, too.
    const int64_t lines = (many.lines + kTileRows - 1) / kTileRows * kTileRows;
    many.x = (int8_t *)quamba::scratch(4, lines * cut.line);
    many.begin = (int32_t *)quamba::scratch(5, 4 * lines * cut.segments);
    many.scales = (float *)quamba::scratch(6, 4 * lines * cut.segments);
    __builtin_memset(many.x + many.lines * cut.line, 0, (lines - many.lines) * cut.line);
    __builtin_memset(many.begin + many.lines * cut.segments, 0, 4 * (lines - many.lines) * cut.segments);
    each((p.rows + kRows - 1) / kRows, [&](int64_t part) {
        int8_t *plain = (int8_t *)quamba::scratch(1, 2 * cut.columns + kBytes);
        for (int64_t row = part * kRows; row < least((part + 1) * kRows, p.rows); ++row) {
            const int8_t *both[2];
            planes_of(p, cut, row, plain, many.scales + row * cut.segments, both);
            for (int64_t plane = 0; plane < kPlanes; ++plane) {
                const int64_t line = row * kPlanes + plane;
                int32_t *begin = many.begin + line * cut.segments;
                lay_out_line<nibbles, bias>(cut, both[plane], many.x + line * cut.line,
                                            [&](int64_t s, vi sums) { begin[s] = -sum(sums); });
            }
        }
    });
    return many;
}

// Rows and columns of kFloats vectors of four bytes each change places.
template <int kStep = 1>
QB_INLINE void transpose(vf *v) {
    if constexpr (kStep < kFloats) {
        const vi odd = (lanes() & kStep) != 0;
        QB_UNROLL
        for (int i = 0; i < kFloats; ++i)
            if (!(i & kStep)) {
                const vf a = v[i], b = v[i + kStep];
                v[i] = odd ? swap_lanes<kStep>(b) : a;
                v[i + kStep] = odd ? b : swap_lanes<kStep>(a);
            }
        transpose<2 * kStep>(v);
    }
}

template <Way way, int bits>
void lay_out_tile(const QbLinear &p, const Cut &cut, int64_t first_output, Tile &tile) {
    constexpr int vectors = bits == 4 ? 2 : 1;
    const int64_t row_bytes = bits == 4 ? cut.columns / 2 : cut.columns;
    const uint8_t *end = (const uint8_t *)p.weight + p.outputs * row_bytes;
    const int64_t level_size = way == kLevels ? cut.columns / p.groups : 0;
    float *scales = (float *)quamba::scratch(0, 4 * kTileOutputs * cut.segments);
    const int64_t outputs = least(kTileOutputs, p.outputs - first_output);
    segment_scales(p, cut, first_output, outputs, scales);
    for (int64_t o = 0; o < kTileOutputs; ++o)
        for (int64_t s = 0; s < cut.segments; ++s)
            tile.scales[s * kTileOutputs + o] = o < outputs ? scales[o * cut.segments + s] : 0.0f;
    for (int64_t v = 0; v < kTileVectors; ++v) {
        const int64_t output = first_output + v * kFloats, count = least(kFloats, p.outputs - output);
        vu tables[kFloats] = {};
        int64_t filled = -1;
        for (int64_t s = 0; s < cut.segments; ++s)
            for (int64_t b = 0; b < cut.blocks; ++b) {
                const int64_t column = cut.first(s) + b * cut.block;
                if (way == kLevels && column < cut.columns && column / level_size != filled) {
                    filled = column / level_size;
                    for (int64_t o = 0; o < count; ++o) tables[o] = levels_of(level_at(p, output + o, filled));
                }
                vf rows[vectors][kFloats] = {};
                const uint8_t *part = (const uint8_t *)p.weight + (bits == 4 ? column / 2 : column);
                for (int64_t o = 0; o < count; ++o) {
                    vu w[vectors];
                    unpack<way, bits>(load_weights(part + (output + o) * row_bytes, end, true), tables[o], w);
                    for (int i = 0; i < vectors; ++i) rows[i][o] = (vf)w[i];
                }
                for (int i = 0; i < vectors; ++i) {
                    transpose(rows[i]);
                    const int64_t step = (s * cut.blocks + b) * (cut.block / 4) + i * kFloats;
                    for (int k = 0; k < kFloats; ++k)
                        store(tile.w + ((step + k) * kTileVectors + v) * kBytes, rows[i][k]);
                }
            }
    }
}

// y [kTileRows][kTileOutputs] of kTileRows lines of x and a tile; half as many rows where a row has two planes.
template <int bits, bool planes>
QB_INLINE void outer(const Cut &cut, const Many &many, const Tile &tile, int64_t line, float *y) {
    const int8_t *x = many.x + line * cut.line;
    const int32_t *begin = many.begin + line * cut.segments;
    constexpr int rows = planes ? kTileRows / 2 : kTileRows;
    vf total[rows][kTileVectors] = {};
    for (int64_t s = 0; s < cut.segments; ++s) {
        const uint8_t *w = tile.w + s * many.steps * 4 * kTileOutputs;
        const int8_t *in = x + s * many.steps * 4;
        vi acc[kTileRows][kTileVectors];
        for (int i = 0; i < kTileRows; ++i)
            for (int v = 0; v < kTileVectors; ++v) acc[i][v] = spliti(begin[i * cut.segments + s]);
        for (int64_t k = 0; k < many.steps; ++k) {
            vu column[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) {
                const uint8_t *at = w + (k * kTileVectors + v) * kBytes;
                column[v] = load<vu>(at);
                __builtin_prefetch(at + 2304);  // a tile is larger than the L1 cache
            }
            for (int i = 0; i < kTileRows; ++i) {
                const vb four = splat4(in + i * cut.line + 4 * k);
                for (int v = 0; v < kTileVectors; ++v) acc[i][v] = dot_weight<bits>(acc[i][v], column[v], four);
            }
        }
        vf by[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) by[v] = loadf(tile.scales + s * kTileOutputs + v * kFloats);
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < kTileVectors; ++v) {
                if constexpr (planes)
                    total[i][v] += to_float((acc[2 * i][v] << 7) + acc[2 * i + 1][v]) *
                                   (by[v] * many.scales[(line / 2 + i) * cut.segments + s]);
                else
                    total[i][v] += to_float(acc[i][v]) * by[v];
            }
    }
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < kTileVectors; ++v) store(y + i * kTileOutputs + v * kFloats, total[i][v]);
}

template <Way way, int bits, bool planes>
void many_rows(const QbLinear &p) {
    const Cut cut(p, bits == 4);
    const Many many = prepare_many<bits == 4, bits == 4 && way != kLevels ? kBias4 : kBias8, planes>(p, cut);
    constexpr int64_t kRows = planes ? kTileRows / 2 : kTileRows;
    const int64_t tiles = (p.outputs + kTileOutputs - 1) / kTileOutputs, blocks = (p.rows + kRows - 1) / kRows;
    // A tile is laid out once for all rows, unless there are too few tiles to share.
    const int64_t wanted = quamba::threads() == 1 ? 1 : 4 * quamba::threads();
    const int64_t cuts = least(most((wanted + tiles - 1) / tiles, 1), blocks);
    const int64_t depth = (blocks + cuts - 1) / cuts;
    each(tiles * cuts, [&](int64_t part) {
        const int64_t first = part / cuts * kTileOutputs, count = least(kTileOutputs, p.outputs - first);
        Tile tile;
        tile.w = (uint8_t *)quamba::scratch(1, cut.segments * many.steps * 4 * kTileOutputs);
        tile.scales = (float *)quamba::scratch(2, 4 * cut.segments * kTileOutputs);
        lay_out_tile<way, bits>(p, cut, first, tile);
        float y[kRows * kTileOutputs], bias_of[kTileOutputs] = {};
        if (p.bias) __builtin_memcpy(bias_of, p.bias + first, 4 * count);
        float inverses[kTileOutputs];  // of the scales of codes
        const bool codes = p.y.dtype == QB_I8 && p.y.scale_step;
        for (int64_t o = 0; o < count && codes; ++o) inverses[o] = 1.0f / p.y.scale[first + o];
        const float by = !planes && p.x_scale ? *p.x_scale : 1.0f;
        const int64_t begin = part % cuts * depth;
        for (int64_t block = begin; block < least(begin + depth, blocks); ++block) {
            for (int64_t i = 0; i < least(kRows, p.rows - block * kRows); ++i)
                prefetch<1>(p.y, 0, block * kRows + i, first, count);
            outer<way == kLevels ? 8 : bits, planes>(cut, many, tile, block * kTileRows, y);
            for (int64_t i = 0; i < least(kRows, p.rows - block * kRows); ++i) {
                float *out = y + i * kTileOutputs;
                for (int v = 0; v < kTileOutputs; v += kFloats)
                    store(out + v, loadf(out + v) * by + loadf(bias_of + v));
                if (codes && count == kTileOutputs) {
                    int8_t *row = (int8_t *)const_cast<char *>(at(p.y, 0, block * kRows + i)) + first;
                    for (int v = 0; v < kTileOutputs; v += kFloats)
                        narrow_saturated(row + v, quotient(loadf(out + v), loadf(p.y.scale + first + v),
                                                           loadf(inverses + v)));
                } else {
                    write_row(p.y, 0, block * kRows + i, first, count, out);
                }
            }
        }
    });
}

// Float weights.

template <int bits>
QB_INLINE vf weights_at(const char *row, int64_t column, int dtype) {
    if constexpr (bits == 32) return loadf((const float *)row + column);
    const uint16_t *p = (const uint16_t *)row + column;
    return dtype == QB_BF16 ? from_bf16(p) : from_f16(p);
}

// x [rows][padded] float32 with zeros after the columns.
template <int bits, int rows>
void float_outputs(const QbLinear &p, const float *x, int64_t padded, int64_t output, float *y) {
    const char *w = (const char *)p.weight + output * p.columns * (bits / 8);
    constexpr int kChains = rows == 1 ? 4 : rows == 2 ? 2 : 1;
    vf acc[rows][kChains] = {};
    const int64_t whole = p.columns / kFloats * kFloats;
    int64_t k = 0;
    for (; k + kChains * kFloats <= whole; k += kChains * kFloats) {
        __builtin_prefetch(w + (bits / 8) * k + kAhead, 0, 2);
        for (int c = 0; c < kChains; ++c) {
            const vf part = weights_at<bits>(w, k + c * kFloats, p.scale_dtype);
            for (int i = 0; i < rows; ++i) acc[i][c] += part * loadf(x + i * padded + k + c * kFloats);
        }
    }
    for (; k < whole; k += kFloats) {
        const vf part = weights_at<bits>(w, k, p.scale_dtype);
        for (int i = 0; i < rows; ++i) acc[i][0] += part * loadf(x + i * padded + k);
    }
    if (k < p.columns) {
        char end[4 * kFloats] = {};
        __builtin_memcpy(end, w + (bits / 8) * k, (bits / 8) * (p.columns - k));
        const vf part = weights_at<bits>(end, 0, p.scale_dtype);
        for (int i = 0; i < rows; ++i) acc[i][0] += part * loadf(x + i * padded + k);
    }
    for (int i = 0; i < rows; ++i) {
        for (int c = 1; c < kChains; ++c) acc[i][0] += acc[i][c];
        y[i] = sum(acc[i][0]);
    }
}

template <int bits>
void float_rows(const QbLinear &p) {
    const int64_t padded = (p.columns + kFloats - 1) / kFloats * kFloats;
    float *x = (float *)quamba::scratch(4, 4 * p.rows * padded);
    for (int64_t row = 0; row < p.rows; ++row) {
        read_row(x + row * padded, p.x, 0, row, 0, p.columns);
        for (int64_t k = p.columns; k < padded; ++k) x[row * padded + k] = 0;
    }
    const int64_t size = part_size(p.outputs, most(32768 * 8 / bits / p.columns, 1), kFloats);
    each((p.outputs + size - 1) / size, [&](int64_t part) {
        const int64_t first = part * size, count = least(size, p.outputs - first);
        float *out = (float *)quamba::scratch(1, 4 * kMostAtOnce * size);
        for (int64_t row = 0; row < p.rows;) {
            const int64_t rows = p.rows - row >= 4 ? 4 : p.rows - row >= 2 ? 2 : 1;
            const float *in = x + row * padded;
            for (int64_t j = 0; j < count; ++j) {
                float y[kMostAtOnce];
                if (rows == 4)
                    float_outputs<bits, 4>(p, in, padded, first + j, y);
                else if (rows == 2)
                    float_outputs<bits, 2>(p, in, padded, first + j, y);
                else
                    float_outputs<bits, 1>(p, in, padded, first + j, y);
                for (int64_t i = 0; i < rows; ++i) out[i * size + j] = y[i] + (p.bias ? p.bias[first + j] : 0.0f);
            }
            for (int64_t i = 0; i < rows; ++i) write_row(p.y, 0, row + i, first, count, out + i * size);
            row += rows;
        }
    });
}

// Many rows of float32: tiles of w are transposed, [columns][kTileOutputs], and multiplied with kTileRows rows.
void many_float_rows(const QbLinear &p) {
    const int64_t tiles = (p.outputs + kTileOutputs - 1) / kTileOutputs, blocks = (p.rows + kTileRows - 1) / kTileRows;
    const int64_t wanted = quamba::threads() == 1 ? 1 : 4 * quamba::threads();
    const int64_t cuts = least(most((wanted + tiles - 1) / tiles, 1), blocks);
    const int64_t depth = (blocks + cuts - 1) / cuts;
    const float *x = (const float *)p.x.data;
    each(tiles * cuts, [&](int64_t part) {
        const int64_t first = part / cuts * kTileOutputs, count = least(kTileOutputs, p.outputs - first);
        float *w = (float *)quamba::scratch(1, 4 * p.columns * kTileOutputs);
        for (int64_t v = 0; v < kTileVectors; ++v)
            for (int64_t k = 0; k < p.columns; k += kFloats) {
                vf rows[kFloats] = {};
                const int64_t here = least(kFloats, p.columns - k);
                for (int64_t o = 0; o < least(kFloats, count - v * kFloats); ++o)
                    rows[o] = load_upto((const float *)p.weight + (first + v * kFloats + o) * p.columns + k, here);
                transpose(rows);
                for (int64_t i = 0; i < here; ++i) store(w + (k + i) * kTileOutputs + v * kFloats, rows[i]);
            }
        float y[kTileRows * kTileOutputs], bias_of[kTileOutputs] = {};
        if (p.bias) __builtin_memcpy(bias_of, p.bias + first, 4 * count);
        const int64_t begin = part % cuts * depth;
        for (int64_t block = begin; block < least(begin + depth, blocks); ++block) {
            const int64_t here = least(kTileRows, p.rows - block * kTileRows);
            const float *in[kTileRows];  // of rows that are not there the last one, again
            for (int64_t i = 0; i < kTileRows; ++i)
                in[i] = x + (block * kTileRows + least(i, here - 1)) * p.x.token_stride;
            vf acc[kTileRows][kTileVectors];
            for (int i = 0; i < kTileRows; ++i)
                for (int v = 0; v < kTileVectors; ++v) acc[i][v] = loadf(bias_of + v * kFloats);
            for (int64_t k = 0; k < p.columns; ++k) {
                vf column[kTileVectors];
                for (int v = 0; v < kTileVectors; ++v) column[v] = loadf(w + k * kTileOutputs + v * kFloats);
                for (int i = 0; i < kTileRows; ++i) {
                    const vf one = splat(in[i][k]);
                    for (int v = 0; v < kTileVectors; ++v) acc[i][v] += one * column[v];
                }
            }
            for (int64_t i = 0; i < here; ++i) {
                for (int v = 0; v < kTileVectors; ++v) store(y + v * kFloats, acc[i][v]);
                write_row(p.y, 0, block * kTileRows + i, first, count, y);
            }
        }
    });
}

template <Way way, int bits, bool planes>
void product(const QbLinear &p) {
    p.rows < kManyRows ? few_rows<way, bits, planes>(p) : many_rows<way, bits, planes>(p);
}

}  // namespace

void linear(const void *args) {
    const QbLinear &p = *(const QbLinear *)args;
    const bool planes = p.x.dtype != QB_I8;
    if (p.rows == 0) return;
    if (p.bits == 32)
        p.rows < kManyRows || p.x.dtype != QB_F32 ? float_rows<32>(p) : many_float_rows(p);
    else if (p.bits == 16)
        float_rows<16>(p);
    else if (p.channel_scale)
        planes ? product<kLevels, 4, true>(p) : product<kLevels, 4, false>(p);
    else if (p.row_unit && !planes && p.rows >= kManyRows) {
        // The integers of a row have one scale, as those of two levels have: no sum becomes a float before its end.
        QbLinear whole = p;
        whole.channel_scale = p.row_unit;
        many_rows<kLevels, 4, false>(whole);
    } else if (p.bits == 4)
        planes ? product<kGroups, 4, true>(p) : product<kGroups, 4, false>(p);
    else if (planes)
        product<kGroups, 8, true>(p);
    else
        p.groups == 1 ? product<kWhole, 8, false>(p) : product<kGroups, 8, false>(p);
}

}  // namespace QB_ISA
