// Mamba1's scan. A vector is kFloats channels, and their states stay in registers from token to token; for one token
// a vector is kFloats states of a channel, as they lie in memory.
#include "simd.h"

namespace QB_ISA {

// A tile of a prompt: some channels, and tokens until there are this many values of each kind. Reading rows in longer
// pieces costs less; the number of tokens is odd, or the blocks of a tile would share sets of the cache.
constexpr int64_t kValues = 8192, kMostChannels = 256, kLeastChannels = 64;
constexpr int64_t kStepChannels = 256;  // of a tile of one token
constexpr int kStates = kFloats == 8 ? 4 : 16;  // of each channel, in registers at a time

/// What a part works on, in its scratch memory; channels that are not there have zeros.
struct Tile {
    int64_t channels, tokens;   // that have room, channels in whole vectors
    int64_t states;             // d_state in whole kStates
    float *delta, *input, *y;   // [channels / kFloats][tokens][kFloats]; input: delta * u
    float *rate, *state;        // [channels / kFloats][states][kFloats]
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

/// Asks for what is read later: rows are pages apart, which processors do not foresee.
static void prefetch(const QbTensor &t, int64_t batch, int64_t token, int64_t first, int64_t count) {
    const int64_t size = t.dtype == QB_F32 ? 4 : t.dtype == QB_I8 ? 1 : 2;
    const char *row = at(t, batch, token) + size * first;
    for (int64_t i = 0; i < size * count; i += 64) __builtin_prefetch(row + i, 0, 2);
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
    const QbTensor *inputs[] = {&a.u, &a.dt, &a.z};
    const int64_t blocks = padded(count) / kFloats;
    load_tile(a, t, batch, first, count);
    for (int64_t begin = 0; begin < a.length; begin += t.tokens) {
        const int64_t tokens = least(t.tokens, a.length - begin), later = begin + tokens;
        const int64_t next = least(t.tokens, a.length - later);
        for (int64_t s = 0; s < tokens; ++s) read_token(a, t, batch, begin + s, first, count, s);
        for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t s = b * next / blocks; s < (b + 1) * next / blocks; ++s)
                for (const QbTensor *input : inputs)
                    if (input->data) prefetch(*input, batch, later + s, first, count);
            for (int64_t from = 0; from < t.states; from += kStates) scan_block(t, tokens, b, from);
        }
        for (int64_t s = 0; s < tokens; ++s) write_token(a, t, batch, begin + s, first, count, s);
    }
    if (a.state.data) store_state(a, t, batch, first, count);
}

/// Where the scales of a channel's states begin, among those of all.
QB_INLINE int64_t scales_of(const QbState &s, int64_t channel) {
    return (s.group ? s.group[channel] : s.scale_rows > 1 ? channel : 0) * s.scale_columns;
}

template <int kDtype>
QB_INLINE vf load_states(const QbState &s, int64_t at, int64_t scales) {
    if constexpr (kDtype == QB_F32) return loadf((const float *)s.data + at);
    if constexpr (kDtype == QB_F16) return from_f16((const uint16_t *)s.data + at);
    const vf step = s.scale_columns > 1 ? loadf(s.scale + scales) : splat(s.scale[scales]);
    return to_float(widen((const int8_t *)s.data + at)) * step;
}

template <int kDtype>
QB_INLINE void store_states(const QbState &s, const float *inverse, int64_t at, int64_t scales, vf h) {
    if constexpr (kDtype == QB_F32) {
        store((float *)s.data + at, h);
    } else if constexpr (kDtype == QB_F16) {
        to_f16((uint16_t *)s.data + at, vmin(vmax(h, splat(-65504.0f)), splat(65504.0f)));
    } else {
        const vf steps = h * (s.scale_columns > 1 ? loadf(inverse + scales) : splat(inverse[scales]));
        narrow((int8_t *)s.data + at, round_even(vmin(vmax(steps, splat(-128.0f)), splat(127.0f))));
    }
}

using Step = void (*)(const QbSelectiveScan &, const Tile &, int64_t, int64_t, int64_t, int64_t);

/// One token of kFloats channels of a tile, each with kVectors of states.
template <int kDtype, int kVectors>
static void step_block(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count,
                       int64_t block) {
    const int64_t begin = block * kFloats, lanes = least(count - begin, (int64_t)kFloats);
    const float *rate = a.A + (first + begin) * kVectors * kFloats;
    const int64_t at = (batch * a.channels + first + begin) * kVectors * kFloats;
    vf B[kVectors], C[kVectors];
    for (int n = 0; n < kVectors; ++n) {
        B[n] = loadf(t.B + n * kFloats);
        C[n] = loadf(t.C + n * kFloats);
    }
    float scaled[kFloats];
    store(scaled, loadf(t.delta + begin) * kLog2E);
    vf products[kFloats] = {};
    for (int64_t i = 0; i < lanes; ++i) {
        const vf time = splat(scaled[i]), input = splat(t.input[begin + i]);
        const int64_t scale = kDtype == QB_I8 ? scales_of(a.state, first + begin + i) : 0;
        vf product = {};
        for (int n = 0; n < kVectors; ++n) {
            const int64_t next = (i * kVectors + n) * kFloats;
            const int64_t scales = a.state.scale_columns > 1 ? scale + n * kFloats : scale;
            const vf before = load_states<kDtype>(a.state, at + next, scales);
            const vf h = vdecay(time, loadf(rate + next)) * before + input * B[n];
            store_states<kDtype>(a.state, t.inverse, at + next, scales, h);
            product += h * C[n];
        }
        products[i] = product;
    }
    store(t.y + begin, loadf(t.y + begin) + sums_of(products));
}

template <int kDtype>
static Step step_of(int64_t d_state) {
    return d_state == kFloats       ? step_block<kDtype, 1>
           : d_state == 2 * kFloats ? step_block<kDtype, 2>
           : d_state == 4 * kFloats ? step_block<kDtype, 4>
                                    : nullptr;
}

/// How to take one token; nullptr for sizes and formats that are taken like prompts.
static Step step_for(const QbSelectiveScan &a) {
    if (a.length != 1 || !a.state.data) return nullptr;
    if (a.state.dtype == QB_F32) return step_of<QB_F32>(a.d_state);
    if (a.state.dtype == QB_F16) return step_of<QB_F16>(a.d_state);
    return a.state.dtype == QB_I8 ? step_of<QB_I8>(a.d_state) : nullptr;
}

void selective_scan(const void *args) {
    const QbSelectiveScan &a = *(const QbSelectiveScan *)args;
    const Step step = step_for(a);
    const int64_t even = part_size(a.batch * a.channels, kLeastChannels, kLeastChannels);
    const int64_t width = step ? kStepChannels : least(even, kMostChannels);
    const int64_t tiles = (a.channels + width - 1) / width, total = a.batch * tiles;
    float *inverse = nullptr;
    if (step && a.state.scale) {
        const int64_t scales = a.state.scale_rows * a.state.scale_columns;
        inverse = (float *)quamba::scratch(4, 4 * scales);
        for (int64_t i = 0; i < scales; ++i) inverse[i] = 1.0f / a.state.scale[i];
    }
    const int64_t together = part_size(total, step ? 4 : 1, 1);
    each((total + together - 1) / together, [&](int64_t part) {
        const Tile t = tile_of(a, width, step ? 1 : kValues / width - 1, inverse);
        const int64_t end = least((part + 1) * together, total);
        for (int64_t i = part * together; i < end; ++i) {
            const int64_t batch = i / tiles, first = i % tiles * width, count = least(width, a.channels - first);
            fill(t, t.bias, a.dt_bias, first, count);
            fill(t, t.D, a.D, first, count);
            if (!step) {
                scan_tile(a, t, batch, first, count);
                continue;
            }
            read_token(a, t, batch, 0, first, count, 0);
            for (int64_t b = 0; b * kFloats < count; ++b) step(a, t, batch, first, count, b);
            write_token(a, t, batch, 0, first, count, 0);
        }
    });
}

}  // namespace QB_ISA
