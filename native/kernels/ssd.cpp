// Mamba2's scan. Prompts go in chunks (Mamba2 paper, section 6): inside a chunk a masked matrix product, between
// chunks the recurrence. Single tokens read and write the state once.
//
// All products are of one kind: a register tile of kRows x 2 vectors, one matrix with its columns next to each other
// in memory, numbers of the other one by one. The state of a head is worked on as [panel][d_state][2 vectors of
// headdim], so that the products with C, with x and the update all write or read whole vectors of headdim.
#include "simd.h"

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

struct Sizes {
    int64_t heads, headdim, groups, d_state;
    int64_t panels, width;  // width: headdim, in whole panels
    int64_t b_row;          // of B as floats
    int64_t group_floats;   // of a group and chunk: C, B and C B^T
    int64_t state_floats;   // of a head

    explicit Sizes(const QbSsd &op)
        : heads(op.heads), headdim(op.headdim), groups(op.groups), d_state(op.d_state) {
        panels = (headdim + kWide - 1) / kWide;
        width = panels * kWide;
        b_row = (d_state + 15) / 16 * 16 + 16;  // not a power of two: rows would share sets of the L1 cache
        group_floats = kChunk * d_state + kChunk * b_row + kChunk * kChunk;
        group_floats = (group_floats + 15) / 16 * 16;
        state_floats = panels * d_state * kWide;
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

// What all heads of a group share, of one chunk: C [tile][d_state][rows of the tile], B [token][b_row],
// and C B^T [token][kChunk] up to the diagonal.
struct Shared {
    const float *C, *B, *mix;
};

QB_INLINE Shared shared_at(const Sizes &s, const float *memory) {
    return {memory, memory + kChunk * s.d_state, memory + kChunk * s.d_state + kChunk * s.b_row};
}

void share(const QbSsd &op, const Sizes &s, int64_t b, int64_t g, int64_t start, int64_t count, float *memory) {
    float *C = memory, *B = C + kChunk * s.d_state, *mix = B + kChunk * s.b_row;
    float *across = (float *)quamba::scratch(0, 4 * (kChunk + 1) * (s.d_state + 16));  // B^T
    float *row = across + kChunk * s.d_state;
    for (int64_t n = 0; n < s.d_state; ++n)
        for (int64_t j = count; j < kChunk; ++j) across[n * kChunk + j] = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
        read_row(B + j * s.b_row, op.B, b, start + j, g * s.d_state, s.d_state);
        for (int64_t n = 0; n < s.d_state; ++n) across[n * kChunk + j] = B[j * s.b_row + n];
    }
    tiles(count, [&](auto rows, int64_t first) {
        constexpr int R = decltype(rows)::count;
        float *own = C + first * s.d_state;
        for (int r = 0; r < R; ++r) {
            read_row(row, op.C, b, start + first + r, g * s.d_state, s.d_state);
            for (int64_t n = 0; n < s.d_state; ++n) own[n * R + r] = row[n];
        }
        for (int64_t j = 0; j < first + R; j += kFloats) {
            vf acc[R][1] = {};
            multiply<R, 1, 1>(acc, own, R, across + j, kChunk, s.d_state);
            for (int r = 0; r < R; ++r) store(mix + (first + r) * kChunk + j, acc[r][0]);
        }
    });
}

// The state of a head as floats, and back.

QB_INLINE float scale_of(const QbState &state, int64_t channel, int64_t n) {
    const int64_t row = state.group ? state.group[channel] : state.scale_rows == 1 ? 0 : channel;
    return state.scale[row * state.scale_columns + (state.scale_columns == 1 ? 0 : n)];
}

/// One row of the state as a tensor; the scale of rows is a number or as long as they are.
QB_INLINE QbTensor state_rows(const QbState &state, int64_t channel, int64_t d_state) {
    const int64_t row = state.group ? state.group[channel] : state.scale_rows == 1 ? 0 : channel;
    const float *scale = state.scale ? state.scale + row * state.scale_columns : nullptr;
    return {state.data, scale, 0, d_state, state.dtype, state.scale_columns == 1 ? 0 : 1};
}

/// Channels [first, first + count) of the batch's states; whether one of them is not zero.
bool read_state(const QbSsd &op, const Sizes &s, int64_t b, int64_t h, float *out, float *row) {
    if (s.width != s.headdim) __builtin_memset(out, 0, 4 * s.state_floats);
    bool any = false;
    for (int64_t p = 0; p < s.headdim; ++p) {
        const int64_t channel = h * s.headdim + p;
        const QbTensor rows = state_rows(op.state, channel, s.d_state);
        read_row(row, rows, 0, b * s.heads * s.headdim + channel, 0, s.d_state);
        float *column = out + p / kWide * s.d_state * kWide + p % kWide;
        for (int64_t n = 0; n < s.d_state; ++n) {
            column[n * kWide] = row[n];
            any |= row[n] != 0.0f;
        }
    }
    return any;
}

void write_state(const QbSsd &op, const Sizes &s, int64_t b, int64_t h, const float *in, float *row) {
    for (int64_t p = 0; p < s.headdim; ++p) {
        const int64_t channel = h * s.headdim + p;
        const float *column = in + p / kWide * s.d_state * kWide + p % kWide;
        for (int64_t n = 0; n < s.d_state; ++n) row[n] = column[n * kWide];
        if (op.state.dtype == QB_F16)
            for (int64_t n = 0; n < s.d_state; ++n)
                row[n] = row[n] > 65504.0f ? 65504.0f : row[n] < -65504.0f ? -65504.0f : row[n];
        write_row(state_rows(op.state, channel, s.d_state), 0, b * s.heads * s.headdim + channel, 0, s.d_state, row);
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

/// How fast one head forgets in a chunk. total: sums of delta A from its start on, float64 because differences of
/// large sums are taken; its last value is repeated to the end.
struct Decay {
    float delta[kChunk];
    double total[kChunk];

    void read(const QbSsd &op, int64_t b, int64_t start, int64_t count, int64_t h) {
        read_dt(op, b, start, count, h, delta);
        const float bias = op.dt_bias ? op.dt_bias[h] : 0.0f, rate = op.A[h];
        for (int64_t j = 0; j < kChunk; j += kFloats) store(delta + j, delta_of(op, loadf(delta + j) + bias));
        double sum = 0.0;
        for (int64_t j = 0; j < kChunk; ++j) {
            if (j >= count || (op.mask && !op.mask[b * op.length + start + j])) delta[j] = 0.0f;
            total[j] = sum += (double)(delta[j] * rate);
        }
    }

    /// exp(from - total) of all tokens before `end`, in whole vectors.
    void left(double from, int64_t end, float *out) const {
        for (int64_t j = 0; j < end; j += kFloats) {
            float gap[kFloats];
            for (int i = 0; i < kFloats; ++i) gap[i] = (float)(from - total[j + i]);
            store(out + j, vexp(loadf(gap)));
        }
    }
};

QB_INLINE float exp_of(double x) { return vexp(splat((float)x))[0]; }

// What one head works with.
struct Work {
    float *state, *x, *y, *row;
    bool any;  // whether the state is not zero
};

/// y of R tokens from `first` of the chunk on, for one panel of channels.
/// mix: what C B^T becomes with the decays, [R][kChunk], from the chunk's first token on.
template <int R>
QB_INLINE void output_tile(const Sizes &s, const Work &w, const Shared &shared, const float *mix, const float *skip,
                           const float *entered, int64_t first, int64_t panel) {
    vf acc[R][kPanel] = {};
    if (w.any) {
        multiply<R, kPanel, 1>(acc, shared.C + first * s.d_state, R, w.state + panel * s.d_state * kWide, kWide,
                               s.d_state);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kPanel; ++v) acc[r][v] *= entered[r];
    }
    multiply<R, kPanel, (int)kChunk>(acc, mix, 1, w.x + panel * kWide, s.width, first + R);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPanel; ++v) {
            const int64_t at = (first + r) * s.width + panel * kWide + v * kFloats;
            if (skip) acc[r][v] += loadf(skip + panel * kWide + v * kFloats) * loadf(w.x + at);
            store(w.y + at, acc[r][v]);
        }
}

void chunk_outputs(const Sizes &s, const Work &w, const Shared &shared, const Decay &decay, const float *skip,
                   int64_t count) {
    alignas(64) float mix[kRows * kChunk], left[kChunk], entered[kRows];
    tiles(count, [&](auto rows, int64_t first) {
        constexpr int R = decltype(rows)::count;
        // Decays to the tile's first token are at most 1, and so are those from there on.
        const double from = decay.total[first];
        decay.left(from, first, left);
        for (int64_t j = 0; j < first; j += kFloats) store(left + j, loadf(left + j) * loadf(decay.delta + j));
        for (int r = 0; r < R; ++r) {
            entered[r] = exp_of(decay.total[first + r]);
            const float since = exp_of(decay.total[first + r] - from);
            float *out = mix + r * kChunk;
            const float *in = shared.mix + (first + r) * kChunk;
            for (int64_t j = 0; j < first; j += kFloats) store(out + j, loadf(in + j) * loadf(left + j) * since);
            for (int i = 0; i < R; ++i) {
                const int64_t j = first + i;
                const float gap = (float)(decay.total[first + r] - decay.total[j]);
                out[j] = i <= r ? in[j] * decay.delta[j] * vexp(splat(gap))[0] : 0.0f;
            }
        }
        for (int64_t panel = 0; panel < s.panels; ++panel)
            output_tile<R>(s, w, shared, mix, skip, entered, first, panel);
    });
}

/// S <- exp(total of the chunk) S + sum of what its tokens leave at its end.
void chunk_state(const Sizes &s, const Work &w, const Shared &shared, const Decay &decay, int64_t count) {
    alignas(64) float left[kChunk];
    const double last = decay.total[kChunk - 1];
    decay.left(last, kChunk, left);
    const float kept = exp_of(last);
    for (int64_t j = 0; j < count; ++j) {
        const vf by = splat(left[j] * decay.delta[j]);
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
    const int64_t floats = s.state_floats + 2 * kChunk * s.width + s.width + s.d_state + 64;
    float *memory = (float *)quamba::scratch(0, 4 * floats);
    Work w;
    w.state = kept ? kept + h * s.state_floats : memory;
    w.x = memory + s.state_floats;
    w.y = w.x + kChunk * s.width;
    float *skip = w.y + kChunk * s.width;
    w.row = skip + s.width;
    w.any = start > 0;
    if (!start && op.state.data) w.any = read_state(op, s, b, h, w.state, w.row);
    if (s.width != s.headdim) __builtin_memset(w.x, 0, 4 * kChunk * s.width);
    for (int64_t p = 0; p < s.width; ++p) skip[p] = op.D && p < s.headdim ? op.D[h * s.headdim + p] : 0.0f;
    const int64_t chunks = (stop - start + kChunk - 1) / kChunk, g = h / (s.heads / s.groups);
    Decay decay;
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = start + c * kChunk, count = least(kChunk, stop - from);
        const Shared own = shared_at(s, shared + (g * kSlab + c) * s.group_floats);
        decay.read(op, b, from, count, h);
        for (int64_t j = 0; j < count; ++j)
            read_row(w.x + j * s.width, op.x, b, from + j, h * s.headdim, s.headdim);
        chunk_outputs(s, w, own, decay, op.D ? skip : nullptr, count);
        for (int64_t j = 0; j < count; ++j)
            write_row(op.y, b, from + j, h * s.headdim, s.headdim, w.y + j * s.width);
        if (!op.state.data && from + count == op.length) return;
        chunk_state(s, w, own, decay, count);
        w.any = true;
    }
    if (stop == op.length && op.state.data) write_state(op, s, b, h, w.state, w.row);
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
    // In this order a NaN stays one.
    if (DTYPE == QB_F16) to_f16((uint16_t *)p + i, vmin(splat(65504.0f), vmax(splat(-65504.0f), v)));
    if (DTYPE == QB_I8) narrow((int8_t *)p + i, round_even(vmin(vmax(v, splat(-128.0f)), splat(127.0f))));
}

constexpr int kTogether = 4;  // channels

/// The scales of a state's rows: what a code is worth, and how many codes one is.
struct RowScales {
    const float *scale, *inverse;
    int64_t step;  // 0: one number
};

/// R channels of one head advance by a token. B and C are padded with zeros to whole vectors, as is nothing else.
template <int DTYPE, int R>
QB_INLINE void advance(char *const (&rows)[R], const RowScales (&scales)[R], const float *driven, float kept,
                       const float *B, const float *C, int64_t d_state, float *y) {
    vf sums[R] = {};
    int64_t n = 0;
    for (; n + kFloats <= d_state; n += kFloats) {
        const vf b = loadf(B + n), c = loadf(C + n);
        for (int r = 0; r < R; ++r) {
            vf v = state_vector<DTYPE>(rows[r], n) * kept;
            if (DTYPE == QB_I8) v *= scales[r].step ? loadf(scales[r].scale + n) : splat(*scales[r].scale);
            v += driven[r] * b;
            sums[r] += v * c;
            if (DTYPE == QB_I8) v *= scales[r].step ? loadf(scales[r].inverse + n) : splat(*scales[r].inverse);
            put_state<DTYPE>(rows[r], n, v);
        }
    }
    if (n < d_state) {
        constexpr int64_t size = DTYPE == QB_F32 ? 4 : DTYPE == QB_I8 ? 1 : 2;
        const size_t rest = (size_t)((d_state - n) * size);
        for (int r = 0; r < R; ++r) {
            char codes[kBytes] = {};
            __builtin_memcpy(codes, rows[r] + n * size, rest);
            vf v = state_vector<DTYPE>(codes, 0) * kept, back = {};
            if (DTYPE == QB_I8) {
                float by[kFloats] = {}, inverse[kFloats] = {};
                for (int64_t i = 0; i < d_state - n; ++i) {
                    by[i] = scales[r].scale[scales[r].step * (n + i)];
                    inverse[i] = scales[r].inverse[scales[r].step * (n + i)];
                }
                v *= loadf(by);
                back = loadf(inverse);
            }
            v += driven[r] * loadf(B + n);
            sums[r] += v * loadf(C + n);
            if (DTYPE == QB_I8) v *= back;
            put_state<DTYPE>(codes, 0, v);
            __builtin_memcpy(rows[r] + n * size, codes, rest);
        }
    }
    for (int r = 0; r < R; ++r) y[r] = sum(sums[r]);
}

template <int DTYPE>
void step_head(const QbSsd &op, int64_t b, int64_t h, const float *inverse, const float *x, const float *B,
               const float *C, float delta, float *y) {
    constexpr int64_t size = DTYPE == QB_F32 ? 4 : DTYPE == QB_I8 ? 1 : 2;
    const float kept = exp_of((double)(delta * op.A[h]));
    auto some = [&](auto count, int64_t p) {
        constexpr int R = decltype(count)::count;
        char *rows[R];
        RowScales scales[R];
        float driven[R];
        for (int r = 0; r < R; ++r) {
            const int64_t channel = h * op.headdim + p + r;
            rows[r] = (char *)op.state.data + size * (b * op.heads * op.headdim + channel) * op.d_state;
            driven[r] = x[p + r] * delta;
            if (DTYPE == QB_I8) {
                const int64_t row = op.state.group ? op.state.group[channel] : op.state.scale_rows == 1 ? 0 : channel;
                const int64_t first = row * op.state.scale_columns;
                scales[r] = {op.state.scale + first, inverse + first, op.state.scale_columns == 1 ? 0 : 1};
            }
        }
        advance<DTYPE, R>(rows, scales, driven, kept, B, C, op.d_state, y + p);
    };
    int64_t p = 0;
    for (; p + kTogether <= op.headdim; p += kTogether) some(Rows<kTogether>(), p);
    for (; p < op.headdim; ++p) some(Rows<1>(), p);
    if (op.D)
        for (p = 0; p < op.headdim; ++p) y[p] += x[p] * op.D[h * op.headdim + p];
}

template <int DTYPE>
void step(const QbSsd &op) {
    const int64_t N = op.d_state, P = op.headdim, wide = padded(N);
    float *inverse = nullptr;
    if (DTYPE == QB_I8) {
        const int64_t count = op.state.scale_rows * op.state.scale_columns;
        inverse = (float *)quamba::scratch(4, 4 * count);
        for (int64_t i = 0; i < count; ++i) inverse[i] = 1.0f / op.state.scale[i];
    }
    const int64_t heads = op.batch * op.heads;
    const int64_t part = part_size(heads, 1 + 32 * 1024 / (P * N), 1);
    each((heads + part - 1) / part, [&](int64_t i) {
        float *B = (float *)quamba::scratch(0, 4 * (2 * wide + 2 * padded(P)));
        float *C = B + wide, *x = C + wide, *y = x + padded(P);
        for (int64_t n = N; n < wide; ++n) B[n] = C[n] = 0.0f;
        int64_t have = -1;
        float delta[kFloats];
        const int64_t from = i * part, to = least(from + part, heads);
        for (int64_t head = from; head < to; ++head) {
            const int64_t b = head / op.heads, h = head % op.heads, g = h / (op.heads / op.groups);
            const int64_t lane = (head - from) % kFloats;
            if (lane == 0) {
                for (int j = 0; j < kFloats; ++j) {
                    const int64_t other = least(head + j, to - 1), hh = other % op.heads;
                    read_row(delta + j, op.dt, other / op.heads, 0, hh, 1);
                    if (op.dt_bias) delta[j] += op.dt_bias[hh];
                }
                store(delta, delta_of(op, loadf(delta)));
            }
            if (have != b * op.groups + g) {
                have = b * op.groups + g;
                read_row(B, op.B, b, 0, g * N, N);
                read_row(C, op.C, b, 0, g * N, N);
            }
            read_row(x, op.x, b, 0, h * P, P);
            step_head<DTYPE>(op, b, h, inverse, x, B, C, delta[lane], y);
            write_row(op.y, b, 0, h * P, P, y);
        }
    });
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
