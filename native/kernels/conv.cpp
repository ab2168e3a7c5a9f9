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

template <bool VALUE>
struct Flag {
    static constexpr bool value = VALUE;
};

/// As it is stored, zeros beyond count.
template <int DTYPE, bool WHOLE>
QB_INLINE vf read(const char *p, int count) {
    if (WHOLE) return read_vector<DTYPE>(p);
    char all[kBytes] = {};
    __builtin_memcpy(all, p, (size_t)(count * bytes_of(DTYPE)));
    return read_vector<DTYPE>(all);
}

template <int DTYPE>
QB_INLINE void write_vector(char *p, vf v, int rounding) {
    if (DTYPE == QB_F32) store(p, v);
    if (DTYPE == QB_BF16) to_bf16((uint16_t *)p, v);
    if (DTYPE == QB_F16) to_f16((uint16_t *)p, v);
    if (DTYPE == QB_I8 && rounding == QB_HALF_EVEN) narrow_saturated((int8_t *)p, v);
    if (DTYPE == QB_I8 && rounding != QB_HALF_EVEN)
        narrow((int8_t *)p, codes_of(v, splat(1.0f), rounding, QB_SATURATE));
}

template <int DTYPE, bool WHOLE>
QB_INLINE void write(char *p, vf v, int count, int rounding) {
    if (WHOLE) return write_vector<DTYPE>(p, v, rounding);
    char all[kBytes];
    write_vector<DTYPE>(all, v, rounding);
    __builtin_memcpy(p, all, (size_t)(count * bytes_of(DTYPE)));
}

/// count values from p, or `other` if there is none, one for all channels (step 0) or one each.
template <bool WHOLE>
QB_INLINE vf values(const float *p, int64_t first, int count, int step, float other) {
    if (!p) return splat(other);
    if (!step) return splat(*p);
    if (WHOLE) return loadf(p + first);
    vf v = splat(other);
    __builtin_memcpy(&v, p + first, (size_t)count * 4);
    return v;
}

/// What is done to the inputs of up to a vector of channels.
template <int IN, int OUT, bool WHOLE>
struct Filter {
    vf taps[kTaps] = {}, step, bias, per_code;

    Filter(const QbConv &op, int64_t first, int count) {
        for (int64_t w = 0; w < op.width; ++w)
            taps[kTaps - op.width + w] = values<WHOLE>(op.weight + w * op.channels, first, count, 1, 0.0f);
        step = values<WHOLE>(op.product_scale, first, count, op.product_step, 1.0f);
        bias = values<WHOLE>(op.bias, first, count, 1, 0.0f);
        if (OUT == QB_I8) per_code = vreciprocal(values<WHOLE>(op.y.scale, first, count, op.y.scale_step, 1.0f));
    }

    vf operator()(vf a, vf b, vf c, vf d) const {
        vf sum = a * taps[0];
        sum = b * taps[1] + sum;
        sum = c * taps[2] + sum;
        sum = d * taps[3] + sum;
        if (IN == QB_I8) sum = sum * step;
        const vf y = vsilu(sum + bias);
        return OUT == QB_I8 ? y * per_code : y;
    }
};

/// Channels [first, first + count), count up to a vector, of tokens [start, stop) of one sequence.
template <int IN, int OUT, bool WHOLE>
static void walk(const QbConv &op, int64_t b, int64_t first, int count, int64_t start, int64_t stop) {
    const char *x = (const char *)op.x.data + bytes_of(IN) * (b * op.x.batch_stride + first);
    const int64_t x_step = bytes_of(IN) * op.x.token_stride;
    char *y = (char *)op.y.data + bytes_of(OUT) * (b * op.y.batch_stride + first);
    const int64_t y_step = bytes_of(OUT) * op.y.token_stride;
    const uint8_t *mask = op.mask ? op.mask + b * op.length : nullptr;
    const Filter<IN, OUT, WHOLE> filter(op, first, count);
    const int rounding = op.rounding;
    vf before[kTaps - 1] = {};
    for (int64_t i = 1; i < op.width; ++i) {
        const int64_t t = start - i;
        vf &v = before[kTaps - 1 - i];
        if (t >= 0) {
            if (!mask || mask[t]) v = read<IN, WHOLE>(x + t * x_step, count);
        } else if (op.state.data) {
            v = read<IN, WHOLE>(at(op.state, b, op.width - 1 + t) + bytes_of(IN) * first, count);
        }
    }
    vf a = before[0], c = before[1], d = before[2];
    for (int64_t t = start; t < stop; ++t) {
        const bool kept = !mask || mask[t];
        // The next channels of a token: its neighbours in memory are of other tokens, where no processor looks ahead.
        __builtin_prefetch(x + t * x_step + kLine);
        __builtin_prefetch(y + t * y_step + kLine, 1);
        vf v = read<IN, WHOLE>(x + t * x_step, count);
        if (!kept) v = vf{};
        vf out = filter(a, c, d, v);
        a = c;
        c = d;
        d = v;
        if (!kept) out = vf{};
        write<OUT, WHOLE>(y + t * y_step, out, count, rounding);
    }
}

/// The same for channels [from, to) of the only token, with a state of kTaps - 1 inputs.
template <int IN, int OUT>
static void walk_one(const QbConv &op, int64_t b, int64_t from, int64_t to) {
    const char *old = at(op.state, b, 0), *x = at(op.x, b, 0);
    const int64_t step = bytes_of(IN) * op.state.token_stride;
    char *y = const_cast<char *>(at(op.y, b, 0));
    const QbConv own = op;  // what is written could be a part of op, for all that the compiler knows
    const auto some = [&](auto whole, int64_t c, int count) {
        constexpr bool WHOLE = decltype(whole)::value;
        const Filter<IN, OUT, WHOLE> filter(own, c, count);
        const int64_t at = bytes_of(IN) * c;
        const vf out = filter(read<IN, WHOLE>(old + at, count), read<IN, WHOLE>(old + step + at, count),
                              read<IN, WHOLE>(old + 2 * step + at, count), read<IN, WHOLE>(x + at, count));
        write<OUT, WHOLE>(y + bytes_of(OUT) * c, out, count, own.rounding);
    };
    int64_t c = from;
    for (; c + kFloats <= to; c += kFloats) some(Flag<true>(), c, kFloats);
    if (c < to) some(Flag<false>(), c, (int)(to - c));
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
    const bool one = op.length == 1 && op.width == kTaps && op.state.data && !op.mask;
    each(op.batch * slabs * tiles, [&](int64_t i) {
        const int64_t b = i / (slabs * tiles), start = i / tiles % slabs * tokens;
        const int64_t from = i % tiles * tile, to = least(from + tile, op.channels);
        const int64_t stop = least(start + tokens, op.length);
        if (one) {
            walk_one<IN, OUT>(op, b, from, to);
        } else {
            int64_t c = from;
            for (; c + kFloats <= to; c += kFloats) walk<IN, OUT, true>(op, b, c, kFloats, start, stop);
            if (c < to) walk<IN, OUT, false>(op, b, c, (int)(to - c), start, stop);
        }
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
