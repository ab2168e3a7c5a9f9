// Mamba1's scan. A vector is kFloats channels, and their states stay in registers from token to token; for a few
// tokens, a vector is kFloats states of a channel, as they lie in memory.
#include "simd.h"

namespace QB_ISA {

constexpr int64_t kBlocks = 64 / kFloats;       // of kFloats channels in a tile
constexpr int64_t kChannels = kBlocks * kFloats;  // of a tile
constexpr int64_t kTokens = 64;                 // of a tile
constexpr int kStates = kFloats == 8 ? 4 : 16;  // of each channel, in registers at a time
constexpr int64_t kFew = 3;                     // tokens

/// What a part works on, in its scratch memory; channels that are not there have zeros.
struct Tile {
    float *delta, *input, *y;  // [kBlocks][kTokens][kFloats]; input: delta * u
    float *rate, *state;       // [kBlocks][states][kFloats]; rate: A for powers of two
    float *B, *C;              // [kTokens][states]
    float *bias, *D, *row;     // [kChannels]
    float *line;               // [states]
    int64_t states;            // d_state in whole kStates
};

static Tile tile_of(const QbSelectiveScan &a) {
    Tile t;
    t.states = (a.d_state + kStates - 1) / kStates * kStates;
    const int64_t values = kTokens * kChannels, channels = kChannels * t.states, shared = kTokens * t.states;
    float *p = (float *)quamba::scratch(0, 4 * (3 * values + 2 * channels + 2 * shared + 3 * kChannels + t.states));
    t.delta = p;
    t.input = t.delta + values;
    t.y = t.input + values;
    t.rate = t.y + values;
    t.state = t.rate + channels;
    t.B = t.state + channels;
    t.C = t.B + shared;
    t.bias = t.C + shared;
    t.D = t.bias + kChannels;
    t.row = t.D + kChannels;
    t.line = t.row + kChannels;
    return t;
}

static void fill(float *p, const float *values, int64_t first, int64_t count) {
    for (int64_t i = 0; i < kChannels; ++i) p[i] = values && i < count ? values[first + i] : 0.0f;
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
    fill(t.bias, a.dt_bias, first, count);
    fill(t.D, a.D, first, count);
    for (int64_t i = 0; i < kChannels * t.states; ++i) t.rate[i] = t.state[i] = 0.0f;
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
    for (int64_t b = 0; b < kBlocks; ++b) {
        const vf delta = vsoftplus(loadf(t.row + b * kFloats) + loadf(t.bias + b * kFloats));
        store(t.delta + (b * kTokens + slot) * kFloats, kept ? delta : vf{});
    }
    read_row(t.row, a.u, batch, token, first, count);
    for (int64_t b = 0; b < kBlocks; ++b) {
        const int64_t at = (b * kTokens + slot) * kFloats;
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
    for (int64_t b = 0; b < kBlocks; ++b) {
        const vf y = loadf(t.y + (b * kTokens + slot) * kFloats);
        store(t.row + b * kFloats, a.z.data ? y * vsilu(loadf(t.row + b * kFloats)) : y);
    }
    write_row(a.y, batch, token, first, count, t.row);
}

/// kStates states of kFloats channels over the tokens of the tile.
static void scan_block(const Tile &t, int64_t tokens, int64_t block, int64_t from) {
    const float *delta = t.delta + block * kTokens * kFloats, *input = t.input + block * kTokens * kFloats;
    float *y = t.y + block * kTokens * kFloats;
    const float *rate = t.rate + (block * t.states + from) * kFloats;
    float *state = t.state + (block * t.states + from) * kFloats;
    vf h[kStates];
    for (int n = 0; n < kStates; ++n) h[n] = loadf(state + n * kFloats);
    for (int64_t s = 0; s < tokens; ++s) {
        const float *B = t.B + s * t.states + from, *C = t.C + s * t.states + from;
        const vf d = loadf(delta + s * kFloats), x = loadf(input + s * kFloats);
        vf sums[2] = {loadf(y + s * kFloats), vf{}};
        for (int n = 0; n < kStates; ++n) {
            h[n] = vdecay(d, loadf(rate + n * kFloats)) * h[n] + x * B[n];
            sums[n % 2] += h[n] * C[n];
        }
        store(y + s * kFloats, sums[0] + sums[1]);
    }
    for (int n = 0; n < kStates; ++n) store(state + n * kFloats, h[n]);
}

static void scan_tile(const QbSelectiveScan &a, const Tile &t, int64_t batch, int64_t first, int64_t count) {
    for (int64_t i = 0; i < kChannels; ++i) t.row[i] = 0.0f;
    load_tile(a, t, batch, first, count);
    for (int64_t begin = 0; begin < a.length; begin += kTokens) {
        const int64_t tokens = least(kTokens, a.length - begin);
        for (int64_t s = 0; s < tokens; ++s) read_token(a, t, batch, begin + s, first, count, s);
        for (int64_t b = 0; b * kFloats < count; ++b)
            for (int64_t from = 0; from < t.states; from += kStates) scan_block(t, tokens, b, from);
        for (int64_t s = 0; s < tokens; ++s) write_token(a, t, batch, begin + s, first, count, s);
    }
    if (a.state.data) store_state(a, t, batch, first, count);
}

void selective_scan(const void *args) {
    const QbSelectiveScan &a = *(const QbSelectiveScan *)args;
    const int64_t tiles = (a.channels + kChannels - 1) / kChannels, total = a.batch * tiles;
    const int64_t together = part_size(total, 1 + 16 / a.length, 1);
    each((total + together - 1) / together, [&](int64_t part) {
        const Tile t = tile_of(a);
        const int64_t end = least((part + 1) * together, total);
        for (int64_t i = part * together; i < end; ++i) {
            const int64_t first = i % tiles * kChannels;
            scan_tile(a, t, i / tiles, first, least(kChannels, a.channels - first));
        }
    });
}

}  // namespace QB_ISA
