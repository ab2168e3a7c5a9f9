// Causal depthwise convolution, SiLU and quantization: a vector of channels walks along the tokens, so that each
// input is read and converted once.
#include "simd.h"

namespace QB_ISA {
namespace {

constexpr int kTaps = 4;  // narrower ones get zeros before
constexpr int64_t kTokens = 64;
constexpr int64_t kLine = 64;  // channels that a part works on at once: their bytes are one line of the cache

QB_INLINE constexpr int64_t bytes_of(int dtype) { return dtype == QB_F32 ? 4 : dtype == QB_I8 ? 1 : 2; }

template <int DTYPE>
QB_INLINE vf read_vector(const char *p) {
    if (DTYPE == QB_F32) return loadf((const float *)p);
    if (DTYPE == QB_BF16) return from_bf16((const uint16_t *)p);
    if (DTYPE == QB_F16) return from_f16((const uint16_t *)p);
    return to_float(widen((const int8_t *)p));
}

/// As it is stored, zeros beyond count.
template <int DTYPE, bool WHOLE>
QB_INLINE vf read(const char *p, int count) {
    if (WHOLE) return read_vector<DTYPE>(p);
    char all[kBytes] = {};
    __builtin_memcpy(all, p, (size_t)(count * bytes_of(DTYPE)));
    return read_vector<DTYPE>(all);
}

/// int8 of steps: saturated.
QB_INLINE vi codes(vf steps, int rounding) {
    if (rounding == QB_HALF_EVEN) return round_even(vmin(vmax(steps, splat(-128.0f)), splat(127.0f)));
    return codes_of(steps, splat(1.0f), rounding, QB_SATURATE);
}

template <int DTYPE>
QB_INLINE void write_vector(char *p, vf v, int rounding) {
    if (DTYPE == QB_F32) store(p, v);
    if (DTYPE == QB_BF16) to_bf16((uint16_t *)p, v);
    if (DTYPE == QB_F16) to_f16((uint16_t *)p, v);
    if (DTYPE == QB_I8) narrow((int8_t *)p, codes(v, rounding));
}

template <int DTYPE, bool WHOLE>
QB_INLINE void write(char *p, vf v, int count, int rounding) {
    if (WHOLE) return write_vector<DTYPE>(p, v, rounding);
    char all[kBytes];
    write_vector<DTYPE>(all, v, rounding);
    __builtin_memcpy(p, all, (size_t)(count * bytes_of(DTYPE)));
}

/// count values from p, or `other` if there is none, one for all channels (step 0) or one each.
QB_INLINE vf values(const float *p, int64_t first, int count, int step, float other) {
    if (!p) return splat(other);
    if (!step) return splat(*p);
    vf v = splat(other);
    __builtin_memcpy(&v, p + first, (size_t)count * 4);
    return v;
}

/// Channels [first, first + count), count up to a vector, of tokens [start, stop) of one sequence.
template <int IN, int OUT, bool WHOLE>
static void walk(const QbConv &op, int64_t b, int64_t first, int count, int64_t start, int64_t stop) {
    const char *x = (const char *)op.x.data + bytes_of(IN) * (b * op.x.batch_stride + first);
    const int64_t x_step = bytes_of(IN) * op.x.token_stride;
    char *y = (char *)op.y.data + bytes_of(OUT) * (b * op.y.batch_stride + first);
    const int64_t y_step = bytes_of(OUT) * op.y.token_stride;
    const uint8_t *mask = op.mask ? op.mask + b * op.length : nullptr;

    vf taps[kTaps] = {}, before[kTaps - 1] = {};
    const int64_t width = op.width;
    for (int64_t w = 0; w < width; ++w)
        taps[kTaps - width + w] = values(op.weight + w * op.channels, first, count, 1, 0.0f);
    for (int64_t i = 1; i < width; ++i) {
        const int64_t t = start - i;
        vf &v = before[kTaps - 1 - i];
        if (t >= 0) {
            if (!mask || mask[t]) v = read<IN, WHOLE>(x + t * x_step, count);
        } else if (op.state.data) {
            v = read<IN, WHOLE>(at(op.state, b, width - 1 + t) + bytes_of(IN) * first, count);
        }
    }
    const vf step = values(op.product_scale, first, count, op.product_step, 1.0f);
    const vf bias = values(op.bias, first, count, 1, 0.0f);
    const vf per_code = OUT == QB_I8 ? 1.0f / values(op.y.scale, first, count, op.y.scale_step, 1.0f) : splat(1.0f);
    const int rounding = op.rounding;
    vf a = before[0], c = before[1], d = before[2];
    for (int64_t t = start; t < stop; ++t) {
        const bool kept = !mask || mask[t];
        vf v = read<IN, WHOLE>(x + t * x_step, count);
        if (!kept) v = vf{};
        vf sum = a * taps[0];
        sum = c * taps[1] + sum;
        sum = d * taps[2] + sum;
        sum = v * taps[3] + sum;
        a = c;
        c = d;
        d = v;
        if (IN == QB_I8) sum = sum * step;
        sum = sum + bias;
        vf out = vsilu(sum);
        if (OUT == QB_I8) out = out * per_code;
        if (!kept) out = vf{};
        write<OUT, WHOLE>(y + t * y_step, out, count, rounding);
    }
}

/// The last inputs of channels [first, first + count): what the state becomes.
template <int IN>
static void keep(const QbConv &op, int64_t b, int64_t first, int64_t count) {
    const size_t size = (size_t)(count * bytes_of(IN));
    for (int64_t i = 0; i < op.width - 1; ++i) {
        char *row = const_cast<char *>(at(op.state, b, i)) + bytes_of(IN) * first;
        const int64_t t = op.length - (op.width - 1) + i;
        if (t < 0)  // from the old state; upwards, so that what is read has not been overwritten
            __builtin_memcpy(row, at(op.state, b, i + op.length) + bytes_of(IN) * first, size);
        else if (op.mask && !op.mask[b * op.length + t])
            __builtin_memset(row, 0, size);
        else
            __builtin_memcpy(row, at(op.x, b, t) + bytes_of(IN) * first, size);
    }
}

template <int IN, int OUT>
static void convolve(const QbConv &op) {
    // Enough channels and tokens for some microseconds; only the first part of a sequence sees its state.
    const int64_t tokens = least(op.length, kTokens);
    const int64_t slabs = (op.length + tokens - 1) / tokens;
    const int64_t tile = part_size(op.channels, most<int64_t>(16 * 1024 / tokens, kLine), kLine);
    const int64_t tiles = (op.channels + tile - 1) / tile;
    each(op.batch * slabs * tiles, [&](int64_t i) {
        const int64_t b = i / (slabs * tiles), start = i / tiles % slabs * tokens;
        const int64_t from = i % tiles * tile, to = least(from + tile, op.channels);
        const int64_t stop = least(start + tokens, op.length);
        int64_t c = from;
        for (; c + kFloats <= to; c += kFloats) walk<IN, OUT, true>(op, b, c, kFloats, start, stop);
        if (c < to) walk<IN, OUT, false>(op, b, c, (int)(to - c), start, stop);
        if (start == 0 && op.state.data) keep<IN>(op, b, from, to - from);
    });
}

template <int IN>
static void convolve(const QbConv &op) {
    switch (op.y.dtype) {
        case QB_F32: return convolve<IN, QB_F32>(op);
        case QB_BF16: return convolve<IN, QB_BF16>(op);
        case QB_F16: return convolve<IN, QB_F16>(op);
        default: return convolve<IN, QB_I8>(op);
    }
}

}  // namespace

void conv(const void *args) {
    const QbConv &op = *(const QbConv *)args;
    switch (op.x.dtype) {
        case QB_F32: return convolve<QB_F32>(op);
        case QB_BF16: return convolve<QB_BF16>(op);
        case QB_F16: return convolve<QB_F16>(op);
        default: return convolve<QB_I8>(op);
    }
}

}  // namespace QB_ISA
