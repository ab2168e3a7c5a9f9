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

// How the columns are cut: groups of weights, in them segments after which sums become floats.
struct Cut {
    int64_t columns, groups, group, segments, per_group;

    explicit Cut(const QbLinear &p) : columns(p.columns) {
        // With two levels of scales, a row's integers are summed without scales in between.
        groups = p.channel_scale ? 1 : p.groups;
        group = columns / groups;
        per_group = p.x.dtype == QB_I8 ? 1 : (group + kFloatSegment - 1) / kFloatSegment;
        segments = groups * per_group;
    }
    int64_t first(int64_t s) const { return s / per_group * group + s % per_group * kFloatSegment; }
    int64_t size(int64_t s) const {
        return per_group == 1 ? group : least(kFloatSegment, group - s % per_group * kFloatSegment);
    }
};

QB_INLINE float scale_at(const QbLinear &p, int64_t output, int64_t g) {
    const int64_t i = (p.scale_rows == 1 ? 0 : output * p.groups) + g;
    return p.scale_dtype == QB_F32 ? ((const float *)p.scale)[i] : f16_value(((const uint16_t *)p.scale)[i]);
}

// What a sum of segment s of an output is multiplied with, but for the scale of x.
QB_INLINE float sum_scale(const QbLinear &p, const Cut &cut, int64_t output, int64_t s) {
    return p.channel_scale ? p.channel_scale[output] : scale_at(p, output, s / cut.per_group);
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

// Few rows.

// Each segment is padded with zeros to whole vectors. For 4 bits a pair of vectors holds the even and the odd columns.
struct Few {
    int64_t rows, planes, blocks;  // blocks of a segment
    int64_t block;                 // columns of one
    int8_t *x;                     // [rows * planes][segments][blocks][block]
    vi *begin;                     // [rows * planes][segments], minus the bias times the sums of x
    float *scales;                 // [rows][segments], of floats
};

template <bool nibbles, int bias>
Few prepare_few(const QbLinear &p, const Cut &cut) {
    Few few;
    few.rows = p.rows;
    few.planes = p.x.dtype == QB_I8 ? 1 : 2;
    few.block = nibbles ? 2 * kBytes : kBytes;
    few.blocks = (cut.size(0) + few.block - 1) / few.block;
    const int64_t lines = few.rows * few.planes, line = cut.segments * few.blocks * few.block;
    few.x = (int8_t *)quamba::scratch(4, lines * line);
    few.begin = (vi *)quamba::scratch(5, lines * cut.segments * (int64_t)sizeof(vi));
    few.scales = (float *)quamba::scratch(6, 4 * few.rows * cut.segments);
    int8_t *plain = (int8_t *)quamba::scratch(7, 2 * cut.columns);
    for (int64_t row = 0; row < few.rows; ++row) {
        const int8_t *planes[2] = {plain, plain + cut.columns};
        if (few.planes == 1)
            planes[0] = (const int8_t *)at(p.x, 0, row);
        else
            split_row(p, cut, row, plain, plain + cut.columns, few.scales + row * cut.segments);
        for (int64_t plane = 0; plane < few.planes; ++plane) {
            const int64_t number = row * few.planes + plane;
            int8_t *out = few.x + number * line;
            for (int64_t s = 0; s < cut.segments; ++s) {
                const int8_t *in = planes[plane] + cut.first(s);
                const int64_t size = cut.size(s);
                vi acc = {};
                for (int64_t b = 0; b < few.blocks; ++b, out += few.block) {
                    const int64_t left = size - b * few.block;
                    for (int64_t i = 0; i < few.block; ++i) {
                        const int64_t column = nibbles ? 2 * (i % kBytes) + i / kBytes : i;
                        out[i] = column < left ? in[b * few.block + column] : 0;
                    }
                    for (int64_t v = 0; v < few.block; v += kBytes)
                        acc = dot(acc, (vu)(vb{} + (int8_t)bias), load<vb>(out + v));
                }
                few.begin[number * cut.segments + s] = -acc;
            }
        }
    }
    return few;
}

QB_INLINE vu biased8(vu w) { return kBias8 ? w ^ (vu)(vb{} + (int8_t)-128) : w; }

// The integers of two levels, by nibble: round(scale * code) + bias in each of sixteen places.
struct Levels {
    alignas(16) uint8_t integers[16];

    void fill(float scale) {
        for (int v = 0; v < 16; ++v) {
            const float w = __builtin_rintf(scale * (float)(v < 8 ? v : v - 16));
            integers[v] = (uint8_t)((int)least(most(w, -128.0f), 127.0f) + kBias8);
        }
    }
};

QB_INLINE vu look_up(const Levels &levels, vu nibbles) {
#if defined(__AVX512F__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)levels.integers));
    return (vu)_mm512_shuffle_epi8(table, (__m512i)nibbles);
#elif defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)levels.integers));
    return (vu)_mm256_shuffle_epi8(table, (__m256i)nibbles);
#else
    return (vu)vqtbl1q_u8(vld1q_u8(levels.integers), (uint8x16_t)nibbles);
#endif
}

// Sums of one row of w with `lines` lines of x (rows, or two planes of each), floats but for the scale of integers.
template <int bits, int lines, bool planes>
QB_INLINE void few_outputs(const QbLinear &p, const Cut &cut, const Few &few, int64_t output, int64_t first_line,
                           bool at_end, float *y) {
    const int64_t row_bytes = bits == 4 ? cut.columns / 2 : cut.columns;
    const uint8_t *w = (const uint8_t *)p.weight + output * row_bytes;
    const uint8_t *end = (const uint8_t *)p.weight + p.outputs * row_bytes;
    const int64_t line = cut.segments * few.blocks * few.block;
    const int8_t *x = few.x + first_line * line;
    const vi *begin = few.begin + first_line * cut.segments;
    constexpr int rows = planes ? lines / 2 : lines;
    const float *x_scales = few.scales + first_line / 2 * cut.segments;
    vf total[rows] = {};
    for (int64_t s = 0; s < cut.segments; ++s) {
        vi acc[lines];
        for (int i = 0; i < lines; ++i) acc[i] = begin[i * cut.segments + s];
        const uint8_t *part = w + (bits == 4 ? cut.first(s) / 2 : cut.first(s));
        for (int64_t b = 0; b < few.blocks; ++b, part += kBytes) {
            const int8_t *block = x + (s * few.blocks + b) * few.block;
            vu raw;
            if (at_end && part + kBytes > end) {
                raw = vu{};
                __builtin_memcpy(&raw, part, end > part ? end - part : 0);
            } else {
                raw = load<vu>(part);
                __builtin_prefetch(part + 2048);
            }
            if constexpr (bits == 4) {
                raw ^= 0x88;
                typedef uint16_t vs __attribute__((vector_size(kBytes)));
                const vu even = raw & 0x0f, odd = (vu)((vs)raw >> 4) & 0x0f;
                for (int i = 0; i < lines; ++i) {
                    acc[i] = dot_small(acc[i], even, load<vb>(block + i * line));
                    acc[i] = dot_small(acc[i], odd, load<vb>(block + i * line + kBytes));
                }
            } else {
                const vu even = biased8(raw);
                for (int i = 0; i < lines; ++i)
                    acc[i] = dot_weight<8>(acc[i], even, load<vb>(block + i * line));
            }
        }
        const float by = sum_scale(p, cut, output, s);
        for (int i = 0; i < rows; ++i) {
            if constexpr (planes)
                total[i] += to_float((acc[2 * i] << 7) + acc[2 * i + 1]) * (by * x_scales[i * cut.segments + s]);
            else
                total[i] += to_float(acc[i]) * by;
        }
    }
    for (int i = 0; i < rows; ++i) y[i] = sum(total[i]);
}

// One scale a row and integer inputs: the sum stays an integer to its end, as the definition has it.
template <int lines>
QB_INLINE void few_outputs_whole(const QbLinear &p, const Cut &cut, const Few &few, int64_t output,
                                 int64_t first_line, bool at_end, float *y) {
    const uint8_t *w = (const uint8_t *)p.weight + output * cut.columns;
    const uint8_t *end = (const uint8_t *)p.weight + p.outputs * cut.columns;
    const int64_t line = few.blocks * few.block;
    const int8_t *x = few.x + first_line * line;
    vi acc[lines], more[lines] = {};
    for (int i = 0; i < lines; ++i) acc[i] = few.begin[first_line + i];
    int64_t b = 0;
    const int64_t whole = at_end ? least(few.blocks, (end - w) / kBytes) : few.blocks;
    for (; b + 2 <= whole; b += 2) {
        const vu even = biased8(load<vu>(w + b * kBytes)), odd = biased8(load<vu>(w + (b + 1) * kBytes));
        __builtin_prefetch(w + b * kBytes + 4096);
        __builtin_prefetch(w + b * kBytes + 4096 + kBytes);
        for (int i = 0; i < lines; ++i) {
            acc[i] = dot_weight<8>(acc[i], even, load<vb>(x + i * line + b * kBytes));
            more[i] = dot_weight<8>(more[i], odd, load<vb>(x + i * line + (b + 1) * kBytes));
        }
    }
    for (; b < few.blocks; ++b) {
        vu raw = {};
        const int64_t left = end - (w + b * kBytes);
        __builtin_memcpy(&raw, w + b * kBytes, least(most(left, 0), kBytes));
        raw = biased8(raw);
        for (int i = 0; i < lines; ++i) acc[i] = dot_weight<8>(acc[i], raw, load<vb>(x + i * line + b * kBytes));
    }
    const float by = sum_scale(p, cut, output, 0);
    for (int i = 0; i < lines; ++i) y[i] = (float)sum(acc[i] + more[i]) * by;
}

// Two levels of scales: the integers of a row are looked up by nibble, group by group.
template <int lines, bool planes>
QB_INLINE void few_outputs_levels(const QbLinear &p, const Cut &cut, const Few &few, int64_t output,
                                  int64_t first_line, bool at_end, float *y) {
    const int64_t row_bytes = cut.columns / 2, line = cut.segments * few.blocks * few.block;
    const uint8_t *w = (const uint8_t *)p.weight + output * row_bytes;
    const uint8_t *end = (const uint8_t *)p.weight + p.outputs * row_bytes;
    const int64_t level = cut.columns / p.groups;
    constexpr int rows = planes ? lines / 2 : lines;
    vf total[rows] = {};
    Levels levels;
    int64_t filled = -1;
    for (int64_t s = 0; s < cut.segments; ++s) {
        vi acc[lines];
        for (int i = 0; i < lines; ++i) acc[i] = few.begin[(first_line + i) * cut.segments + s];
        for (int64_t b = 0; b < few.blocks; ++b) {
            const int64_t first = cut.first(s) + b * few.block;
            if (first >= cut.columns) break;
            const uint8_t *part = w + first / 2;
            if (first / level != filled) {
                filled = first / level;
                levels.fill(scale_at(p, output, filled));
            }
            vu raw = {};
            if (at_end && part + kBytes > end)
                __builtin_memcpy(&raw, part, end - part);
            else
                raw = load<vu>(part);
            typedef uint16_t vs __attribute__((vector_size(kBytes)));
            const vu even = look_up(levels, raw & 0x0f), odd = look_up(levels, (vu)((vs)raw >> 4) & 0x0f);
            for (int i = 0; i < lines; ++i) {
                const int8_t *block = few.x + (first_line + i) * line + (s * few.blocks + b) * few.block;
                acc[i] = dot_weight<8>(acc[i], even, load<vb>(block));
                acc[i] = dot_weight<8>(acc[i], odd, load<vb>(block + kBytes));
            }
        }
        const float by = p.channel_scale[output];
        for (int i = 0; i < rows; ++i) {
            const float *x_scale = few.scales + (first_line / 2 + i) * cut.segments + s;
            if constexpr (planes)
                total[i] += to_float((acc[2 * i] << 7) + acc[2 * i + 1]) * (by * *x_scale);
            else
                total[i][0] += (float)sum(acc[i]) * by;
        }
    }
    for (int i = 0; i < rows; ++i) y[i] = planes ? sum(total[i]) : total[i][0];
}

enum Way { kGroups, kWhole, kLevels };

template <Way way, int bits, int rows, bool planes>
void few_part(const QbLinear &p, const Cut &cut, const Few &few, int64_t first, int64_t last, int64_t row,
              float *out, int64_t stride) {
    constexpr int lines = planes ? 2 * rows : rows;
    for (int64_t output = first; output < last; ++output) {
        float y[rows];
        // Vectors reach beyond a row, but not beyond the last one.
        const bool at_end = (p.outputs - output - 1) * (bits == 4 ? cut.columns / 2 : cut.columns) < 256;
        if constexpr (way == kWhole)
            few_outputs_whole<lines>(p, cut, few, output, row, at_end, y);
        else if constexpr (way == kLevels)
            few_outputs_levels<lines, planes>(p, cut, few, output, row * few.planes, at_end, y);
        else
            few_outputs<bits, lines, planes>(p, cut, few, output, row * few.planes, at_end, y);
        const float by = !planes && p.x_scale ? *p.x_scale : 1.0f;
        for (int i = 0; i < rows; ++i) out[i * stride + output - first] = y[i] * by;
    }
}

template <Way way, int bits, bool planes>
void few_rows(const QbLinear &p, const Cut &cut) {
    const Few few = prepare_few<bits == 4, bits == 4 && way != kLevels ? kBias4 : kBias8>(p, cut);
    // 32 KiB of weights are a microsecond of memory: enough to be worth a part.
    const int64_t size = part_size(p.outputs, most(32768 * 8 / bits / cut.columns, 1), kFloats);
    each((p.outputs + size - 1) / size, [&](int64_t part) {
        const int64_t first = part * size, last = least(first + size, p.outputs), count = last - first;
        float *out = (float *)quamba::scratch(1, 4 * kMostAtOnce * size);
        for (int64_t row = 0; row < p.rows;) {
            const int64_t rows = least(p.rows - row, planes ? 2 : kMostAtOnce);
            if (rows >= 4 && !planes)
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

// A tile of w for outer products: [segments][steps of 4 columns][kTileOutputs][4] biased bytes.
struct Tile {
    uint8_t *w;
    float *scales;  // [segments][kTileOutputs]
};

struct Many {
    int64_t lines, planes, steps, line;  // steps of 4 columns of a segment; bytes of a line of x
    int8_t *x;                           // [lines][segments][steps][4]; planes of a row are neighbours
    int32_t *begin;                      // [lines][segments]
    float *scales;                       // [rows][segments]
};

template <int bias>
Many prepare_many(const QbLinear &p, const Cut &cut) {
    Many many;
    many.planes = p.x.dtype == QB_I8 ? 1 : 2;
    many.lines = p.rows * many.planes;
    many.steps = (cut.size(0) + 3) / 4;
    many.line = cut.segments * many.steps * 4;
    // A tile reads kTileRows lines, the last one whole.
    const int64_t lines = (many.lines + kTileRows - 1) / kTileRows * kTileRows;
    many.x = (int8_t *)quamba::scratch(4, lines * many.line);
    many.begin = (int32_t *)quamba::scratch(5, 4 * lines * cut.segments);
    many.scales = (float *)quamba::scratch(6, 4 * lines * cut.segments);
    for (int64_t i = many.lines; i < lines; ++i) {
        __builtin_memset(many.x + i * many.line, 0, many.line);
        __builtin_memset(many.begin + i * cut.segments, 0, 4 * cut.segments);
    }
    const bool padded = many.line != cut.columns;
    const int64_t rows = 8;
    each((p.rows + rows - 1) / rows, [&](int64_t part) {
        int8_t *plain = (int8_t *)quamba::scratch(1, 2 * cut.columns + 2 * kBytes);
        for (int64_t row = part * rows; row < least((part + 1) * rows, p.rows); ++row) {
            const int8_t *planes[2] = {plain, plain + cut.columns};
            if (many.planes == 1)
                planes[0] = (const int8_t *)at(p.x, 0, row);
            else
                split_row(p, cut, row, plain, plain + cut.columns, many.scales + row * cut.segments);
            for (int64_t plane = 0; plane < many.planes; ++plane) {
                const int64_t number = row * many.planes + plane;
                int8_t *out = many.x + number * many.line;
                for (int64_t s = 0; s < cut.segments; ++s, out += 4 * many.steps) {
                    const int64_t size = cut.size(s);
                    __builtin_memcpy(out, planes[plane] + cut.first(s), size);
                    if (padded) __builtin_memset(out + size, 0, 4 * many.steps - size);
                    int32_t sum = 0;
                    for (int64_t i = 0; i < size; ++i) sum += out[i];
                    many.begin[number * cut.segments + s] = -bias * sum;
                }
            }
        }
    });
    return many;
}

// Codes of columns [first, first + count) of a row of w, biased; count <= kFloatSegment or any for bytes.
template <Way way, int bits>
QB_INLINE void read_weights(const QbLinear &p, int64_t output, int64_t first, int64_t count, uint8_t *out) {
    if constexpr (bits == 8) {
        const uint8_t *in = (const uint8_t *)p.weight + output * p.columns + first;
        for (int64_t i = 0; i < count; ++i) out[i] = in[i] ^ (uint8_t)kBias8;
    } else {
        const uint8_t *in = (const uint8_t *)p.weight + (output * p.columns + first) / 2;
        if constexpr (way == kLevels) {
            const int64_t level = p.columns / p.groups;
            Levels levels;
            for (int64_t i = 0; i < count;) {
                levels.fill(scale_at(p, output, (first + i) / level));
                const int64_t end = least(count, ((first + i) / level + 1) * level - first);
                for (; i < end; i += 2) {
                    out[i] = levels.integers[in[i / 2] & 15];
                    out[i + 1] = levels.integers[in[i / 2] >> 4];
                }
            }
        } else {
            for (int64_t i = 0; i < count / 2; ++i) {
                const uint8_t both = in[i] ^ 0x88;
                out[2 * i] = both & 15;
                out[2 * i + 1] = both >> 4;
            }
        }
    }
}

template <Way way, int bits>
void lay_out(const QbLinear &p, const Cut &cut, const Many &many, int64_t first_output, Tile &tile) {
    const int64_t count = least(kTileOutputs, p.outputs - first_output);
    uint8_t *line = (uint8_t *)quamba::scratch(0, many.steps * 4 + kBytes);
    for (int64_t s = 0; s < cut.segments; ++s) {
        uint32_t *out = (uint32_t *)(tile.w + s * many.steps * 4 * kTileOutputs);
        for (int64_t o = 0; o < kTileOutputs; ++o) {
            if (o >= count) {
                for (int64_t k = 0; k < many.steps; ++k) out[k * kTileOutputs + o] = 0;
                tile.scales[s * kTileOutputs + o] = 0;
                continue;
            }
            tile.scales[s * kTileOutputs + o] = sum_scale(p, cut, first_output + o, s);
            const int64_t size = cut.size(s);
            read_weights<way, bits>(p, first_output + o, cut.first(s), size, line);
            for (int64_t i = size; i < 4 * many.steps; ++i) line[i] = 0;
            for (int64_t k = 0; k < many.steps; ++k) {
                uint32_t four;
                __builtin_memcpy(&four, line + 4 * k, 4);
                out[k * kTileOutputs + o] = four;
            }
        }
    }
}

// y [kTileRows][kTileOutputs] of kTileRows lines of x and a tile.
template <int bits, bool planes>
QB_INLINE void outer(const Cut &cut, const Many &many, const Tile &tile, int64_t line, float *y) {
    const int8_t *x = many.x + line * many.line;
    const int32_t *begin = many.begin + line * cut.segments;
    vf total[planes ? kTileRows / 2 : kTileRows][kTileVectors];
    for (int64_t s = 0; s < cut.segments; ++s) {
        const uint8_t *w = tile.w + s * many.steps * 4 * kTileOutputs;
        const int8_t *in = x + s * many.steps * 4;
        vi acc[kTileRows][kTileVectors];
        for (int i = 0; i < kTileRows; ++i)
            for (int v = 0; v < kTileVectors; ++v) acc[i][v] = spliti(begin[i * cut.segments + s]);
        for (int64_t k = 0; k < many.steps; ++k) {
            vu column[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) column[v] = load<vu>(w + (k * kTileVectors + v) * kBytes);
            for (int i = 0; i < kTileRows; ++i) {
                const vb four = splat4(in + i * many.line + 4 * k);
                for (int v = 0; v < kTileVectors; ++v) acc[i][v] = dot_weight<bits>(acc[i][v], column[v], four);
            }
        }
        vf by[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) by[v] = loadf(tile.scales + s * kTileOutputs + v * kFloats);
        if constexpr (planes) {
            for (int i = 0; i < kTileRows / 2; ++i) {
                const float x_scale = many.scales[(line / 2 + i) * cut.segments + s];
                for (int v = 0; v < kTileVectors; ++v) {
                    const vf part = to_float((acc[2 * i][v] << 7) + acc[2 * i + 1][v]) * (by[v] * x_scale);
                    total[i][v] = s ? total[i][v] + part : part;
                }
            }
        } else {
            for (int i = 0; i < kTileRows; ++i)
                for (int v = 0; v < kTileVectors; ++v) {
                    const vf part = to_float(acc[i][v]) * by[v];
                    total[i][v] = s ? total[i][v] + part : part;
                }
        }
    }
    for (int i = 0; i < (planes ? kTileRows / 2 : kTileRows); ++i)
        for (int v = 0; v < kTileVectors; ++v) store(y + i * kTileOutputs + v * kFloats, total[i][v]);
}

template <Way way, int bits, bool planes>
void many_rows(const QbLinear &p, const Cut &cut) {
    constexpr int bias = bits == 4 && way != kLevels ? kBias4 : kBias8;
    const Many many = prepare_many<bias>(p, cut);
    const int64_t tiles = (p.outputs + kTileOutputs - 1) / kTileOutputs;
    const int64_t blocks = (many.lines + kTileRows - 1) / kTileRows;
    // A tile is laid out once for all rows, unless there are too few tiles to share.
    const int64_t wanted = quamba::threads() == 1 ? 1 : 4 * quamba::threads();
    const int64_t cuts = least(most((wanted + tiles - 1) / tiles, 1), blocks);
    const int64_t depth = (blocks + cuts - 1) / cuts;
    each(tiles * cuts, [&](int64_t part) {
        const int64_t first = part / cuts * kTileOutputs, count = least(kTileOutputs, p.outputs - first);
        Tile tile;
        tile.w = (uint8_t *)quamba::scratch(1, cut.segments * many.steps * 4 * kTileOutputs);
        tile.scales = (float *)quamba::scratch(2, 4 * cut.segments * kTileOutputs);
        lay_out<way, bits>(p, cut, many, first, tile);
        float y[kTileRows * kTileOutputs], bias_of[kTileOutputs] = {};
        if (p.bias) __builtin_memcpy(bias_of, p.bias + first, 4 * count);
        const float by = !planes && p.x_scale ? *p.x_scale : 1.0f;
        const int64_t begin = part % cuts * depth;
        for (int64_t block = begin; block < least(begin + depth, blocks); ++block) {
            outer<way == kLevels ? 8 : bits, planes>(cut, many, tile, block * kTileRows, y);
            const int64_t per_block = planes ? kTileRows / 2 : kTileRows, row = block * per_block;
            for (int64_t i = 0; i < least(per_block, p.rows - row); ++i) {
                float *out = y + i * kTileOutputs;
                for (int v = 0; v < kTileOutputs; v += kFloats)
                    store(out + v, loadf(out + v) * by + loadf(bias_of + v));
                write_row(p.y, 0, row + i, first, count, out);
            }
        }
    });
}

// Float weights, few rows: many are left to the libraries of torch.

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
        __builtin_prefetch(w + (bits / 8) * k + 4096);
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

template <Way way, int bits, bool planes>
void product(const QbLinear &p) {
    const Cut cut(p);
    p.rows < kManyRows ? few_rows<way, bits, planes>(p, cut) : many_rows<way, bits, planes>(p, cut);
}

}  // namespace

void linear(const void *args) {
    const QbLinear &p = *(const QbLinear *)args;
    const bool planes = p.x.dtype != QB_I8;
    if (p.rows == 0) return;
    if (p.bits == 32)
        float_rows<32>(p);
    else if (p.bits == 16)
        float_rows<16>(p);
    else if (p.channel_scale)
        planes ? product<kLevels, 4, true>(p) : product<kLevels, 4, false>(p);
    else if (p.bits == 4)
        planes ? product<kGroups, 4, true>(p) : product<kGroups, 4, false>(p);
    else if (planes)
        product<kGroups, 8, true>(p);
    else
        p.groups == 1 ? product<kWhole, 8, false>(p) : product<kGroups, 8, false>(p);
}

}  // namespace QB_ISA
