// Mamba1's scan. A vector is kFloats channels, and their states stay in registers from token to token; for a few
// tokens, a vector is kFloats states of a channel, as they lie in memory.
#include "simd.h"

namespace QB_ISA {

constexpr int64_t kChannels = 64;               // of a tile of a prompt
constexpr int64_t kTokens = 63;                 // of a tile of a prompt; odd, or blocks would share sets of the cache
constexpr int64_t kFew = 4;                     // tokens that are no prompt
constexpr int64_t kFewChannels = 256;           // of a tile of those
constexpr int kStates = kFloats == 8 ? 4 : 16;  // of each channel, in registers at a time

/// What a part works on, in its scratch memory; channels that are not there have zeros.
struct Tile {
    int64_t channels, tokens;   // that have room, channels in whole vectors
    int64_t states;             // d_state in whole kStates
    float *delta, *input, *y;   // [channels / kFloats][tokens][kFloats]; input: delta * u
    float *rate, *state;        // [channels / kFloats][states][kFloats], or [channels][d_state]
    float *B, *C;               // [tokens][states]
    float *bias, *D, *row;      // [channels]
    float *line;                // [states]
    const float *inverse;       // of the scales of the state
};

static Tile tile_of(const QbSelectiveScan &a, int64_t channels, int64_t tokens, const float *inverse) {
    Tile t;
    t.channels = channels;
    t.tokens = tokens;
    t.states = (a.d_state + kStates - 1) / kStates * kStates;
    t.inverse = inverse;
    const int64_t values = tokens * channels, all = channels * t.states, shared = tokens * t.states;
    float *p = (float *)quamba::scratch(0, 4 * (3 * values + 2 * all + 2 * shared + 3 * channels + t.states));
    t.delta = p;
    t.input = t.delta + values;
    t.y = t.input + values;
    t.rate = t.y + values;
    t.state = t.rate + all;
    t.B = t.state + all;
    t.C = t.B + shared;
    t.bias = t.C + shared;
    t.D = t.bias + channels;
    t.row = t.D + channels;
    t.line = t.row + channels;
    for (int64_t i = 0; i < channels; ++i) t.row[i] = 0.0f;
    return t;
}

static void fill(const Tile &t, float *p, const float *values, int64_t first, int64_t count) {
    for (int64_t i = 0; i < t.channels; ++i) p[i] = values && i < count ? values[first + i] : 0.0f;
}

/// The stored states of a channel as a row of a tensor.
QB_INLINE QbTensor state_row(const QbSelectiveScan &a, int64_t channel) {
    const QbState &s = a.state;
    QbTensor t = {s.data, nullptr, 0, a.d_state, s.dtype, 0};
    if (s.scale) {
        const int64_t row = s.group ? s.group[channel] : s.scale_rows > 1 ? channel : 0;
        t.scale = s.scale + row * s.scale_columns;
        t.scale_step = s.scale_columns > 1;
    }
    return t;
}

/// Values that a float16 state can hold.
static void limit(float *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = most(least(values[i], 65504.0f), -65504.0f);
}

static void load_tile(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    for (int64_t i = 0; i < t.channels * t.states; ++i) t.rate[i] = t.state[i] = 0.0f;
    for (int64_t c = 0; c < count; ++c) {
        const int64_t at = c / kFloats * t.states * kFloats + c % kFloats;
        for (int64_t n = 0; n < a.d_state; ++n) t.rate[at + n * kFloats] = a.A[(first + c) * a.d_state + n] * kLog2E;
        if (!a.state.data) continue;
        read_row(t.line, state_row(a, first + c), 0, batch * a.channels + first + c, 0, a.d_state);
        for (int64_t n = 0; n < a.d_state; ++n) t.state[at + n * kFloats] = t.line[n];
    }
}

static void store_state(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    for (int64_t c = 0; c < count; ++c) {
        const int64_t at = c / kFloats * t.states * kFloats + c % kFloats;
        for (int64_t n = 0; n < a.d_state; ++n) t.line[n] = t.state[at + n * kFloats];
        if (a.state.dtype == QB_F16) limit(t.line, a.d_state);
        write_row(state_row(a, first + c), 0, batch * a.channels + first + c, 0, a.d_state, t.line);
    }
}

/// Steps, inputs, and D u in y, of a token of the tile.
static void read_token(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t token, int64_t first,
                       int64_t count, int64_t slot) {
    const bool kept = !a.mask || a.mask[batch * a.length + token];
    read_row(t.row, a.dt, batch, token, first, count);
    for (int64_t b = 0; b * kFloats < count; ++b) {
        const vf delta = vsoftplus(loadf(t.row + b * kFloats) + loadf(t.bias + b * kFloats));
        store(t.delta + (b * t.tokens + slot) * kFloats, kept ? delta : vf{});
    }
    read_row(t.row, a.u, batch, token, first, count);
    for (int64_t b = 0; b * kFloats < count; ++b) {
        const int64_t at = (b * t.tokens + slot) * kFloats;
        const vf u = loadf(t.row + b * kFloats);
        store(t.input + at, loadf(t.delta + at) * u);
        store(t.y + at, u * loadf(t.D + b * kFloats));
    }
    for (int64_t n = a.d_state; n < t.states; ++n) t.B[slot * t.states + n] = t.C[slot * t.states + n] = 0.0f;
    read_row(t.B + slot * t.states, a.B, batch, token, 0, a.d_state);
    read_row(t.C + slot * t.states, a.C, batch, token, 0, a.d_state);
}

static void write_token(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t token, int64_t first,
                        int64_t count, int64_t slot) {
    if (a.z.data) read_row(t.row, a.z, batch, token, first, count);
    for (int64_t b = 0; b * kFloats < count; ++b) {
        const vf y = loadf(t.y + (b * t.tokens + slot) * kFloats);
        store(t.row + b * kFloats, a.z.data ? y * vsilu(loadf(t.row + b * kFloats)) : y);
    }
    write_row(a.y, batch, token, first, count, t.row);
}

/// kStates states of kFloats channels over the tokens of the tile.
static void scan_block(const Tile &t, int64_t tokens, int64_t block, int64_t from) {
    const float *delta = t.delta + block * t.tokens * kFloats, *input = t.input + block * t.tokens * kFloats;
    float *y = t.y + block * t.tokens * kFloats;
    const float *rate = t.rate + (block * t.states + from) * kFloats;
    float *state = t.state + (block * t.states + from) * kFloats;
    vf h[kStates];
    QB_UNROLL
    for (int n = 0; n < kStates; ++n) h[n] = loadf(state + n * kFloats);
    for (int64_t s = 0; s < tokens; ++s) {
        const float *B = t.B + s * t.states + from, *C = t.C + s * t.states + from;
        const vf d = loadf(delta + s * kFloats), x = loadf(input + s * kFloats);
        vf sums[2] = {loadf(y + s * kFloats), vf{}};
        QB_UNROLL
        for (int n = 0; n < kStates; ++n) {
            h[n] = vdecay(d, loadf(rate + n * kFloats)) * h[n] + x * B[n];
            sums[n % 2] += h[n] * C[n];
        }
        store(y + s * kFloats, sums[0] + sums[1]);
    }
    QB_UNROLL
    for (int n = 0; n < kStates; ++n) store(state + n * kFloats, h[n]);
}

static void scan_tile(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    load_tile(a, t, batch, first, count);
    for (int64_t begin = 0; begin < a.length; begin += t.tokens) {
        const int64_t tokens = least(t.tokens, a.length - begin);
        for (int64_t s = 0; s < tokens; ++s) read_token(a, t, batch, begin + s, first, count, s);
        for (int64_t b = 0; b * kFloats < count; ++b)
            for (int64_t from = 0; from < t.states; from += kStates) scan_block(t, tokens, b, from);
        for (int64_t s = 0; s < tokens; ++s) write_token(a, t, batch, begin + s, first, count, s);
    }
    if (a.state.data) store_state(a, t, batch, first, count);
}

/// Where the scales of a channel's states begin, among those of all.
QB_INLINE int64_t scales_of(const QbState &s, int64_t channel) {
    return (s.group ? s.group[channel] : s.scale_rows > 1 ? channel : 0) * s.scale_columns;
}

/// The states of channels as floats, as they lie in memory.
static void load_lines(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    const QbState &s = a.state;
    const int64_t from = (batch * a.channels + first) * a.d_state, values = count * a.d_state;
    if (!s.data) {
        for (int64_t i = 0; i < values; ++i) t.state[i] = 0.0f;
    } else if (s.scale) {
        const int8_t *codes = (const int8_t *)s.data + from;
        for (int64_t c = 0; c < count; ++c) {
            const float *scale = s.scale + scales_of(s, first + c);
            for (int64_t n = c * a.d_state; n < (c + 1) * a.d_state; n += kFloats) {
                const vf step = s.scale_columns > 1 ? loadf(scale + n - c * a.d_state) : splat(*scale);
                store(t.state + n, to_float(widen(codes + n)) * step);
            }
        }
    } else {
        const QbTensor all = {s.data, nullptr, 0, 0, s.dtype, 0};
        read_row(t.state, all, 0, 0, from, values);
    }
}

static void store_lines(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    const QbState &s = a.state;
    const int64_t from = (batch * a.channels + first) * a.d_state, values = count * a.d_state;
    if (s.scale) {
        int8_t *codes = (int8_t *)s.data + from;
        for (int64_t c = 0; c < count; ++c) {
            const float *inverse = t.inverse + scales_of(s, first + c);
            for (int64_t n = c * a.d_state; n < (c + 1) * a.d_state; n += kFloats) {
                const vf steps = loadf(t.state + n) * (s.scale_columns > 1 ? loadf(inverse + n - c * a.d_state)
                                                                           : splat(*inverse));
                narrow(codes + n, round_even(vmin(vmax(steps, splat(-128.0f)), splat(127.0f))));
            }
        }
        return;
    }
    if (s.dtype == QB_F16) limit(t.state, values);
    const QbTensor all = {s.data, nullptr, 0, 0, s.dtype, 0};
    write_row(all, 0, 0, from, values, t.state);
}

/// One token of kFloats channels of a tile with states as they lie in memory, in kVectors.
template <int kVectors>
static void step_block(const QbSelectiveScan &a, const Tile &t, int64_t slot, int64_t first, int64_t count,
                       int64_t block) {
    const int64_t at = (block * t.tokens + slot) * kFloats, n_state = kVectors * kFloats;
    const int64_t lanes = least(count - block * kFloats, (int64_t)kFloats);
    const float *rate = a.A + (first + block * kFloats) * n_state;
    float *state = t.state + block * kFloats * n_state;
    vf B[kVectors], C[kVectors];
    for (int n = 0; n < kVectors; ++n) {
        B[n] = loadf(t.B + slot * t.states + n * kFloats);
        C[n] = loadf(t.C + slot * t.states + n * kFloats);
    }
    float scaled[kFloats];
    store(scaled, loadf(t.delta + at) * kLog2E);
    vf products[kFloats] = {};
    for (int64_t i = 0; i < lanes; ++i) {
        const vf time = splat(scaled[i]), input = splat(t.input[at + i]);
        vf product = {};
        for (int n = 0; n < kVectors; ++n) {
            float *p = state + i * n_state + n * kFloats;
            const vf h = vdecay(time, loadf(rate + i * n_state + n * kFloats)) * loadf(p) + input * B[n];
            store(p, h);
            product += h * C[n];
        }
        products[i] = product;
    }
    store(t.y + at, loadf(t.y + at) + sums_of(products));
}

/// The vectors of states that step_block has been made for; 0 for other sizes.
static int64_t step_vectors(int64_t d_state) {
    const int64_t vectors = d_state / kFloats;
    return d_state % kFloats || vectors == 3 || vectors > 4 ? 0 : vectors;
}

static void step_tile(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    const int64_t vectors = step_vectors(a.d_state);
    const auto step = vectors == 1 ? step_block<1> : vectors == 2 ? step_block<2> : step_block<4>;
    load_lines(a, t, batch, first, count);
    for (int64_t s = 0; s < a.length; ++s) {
        read_token(a, t, batch, s, first, count, s);
        for (int64_t b = 0; b * kFloats < count; ++b) step(a, t, s, first, count, b);
        write_token(a, t, batch, s, first, count, s);
    }
    if (a.state.data) store_lines(a, t, batch, first, count);
}

void selective_scan(const void *args) {
    const QbSelectiveScan &a = *(const QbSelectiveScan *)args;
    const bool few = a.length <= kFew && step_vectors(a.d_state);
    const int64_t width = few ? kFewChannels : kChannels, tokens = few ? kFew : kTokens;
    const int64_t tiles = (a.channels + width - 1) / width, total = a.batch * tiles;
    float *inverse = nullptr;
    if (few && a.state.scale) {
        const int64_t scales = a.state.scale_rows * a.state.scale_columns;
        inverse = (float *)quamba::scratch(4, 4 * scales);
        for (int64_t i = 0; i < scales; ++i) inverse[i] = 1.0f / a.state.scale[i];
    }
    const int64_t together = part_size(total, few ? 4 : 1, 1);
    each((total + together - 1) / together, [&](int64_t part) {
        const Tile t = tile_of(a, width, tokens, inverse);
        const int64_t end = least((part + 1) * together, total);
        for (int64_t i = part * together; i < end; ++i) {
            const int64_t first = i % tiles * width, count = least(width, a.channels - first);
            fill(t, t.bias, a.dt_bias, first, count);
            fill(t, t.D, a.D, first, count);
            (few ? step_tile : scan_tile)(a, t, i / tiles, first, count);
        }
    });
}

}  // namespace QB_ISA
