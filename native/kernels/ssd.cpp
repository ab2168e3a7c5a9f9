// Mamba2's scan. Prompts go in chunks (Mamba2 paper, section 6): inside a chunk a masked matrix product, between
// chunks the recurrence. Single tokens read and write the state once.
//
// All products are of one kind: a register tile of kRows x 2 vectors, one matrix with its columns next to each other
// in memory, numbers of the other one by one. The state of a head is worked on as [panel][d_state][2 vectors of
// headdim], so that the products with C, with x and the update all write or read whole vectors of headdim.
//
// Where B and C are codes, what the state gives the outputs and what the tokens leave in it are products of bytes
// (ssd_codes.h).
#include "simd.h"
#include "ssd_codes.h"

namespace QB_ISA {
namespace {

// 2 vectors of sums a row, what they are multiplied with, and one number fit the registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kRows = 6;
#else
constexpr int kRows = 12;
#endif
constexpr int kPanel = 2;
constexpr int64_t kWide = kPanel * kFloats;
constexpr int64_t kChunk = 48;  // of kRows and kFloats a multiple
// Chunks whose B and C are kept as floats at a time.
constexpr int64_t kSlab = 8;
static_assert(kPanel == kSplitVectors && kChunk % 4 == 0, "products of codes have the same panels");

struct Sizes {
    int64_t heads, headdim, groups, d_state;
    int64_t panels, width;  // width: headdim, in whole panels
    int64_t b_row;          // of B as floats
    bool codes;             // whether the products with B and C are of codes
    int64_t code_row;       // of C as codes
    int64_t code_at;        // of codes among the floats of a group and chunk
    int64_t group_floats;   // of a group and chunk: C, B and C B^T, and codes of C and B^T
    int64_t state_floats;   // of a head
    int64_t split_floats;   // of as many numbers of a panel's columns as states or tokens of a chunk

    explicit Sizes(const QbSsd &op)
        : heads(op.heads), headdim(op.headdim), groups(op.groups), d_state(op.d_state) {
        panels = (headdim + kWide - 1) / kWide;
        width = panels * kWide;
        b_row = (d_state + 15) / 16 * 16 + 16;  // not a power of two: rows would share sets of the L1 cache
        code_at = kChunk * d_state + kChunk * b_row + kChunk * kChunk;
        code_at = (code_at + 15) / 16 * 16 + kFloats;  // the last row may be read a vector too far
        // Sums of up to 256 products of 16 bits and codes fit 32. A few tokens are not worth splitting a state.
        codes = kCodeProducts && op.B.dtype == QB_I8 && op.C.dtype == QB_I8 && d_state <= 256 && op.length >= 16;
        code_row = (d_state + 3) / 4 * 4;
        group_floats = code_at + (codes ? (kChunk * code_row + d_state * kChunk) / 2 : 0);
        group_floats = (group_floats + 15) / 16 * 16;
        state_floats = panels * d_state * kWide;
        split_floats = codes ? Split::vectors(most(d_state, kChunk)) * kFloats : 0;
    }
};

template <int R>
struct Rows {
    static constexpr int count = R;
};

/// Calls tile(Rows<R>, first) for tiles that cover count rows.
template <class Tile>
QB_INLINE void tiles(int64_t count, const Tile &tile) {
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) tile(Rows<kRows>(), i);
    for (; i + 4 <= count; i += 4) tile(Rows<4>(), i);
    for (; i < count; ++i) tile(Rows<1>(), i);
}

/// acc[r] += sum over k < count of a[r * A_ROW + k * a_step] * b[k * b_step, vectors next to each other]
template <int R, int V, int A_ROW>
QB_INLINE void multiply(vf (&acc)[R][V], const float *a, int64_t a_step, const float *b, int64_t b_step,
                        int64_t count) {
    for (int64_t k = 0; k < count; ++k, a += a_step, b += b_step) {
        vf column[V];
        for (int v = 0; v < V; ++v) column[v] = loadf(b + v * kFloats);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = splat(a[r * A_ROW]) * column[v] + acc[r][v];
    }
}

#if defined(__clang__)
template <int kHalf>
QB_INLINE vf zip(vf a, vf b) {
    vf r;
    for (int i = 0; i < kFloats; ++i) r[i] = i % 2 ? b[kHalf + i / 2] : a[kHalf + i / 2];
    return r;
}
#else
template <int kHalf>
QB_INLINE vf zip(vf a, vf b) {
    return __builtin_shuffle(a, b, kHalf + lanes() / 2 + lanes() % 2 * kFloats);
}
#endif

/// kFloats rows at `in` become columns at `out`.
QB_INLINE void transpose(const float *in, int64_t in_row, float *out, int64_t out_row, int64_t out_rows) {
    vf v[kFloats], w[kFloats];
    QB_UNROLL
    for (int i = 0; i < kFloats; ++i) v[i] = loadf(in + i * in_row);
    QB_UNROLL
    for (int width = 1; width < kFloats; width *= 2) {
        QB_UNROLL
        for (int i = 0; i < kFloats / 2; ++i) {
            w[2 * i] = zip<0>(v[i], v[i + kFloats / 2]);
            w[2 * i + 1] = zip<kFloats / 2>(v[i], v[i + kFloats / 2]);
        }
        QB_UNROLL
        for (int i = 0; i < kFloats; ++i) v[i] = w[i];
    }
    if (out_rows >= kFloats) {
        QB_UNROLL
        for (int i = 0; i < kFloats; ++i) store(out + i * out_row, v[i]);
    } else {
        for (int i = 0; i < out_rows; ++i) store(out + i * out_row, v[i]);
    }
}

// What all heads of a group share, of one chunk: C [tile][d_state][rows of the tile], B [token][b_row],
// and C B^T [token][kChunk] up to the diagonal. Codes, if these are multiplied: C [token][code_row] and B^T
// [d_state][kChunk], each twice, as multiply_codes() wants them.
struct Shared {
    const float *C, *B, *mix;
    const int8_t *C_codes, *B_codes;
};

QB_INLINE Shared shared_at(const Sizes &s, const float *memory) {
    const int8_t *codes = (const int8_t *)(memory + s.code_at);
    return {memory, memory + kChunk * s.d_state, memory + kChunk * s.d_state + kChunk * s.b_row, codes,
            codes + 2 * kChunk * s.code_row};
}

void share_codes(const QbSsd &op, const Sizes &s, int64_t b, int64_t g, int64_t start, int64_t count, int8_t *C) {
    const int64_t N = s.d_state, words = s.code_row / 4, steps = kChunk / 4;
    const int64_t C_size = kChunk * s.code_row, B_size = N * kChunk;
    int8_t *B = C + 2 * C_size;
    // Four rows of B, filled up with zeros, as words of a state each, before they change places.
    int8_t *rows = (int8_t *)quamba::scratch(1, 8 * s.code_row);
    uint32_t *column = (uint32_t *)(rows + 4 * s.code_row);
    __builtin_memset(C, 0, (size_t)C_size);
    for (int64_t j = 0; j < count; ++j) {
        __builtin_memcpy(C + j * s.code_row, (const int8_t *)at(op.C, b, start + j) + g * N, (size_t)N);
        place_words((uint32_t *)(C + j * s.code_row), words);
    }
    for (int64_t step = 0; step < steps; ++step) {
        __builtin_memset(rows, 0, (size_t)(4 * s.code_row));
        for (int64_t i = 0; i < least(4, count - 4 * step); ++i)
            __builtin_memcpy(rows + place(i) * s.code_row,
                             (const int8_t *)at(op.B, b, start + 4 * step + i) + g * N, (size_t)N);
        const uint8_t *r0 = (const uint8_t *)rows, *r1 = r0 + s.code_row, *r2 = r1 + s.code_row, *r3 = r2 + s.code_row;
        for (int64_t n = 0; n < N; ++n)
            column[n] = r0[n] | (uint32_t)r1[n] << 8 | (uint32_t)r2[n] << 16 | (uint32_t)r3[n] << 24;
        for (int64_t n = 0; n < N; ++n) ((uint32_t *)B)[n * steps + step] = column[n];
    }
    for (int64_t i = 0; i < C_size; ++i) C[C_size + i] = (int8_t)(C[i] ^ -128);
    for (int64_t i = 0; i < B_size; ++i) B[B_size + i] = (int8_t)(B[i] ^ -128);
}

void share(const QbSsd &op, const Sizes &s, int64_t b, int64_t g, int64_t start, int64_t count, float *memory) {
    float *C = memory, *B = C + kChunk * s.d_state, *mix = B + kChunk * s.b_row;
    const int64_t rows = kChunk + kFloats, N = s.d_state;  // tiles are transposed by whole vectors of rows
    float *own_rows = (float *)quamba::scratch(0, 4 * (rows * s.b_row + N * kChunk));
    float *across = own_rows + rows * s.b_row;  // B^T
    for (int64_t j = 0; j < count; ++j) read_row(own_rows + j * s.b_row, op.C, b, start + j, g * N, N);
    // What is written of C beyond a tile's rows, the next row, the next tile and at last B write over.
    tiles(count, [&](auto tile, int64_t first) {
        constexpr int R = decltype(tile)::count;
        for (int64_t n = 0; n < N; n += kFloats)
            for (int r = 0; r < R; r += kFloats)
                transpose(own_rows + (first + r) * s.b_row + n, s.b_row, C + first * N + n * R + r, R, N - n);
    });
    for (int64_t j = 0; j < count; ++j) read_row(B + j * s.b_row, op.B, b, start + j, g * N, N);
    for (int64_t j = count; j < kChunk; ++j) __builtin_memset(B + j * s.b_row, 0, (size_t)(4 * N));
    for (int64_t j = 0; j < kChunk; j += kFloats)
        for (int64_t n = 0; n < N; n += kFloats)
            transpose(B + j * s.b_row + n, s.b_row, across + n * kChunk + j, kChunk, N - n);
    tiles(count, [&](auto tile, int64_t first) {
        constexpr int R = decltype(tile)::count;
        const float *own = C + first * N;
        for (int64_t j = 0; j < first + R; j += kFloats) {
            vf acc[R][1] = {};
            multiply<R, 1, 1>(acc, own, R, across + j, kChunk, N);
            for (int r = 0; r < R; ++r) store(mix + (first + r) * kChunk + j, acc[r][0]);
        }
    });
    if (s.codes) share_codes(op, s, b, g, start, count, (int8_t *)(memory + s.code_at));
}

// The state of a head as floats, and back.

QB_INLINE int64_t scale_row(const QbState &state, int64_t channel) {
    return state.group ? state.group[channel] : state.scale_rows == 1 ? 0 : channel;
}

/// The state as rows of a tensor, with the scale of one channel: a number, or as long as a row.
QB_INLINE QbTensor state_rows(const QbState &state, int64_t channel, int64_t d_state) {
    const float *scale = state.scale ? state.scale + scale_row(state, channel) * state.scale_columns : nullptr;
    return {state.data, scale, 0, d_state, state.dtype, state.scale_columns == 1 ? 0 : 1};
}

/// Whether the state of one head is not zero. rows: kFloats of padded(d_state).
bool read_state(const QbSsd &op, const Sizes &s, int64_t b, int64_t h, float *out, float *rows) {
    const int64_t N = s.d_state, wide = padded(N);
    if (s.width != s.headdim) __builtin_memset(out, 0, (size_t)(4 * s.state_floats));
    vi any = {};
    for (int64_t first = 0; first < s.headdim; first += kFloats) {
        const int64_t count = least(kFloats, s.headdim - first);
        if (count < kFloats || N < wide) __builtin_memset(rows, 0, (size_t)(4 * kFloats * wide));
        for (int64_t p = 0; p < count; ++p) {
            const int64_t channel = h * s.headdim + first + p;
            const QbTensor all = state_rows(op.state, channel, N);
            read_row(rows + p * wide, all, 0, b * s.heads * s.headdim + channel, 0, N);
            for (int64_t n = 0; n < wide; n += kFloats) any |= load<vi>(rows + p * wide + n);
        }
        float *columns = out + first / kWide * N * kWide + first % kWide;
        for (int64_t n = 0; n < N; n += kFloats) transpose(rows + n, wide, columns + n * kWide, kWide, N - n);
    }
    any &= 0x7fffffff;
    for (int i = 1; i < kFloats; ++i) any[0] |= any[i];
    return any[0] != 0;
}

void write_state(const QbSsd &op, const Sizes &s, int64_t b, int64_t h, const float *in, float *rows) {
    const int64_t N = s.d_state, wide = padded(N);
    const vf limit = splat(op.state.dtype == QB_F16 ? 65504.0f : __builtin_inff());
    for (int64_t first = 0; first < s.headdim; first += kFloats) {
        const float *columns = in + first / kWide * N * kWide + first % kWide;
        for (int64_t n = 0; n < N; n += kFloats) {
            float end[kFloats * kFloats] = {};
            const float *from = columns + n * kWide;
            int64_t step = kWide;
            if (N - n < kFloats) {
                for (int64_t i = 0; i < N - n; ++i) store(end + i * kFloats, loadf(from + i * kWide));
                from = end;
                step = kFloats;
            }
            transpose(from, step, rows + n, wide, kFloats);
        }
        for (int64_t p = 0; p < least(kFloats, s.headdim - first); ++p) {
            const int64_t channel = h * s.headdim + first + p;
            float *row = rows + p * wide;
            // In this order a NaN stays one.
            for (int64_t n = 0; n < wide; n += kFloats) store(row + n, vmin(limit, vmax(-limit, loadf(row + n))));
            const QbTensor all = state_rows(op.state, channel, N);
            write_row(all, 0, b * s.heads * s.headdim + channel, 0, N, row);
        }
    }
}

/// dt of one head and count tokens, zeros beyond.
void read_dt(const QbSsd &op, int64_t b, int64_t start, int64_t count, int64_t h, float *out) {
    const char *row = at(op.dt, b, start);
    const int64_t step = op.dt.token_stride;
    if (op.dt.dtype == QB_F32)
        for (int64_t j = 0; j < count; ++j) out[j] = ((const float *)row)[j * step + h];
    else if (op.dt.dtype == QB_BF16)
        for (int64_t j = 0; j < count; ++j) out[j] = bf16_value(((const uint16_t *)row)[j * step + h]);
    else if (op.dt.dtype == QB_F16)
        for (int64_t j = 0; j < count; ++j) out[j] = f16_value(((const uint16_t *)row)[j * step + h]);
    else
        for (int64_t j = 0; j < count; ++j)
            out[j] = (float)((const int8_t *)row)[j * step + h] * op.dt.scale[op.dt.scale_step ? h : 0];
    for (int64_t j = count; j < kChunk; ++j) out[j] = 0.0f;
}

QB_INLINE vf delta_of(const QbSsd &op, vf raw) {
    return vmin(vmax(vsoftplus(raw), splat(op.dt_min)), splat(op.dt_max));
}

QB_INLINE vf exp_of(vf x) { return vdecay(x, splat(kLog2E)); }

/// How fast one head forgets in a chunk. Sums of delta A from its start on are of two floats each, because
/// differences of large ones are taken; after the last token they stay as they are.
struct Decay {
    float delta[kChunk + kFloats], high[kChunk + kFloats], low[kChunk + kFloats];

    void read(const QbSsd &op, int64_t b, int64_t start, int64_t count, int64_t h) {
        read_dt(op, b, start, count, h, delta);
        const vf bias = splat(op.dt_bias ? op.dt_bias[h] : 0.0f), rate = splat(op.A[h]);
        float step[kChunk];
        for (int64_t j = 0; j < kChunk; j += kFloats) {
            vf v = delta_of(op, loadf(delta + j) + bias);
            v = lanes() + (int32_t)j < (int32_t)count ? v : vf{};
            store(delta + j, v);
        }
        if (op.mask)
            for (int64_t j = 0; j < count; ++j)
                if (!op.mask[b * op.length + start + j]) delta[j] = 0.0f;
        for (int64_t j = 0; j < kChunk; j += kFloats) store(step + j, loadf(delta + j) * rate);
        double total = 0.0;
        for (int64_t j = 0; j < kChunk; ++j) {
            total += (double)step[j];
            high[j] = (float)total;
            low[j] = (float)(total - (double)high[j]);
        }
        store(delta + kChunk, vf{});
        store(high + kChunk, splat(high[kChunk - 1]));
        store(low + kChunk, splat(low[kChunk - 1]));
    }

    /// exp(sum at token i - sums at tokens from j on)
    vf since(int64_t i, int64_t j) const {
        return exp_of((high[i] - loadf(high + j)) + (low[i] - loadf(low + j)));
    }
    /// exp(sums at tokens from i on - sum at token j)
    vf until(int64_t i, int64_t j) const {
        return exp_of((loadf(high + i) - high[j]) + (loadf(low + i) - low[j]));
    }
    /// exp(sums at tokens from i on)
    vf entered(int64_t i) const { return exp_of(loadf(high + i) + loadf(low + i)); }
};

// What one head works with.
struct Work {
    float *state, *x, *y, *rows;
    bool any;      // whether the state is not zero
    Split *split;  // of the state by panel, and one more for what tokens leave; if codes are multiplied
};

// Scales of B or C of one group: those of its states, or one.
struct Scales {
    const float *first;
    int64_t step;

    Scales(const QbTensor &t, int64_t g, int64_t d_state)
        : first(t.scale + (t.scale_step ? g * d_state : 0)), step(t.scale_step ? 1 : 0) {}
    float operator[](int64_t n) const { return first[n * step]; }
};

/// What the next chunk's C is multiplied with.
void split_state(const Sizes &s, const Work &w, const Scales &C, int64_t panel) {
    const float *own = w.state + panel * s.d_state * kWide;
    split_columns(
        s.d_state, [&](int64_t n, int v) { return loadf(own + n * kWide + v * kFloats) * C[n]; }, w.split[panel]);
}

/// What the state at the chunk's beginning gives R of its tokens.
template <int R>
QB_INLINE void state_outputs(const Sizes &s, const Work &w, const Shared &shared, const float *entered,
                             int64_t first, int64_t panel, vf (&acc)[R][kPanel]) {
    if (!s.codes) {
        multiply<R, kPanel, 1>(acc, shared.C + first * s.d_state, R, w.state + panel * s.d_state * kWide, kWide,
                               s.d_state);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kPanel; ++v) acc[r][v] *= entered[r];
        return;
    }
    constexpr int some = R < kCodeRows ? R : R % kCodeRows ? 2 : kCodeRows;
    static_assert(R % some == 0, "tiles are cut evenly");
    const Split &split = w.split[panel];
    QB_UNROLL
    for (int from = 0; from < R; from += some) {
        vf part[some][kPanel];
        multiply_codes(part, shared.C_codes + (first + from) * s.code_row, s.code_row, kChunk * s.code_row, split,
                       s.code_row / 4);
        for (int r = 0; r < some; ++r)
            for (int v = 0; v < kPanel; ++v) acc[from + r][v] = part[r][v] * (split.scale[v] * entered[from + r]);
    }
}

/// y of R tokens from `first` of the chunk on, for one panel of channels.
/// mix: what C B^T becomes with the decays, [R][kChunk], from the chunk's first token on.
template <int R>
QB_INLINE void output_tile(const Sizes &s, const Work &w, const Shared &shared, const float *mix, const float *skip,
                           const float *entered, int64_t first, int64_t panel) {
    vf acc[R][kPanel] = {};
    if (w.any) state_outputs<R>(s, w, shared, entered, first, panel, acc);
    multiply<R, kPanel, (int)kChunk>(acc, mix, 1, w.x + panel * kWide, s.width, first + R);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanel; ++v) {
            const int64_t p = panel * kWide + v * kFloats;
            if (skip) acc[r][v] += loadf(skip + p) * loadf(w.x + (first + r) * s.width + p);
            store(w.y + r * s.width + p, acc[r][v]);
        }
}

/// before(first, rows), after(first, rows): called around the products of some rows, so that memory is asked for and
/// written to while others are computed.
template <class Before, class After>
void chunk_outputs(const Sizes &s, const Work &w, const Shared &shared, const Decay &decay, const float *skip,
                   int64_t count, const Before &before, const After &after) {
    alignas(64) float mix[kRows * kChunk + kFloats], left[kChunk], entered[kRows + kFloats], own[kRows + kFloats];
    tiles(count, [&](auto rows, int64_t first) {
        constexpr int R = decltype(rows)::count;
        before(first, R);
        // Decays to the tile's first token are at most 1, and so are those from there on.
        for (int64_t j = 0; j < first; j += kFloats) store(left + j, decay.since(first, j) * loadf(decay.delta + j));
        for (int r = 0; r < R; r += kFloats) {
            store(entered + r, decay.entered(first + r));
            store(own + r, decay.until(first + r, first));
        }
        // What a row writes beyond its end, the next one overwrites.
        for (int r = 0; r < R; ++r) {
            float *out = mix + r * kChunk;
            const float *in = shared.mix + (first + r) * kChunk;
            for (int64_t j = 0; j < first; j += kFloats) store(out + j, loadf(in + j) * loadf(left + j) * own[r]);
            for (int i = 0; i < R; i += kFloats) {
                const int64_t j = first + i;
                const vf v = loadf(in + j) * loadf(decay.delta + j) * decay.since(first + r, j);
                store(out + j, lanes() + i <= r ? v : vf{});
            }
        }
        for (int64_t panel = 0; panel < s.panels; ++panel)
            output_tile<R>(s, w, shared, mix, skip, entered, first, panel);
        after(first, R);
    });
}

/// R states of a panel's channels: what is kept of them, and what the tokens leave.
template <int R>
QB_INLINE void left_codes(const Sizes &s, const Work &w, const Shared &shared, const Scales &B, const Split &split,
                          float kept, int64_t count, int64_t first, float *own) {
    vf acc[R][kPanel];
    multiply_codes(acc, shared.B_codes + first * kChunk, kChunk, s.d_state * kChunk, split, (count + 3) / 4);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanel; ++v) {
            float *here = own + (first + r) * kWide + v * kFloats;
            const vf before = w.any ? loadf(here) * kept : vf{};
            store(here, acc[r][v] * (split.scale[v] * B[first + r]) + before);
        }
}

/// S <- exp(total of the chunk) S + sum of what its tokens leave at its end. last_one: no chunk comes after it.
void chunk_state(const Sizes &s, const Work &w, const Shared &shared, const Decay &decay, const Scales &B,
                 const Scales &C, int64_t count, bool last_one) {
    alignas(64) float left[kChunk];
    const int64_t last = kChunk - 1;
    for (int64_t j = 0; j < kChunk; j += kFloats) store(left + j, decay.since(last, j) * loadf(decay.delta + j));
    const float kept = decay.entered(last)[0];
    if (s.codes) {
        Split &split = w.split[s.panels];
        for (int64_t panel = 0; panel < s.panels; ++panel) {
            const float *x = w.x + panel * kWide;
            split_columns(
                count, [&](int64_t j, int v) { return loadf(x + j * s.width + v * kFloats) * left[j]; }, split);
            float *own = w.state + panel * s.d_state * kWide;
            int64_t n = 0;
            for (; n + kCodeRows <= s.d_state; n += kCodeRows)
                left_codes<kCodeRows>(s, w, shared, B, split, kept, count, n, own);
            for (; n < s.d_state; ++n) left_codes<1>(s, w, shared, B, split, kept, count, n, own);
            if (!last_one) split_state(s, w, C, panel);  // while it is in the L1 cache
        }
        return;
    }
    for (int64_t j = 0; j < count; ++j) {
        const vf by = splat(left[j]);
        for (int64_t p = 0; p < s.width; p += kFloats)
            store(w.x + j * s.width + p, loadf(w.x + j * s.width + p) * by);
    }
    for (int64_t panel = 0; panel < s.panels; ++panel)
        tiles(s.d_state, [&](auto rows, int64_t first) {
            constexpr int R = decltype(rows)::count;
            float *own = w.state + (panel * s.d_state + first) * kWide;
            vf acc[R][kPanel] = {};
            if (w.any)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < kPanel; ++v) acc[r][v] = loadf(own + r * kWide + v * kFloats) * kept;
            multiply<R, kPanel, 1>(acc, shared.B + first, s.b_row, w.x + panel * kWide, s.width, count);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kPanel; ++v) store(own + r * kWide + v * kFloats, acc[r][v]);
        });
}

/// Tokens [start, stop) of one head. kept: where its state stays between slabs, or NULL if this is the only one.
void scan_head(const QbSsd &op, const Sizes &s, int64_t b, int64_t h, int64_t start, int64_t stop, const float *shared,
               float *kept) {
    const int64_t floats = s.state_floats + (kChunk + kRows + 1) * s.width + kFloats * padded(s.d_state);
    const int64_t splits = s.codes ? s.panels + 1 : 0, split_bytes = (int64_t)sizeof(Split);
    float *memory = (float *)quamba::scratch(0, 4 * (floats + splits * s.split_floats) + splits * split_bytes);
    Work w;
    w.state = kept ? kept + h * s.state_floats : memory;
    w.x = memory + s.state_floats;
    w.y = w.x + kChunk * s.width;
    float *skip = w.y + kRows * s.width;
    w.rows = skip + s.width;
    w.split = (Split *)(memory + floats + splits * s.split_floats);
    for (int64_t i = 0; i < splits; ++i) w.split[i].planes = (vi *)(memory + floats + i * s.split_floats);
    w.any = start > 0;
    if (!start && op.state.data) w.any = read_state(op, s, b, h, w.state, w.rows);
    if (s.width != s.headdim) __builtin_memset(w.x, 0, 4 * kChunk * s.width);
    for (int64_t p = 0; p < s.width; ++p) skip[p] = op.D && p < s.headdim ? op.D[h * s.headdim + p] : 0.0f;
    const int64_t chunks = (stop - start + kChunk - 1) / kChunk, g = h / (s.heads / s.groups);
    const Scales B(op.B, g, s.d_state), C(op.C, g, s.d_state);  // of codes
    for (int64_t panel = 0; panel < s.panels && s.codes && w.any; ++panel) split_state(s, w, C, panel);
    Decay decay;
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = start + c * kChunk, count = least(kChunk, stop - from);
        const Shared own = shared_at(s, shared + (g * kSlab + c) * s.group_floats);
        decay.read(op, b, from, count, h);
        for (int64_t j = 0; j < count; ++j)
            read_row(w.x + j * s.width, op.x, b, from + j, h * s.headdim, s.headdim);
        const auto ask = [&](int64_t first, int64_t rows) {
            for (int64_t t = from + first; t < from + first + rows; ++t) {
                prefetch<1>(op.y, b, t, h * s.headdim, s.headdim);
                // The next chunk of this head, or the first one of the next.
                if (c + 1 < chunks)
                    prefetch<0>(op.x, b, least(t + kChunk, stop - 1), h * s.headdim, s.headdim);
                else if (h + 1 < s.heads)
                    prefetch<0>(op.x, b, start + t - from, (h + 1) * s.headdim, s.headdim);
            }
        };
        const auto write = [&](int64_t first, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r)
                write_row(op.y, b, from + first + r, h * s.headdim, s.headdim, w.y + r * s.width);
        };
        chunk_outputs(s, w, own, decay, op.D ? skip : nullptr, count, ask, write);
        if (!op.state.data && from + count == op.length) return;
        chunk_state(s, w, own, decay, B, C, count, c + 1 == chunks);
        w.any = true;
    }
    if (stop == op.length && op.state.data) write_state(op, s, b, h, w.state, w.rows);
}

void scan(const QbSsd &op) {
    const Sizes s(op);
    const int64_t slab = kSlab * kChunk;
    float *shared = (float *)quamba::scratch(4, 4 * s.groups * kSlab * s.group_floats);
    float *kept = op.length > slab ? (float *)quamba::scratch(5, 4 * s.heads * s.state_floats) : nullptr;
    for (int64_t b = 0; b < op.batch; ++b)
        for (int64_t start = 0; start < op.length; start += slab) {
            const int64_t stop = least(start + slab, op.length), chunks = (stop - start + kChunk - 1) / kChunk;
            each(s.groups * chunks, [&](int64_t i) {
                const int64_t g = i / chunks, c = i % chunks, from = start + c * kChunk;
                share(op, s, b, g, from, least(kChunk, stop - from), shared + (g * kSlab + c) * s.group_floats);
            });
            each(s.heads, [&](int64_t h) { scan_head(op, s, b, h, start, stop, shared, kept); });
        }
}

// One token.

template <int DTYPE>
QB_INLINE vf state_vector(const char *p, int64_t i) {
    if (DTYPE == QB_F32) return loadf((const float *)p + i);
    if (DTYPE == QB_BF16) return from_bf16((const uint16_t *)p + i);
    if (DTYPE == QB_F16) return from_f16((const uint16_t *)p + i);
    return to_float(widen((const int8_t *)p + i));
}

template <int DTYPE>
QB_INLINE void put_state(char *p, int64_t i, vf v) {
    if (DTYPE == QB_F32) store((float *)p + i, v);
    if (DTYPE == QB_BF16) to_bf16((uint16_t *)p + i, v);
    if (DTYPE == QB_F16) {
        // Infinity becomes the largest number, one below in bits; a NaN stays one.
        uint16_t bits[kFloats];
        to_f16(bits, v);
        const vh_half half = load<vh_half>(bits);
        store((uint16_t *)p + i, half + (vh_half)((half & 0x7fff) == 0x7c00));
    }
    if (DTYPE == QB_I8) narrow_saturated((int8_t *)p + i, v);
}

constexpr int kTogether = 4;      // channels
constexpr int64_t kAhead = 2048;  // bytes of the state that are asked for before they are needed

/// What a channel needs besides its row of the state: delta x, and B and C.
struct Channel {
    float driven;
    const float *B, *C;
};

/// R channels of one head advance by a token. ONE: they share B and C. What they give y is still to be added up.
/// Codes of a state advance in their own unit: then B is that of one step of the scale, and C times the scale.
template <int DTYPE, bool ONE, int R>
QB_INLINE void advance(char *row, int64_t d_state, float kept, const Channel *channels, vf *sums) {
    constexpr int64_t size = DTYPE == QB_F32 ? 4 : DTYPE == QB_I8 ? 1 : 2;
    const int64_t step = d_state * size;
    Channel own[R];
    vf total[R] = {};
    for (int r = 0; r < R; ++r) own[r] = channels[r];
    int64_t n = 0;
    for (; n + kFloats <= d_state; n += kFloats) {
        vf b = loadf(own[0].B + n), c = loadf(own[0].C + n);
        for (int r = 0; r < R; ++r) {
            if (!ONE && r) b = loadf(own[r].B + n), c = loadf(own[r].C + n);
            const vf v = state_vector<DTYPE>(row + r * step, n) * kept + own[r].driven * b;
            total[r] += v * c;
            put_state<DTYPE>(row + r * step, n, v);
        }
    }
    if (n < d_state) {
        const size_t rest = (size_t)((d_state - n) * size);
        for (int r = 0; r < R; ++r) {
            const Channel &c = own[ONE ? 0 : r];
            char stored[kBytes] = {};
            __builtin_memcpy(stored, row + r * step + n * size, rest);
            const vf v = state_vector<DTYPE>(stored, 0) * kept + own[r].driven * loadf(c.B + n);
            total[r] += v * loadf(c.C + n);
            put_state<DTYPE>(stored, 0, v);
            __builtin_memcpy(row + r * step + n * size, stored, rest);
        }
    }
    for (int r = 0; r < R; ++r) sums[r] = total[r];
}

template <int DTYPE, bool ONE>
void advance_head(const QbSsd &op, int64_t first, float kept, const Channel *channels, float *y) {
    constexpr int64_t size = DTYPE == QB_F32 ? 4 : DTYPE == QB_I8 ? 1 : 2;
    const int64_t N = op.d_state, row = N * size;
    char *rows = (char *)op.state.data + first * row;
    vf sums[kFloats] = {};
    for (int64_t p = 0; p < op.headdim; p += kFloats) {
        const int64_t count = least(kFloats, op.headdim - p);
        int64_t i = 0;
        for (; i + kTogether <= count; i += kTogether) {
            char *own = rows + (p + i) * row;
            for (int64_t at = 0; at < kTogether * row; at += 64) __builtin_prefetch(own + kAhead + at, 1);
            advance<DTYPE, ONE, kTogether>(own, N, kept, channels + p + i, sums + i);
        }
        for (; i < count; ++i) advance<DTYPE, ONE, 1>(rows + (p + i) * row, N, kept, channels + p + i, sums + i);
        store(y + p, sums_of(sums));
    }
}

/// B in steps of the scales, and C times them, of rows of `scale`; all in whole vectors, with zeros at the end.
QB_INLINE void in_steps(const float *B, const float *C, const float *scale, int64_t d_state, float *B_out,
                        float *C_out) {
    for (int64_t n = 0; n < d_state; n += kFloats) {
        const vf by = load_upto(scale + n, d_state - n);
        store(C_out + n, loadf(C + n) * by);
        store(B_out + n, n + kFloats <= d_state ? loadf(B + n) / by : by != 0.0f ? loadf(B + n) / by : vf{});
    }
}

/// The heads [from, to) of all sequences.
template <int DTYPE>
void step_heads(const QbSsd &op, int64_t from, int64_t to) {
    const QbState &state = op.state;
    const int64_t N = op.d_state, P = op.headdim, wide = padded(N), width = padded(P);
    // Rows of scales as long as the state's: B and C of each, if several channels share them.
    const bool by_column = DTYPE == QB_I8 && state.scale_columns > 1, table = by_column && state.scale_rows < P;
    const int64_t tables = by_column ? (table ? state.scale_rows : P) : 0;
    float *B = (float *)quamba::scratch(0, 4 * (2 * wide * (1 + tables) + 2 * width));
    float *C = B + wide, *x = C + wide, *y = x + width, *both = y + width;
    Channel *channels = (Channel *)quamba::scratch(1, (int64_t)sizeof(Channel) * P);
    for (int64_t n = N; n < wide; ++n) B[n] = C[n] = 0.0f;
    int64_t have = -1;
    float delta[kFloats], kept[kFloats];
    for (int64_t head = from; head < to; ++head) {
        const int64_t b = head / op.heads, h = head % op.heads, g = h / (op.heads / op.groups);
        const int64_t lane = (head - from) % kFloats, first = h * P;
        if (lane == 0) {
            float rate[kFloats];
            for (int j = 0; j < kFloats; ++j) {
                const int64_t other = least(head + j, to - 1), at = other % op.heads;
                read_row(delta + j, op.dt, other / op.heads, 0, at, 1);
                if (op.dt_bias) delta[j] += op.dt_bias[at];
                rate[j] = op.A[at];
            }
            store(delta, delta_of(op, loadf(delta)));
            store(kept, exp_of(loadf(delta) * loadf(rate)));
        }
        if (have != b * op.groups + g) {
            have = b * op.groups + g;
            read_row(B, op.B, b, 0, g * N, N);
            read_row(C, op.C, b, 0, g * N, N);
            for (int64_t k = 0; table && k < tables; ++k)
                in_steps(B, C, state.scale + k * N, N, both + 2 * k * wide, both + (2 * k + 1) * wide);
        }
        read_row(x, op.x, b, 0, first, P);
        for (int64_t p = 0; p < P; ++p) {
            Channel &c = channels[p];
            c = {x[p] * delta[lane], B, C};
            if (by_column) {
                const int64_t row = scale_row(state, first + p), k = table ? row : p;
                float *own = both + 2 * k * wide;
                if (!table) in_steps(B, C, state.scale + row * N, N, own, own + wide);
                c.B = own;
                c.C = own + wide;
            } else if (DTYPE == QB_I8) {
                c.driven /= state.scale[scale_row(state, first + p)];
            }
        }
        if (by_column)
            advance_head<DTYPE, false>(op, b * op.heads * P + first, kept[lane], channels, y);
        else
            advance_head<DTYPE, true>(op, b * op.heads * P + first, kept[lane], channels, y);
        for (int64_t p = 0; p < P; ++p) {
            if (DTYPE == QB_I8 && !by_column) y[p] *= state.scale[scale_row(state, first + p)];
            if (op.D) y[p] += x[p] * op.D[first + p];
        }
        write_row(op.y, b, 0, first, P, y);
    }
}

template <int DTYPE>
void step(const QbSsd &op) {
    const int64_t heads = op.batch * op.heads;
    const int64_t part = part_size(heads, 1 + 16 * 1024 / (op.headdim * op.d_state), 1);
    each((heads + part - 1) / part,
         [&](int64_t i) { step_heads<DTYPE>(op, i * part, least((i + 1) * part, heads)); });
}

}  // namespace

void ssd(const void *args) {
    const QbSsd &op = *(const QbSsd *)args;
    if (op.length != 1 || !op.state.data || op.mask) return scan(op);
    switch (op.state.dtype) {
        case QB_F32: return step<QB_F32>(op);
        case QB_BF16: return step<QB_BF16>(op);
        case QB_F16: return step<QB_F16>(op);
        default: return step<QB_I8>(op);
    }
}

}  // namespace QB_ISA
