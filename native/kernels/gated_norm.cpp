// Mamba2's gated norm and the Hadamard rotation after it; either alone, too.
#include "simd.h"

namespace QB_ISA {

constexpr int kVectors = kFloats == 8 ? 8 : 16;  // of a row, in registers at a time

/// Sylvester's matrix of kFloats times the lanes of v.
template <int kStep = 1>
QB_INLINE vf rotate_lanes(vf v) {
    if constexpr (kStep < kFloats) {
        const vf sign = (lanes() & kStep) ? splat(-1.0f) : splat(1.0f);
        return rotate_lanes<2 * kStep>(swap_lanes<kStep>(v) + v * sign);
    } else {
        return v;
    }
}

/// Butterflies between kCount vectors, each `stride` vectors after the one before, in all of `vectors`.
template <int kCount, bool kLanes>
static void butterflies(float *v, int64_t vectors, int64_t stride) {
    for (int64_t base = 0; base < vectors; base += kCount * stride)
        for (int64_t first = base; first < base + stride; ++first) {
            float *p = v + kFloats * first;
            vf r[kCount];
            for (int i = 0; i < kCount; ++i) {
                r[i] = loadf(p + kFloats * stride * i);
                if (kLanes) r[i] = rotate_lanes(r[i]);
            }
            for (int step = 1; step < kCount; step *= 2)
                for (int i = 0; i < kCount; ++i)
                    if (!(i & step)) {
                        const vf a = r[i], b = r[i + step];
                        r[i] = a + b;
                        r[i + step] = a - b;
                    }
            for (int i = 0; i < kCount; ++i) store(p + kFloats * stride * i, r[i]);
        }
}

template <bool kLanes>
static int64_t butterflies_of(float *v, int64_t vectors, int64_t stride) {
    const int64_t left = vectors / stride;
    if (kVectors == 16 && left >= 16) return butterflies<16, kLanes>(v, vectors, stride), 16;
    if (left >= 8) return butterflies<8, kLanes>(v, vectors, stride), 8;
    if (left >= 4) return butterflies<4, kLanes>(v, vectors, stride), 4;
    if (left >= 2) return butterflies<2, kLanes>(v, vectors, stride), 2;
    return butterflies<1, kLanes>(v, vectors, stride), 1;
}

/// Sylvester's matrix of `size`, a power of two, times v.
static void sylvester(float *v, int64_t size) {
    if (size < kFloats) {
        for (int64_t step = 1; step < size; step *= 2)
            for (int64_t i = 0; i < size; ++i)
                if (!(i & step)) {
                    const float a = v[i], b = v[i + step];
                    v[i] = a + b;
                    v[i + step] = a - b;
                }
        return;
    }
    const int64_t vectors = size / kFloats;
    int64_t stride = butterflies_of<true>(v, vectors, 1);
    while (stride < vectors) stride *= butterflies_of<false>(v, vectors, stride);
}

/// out[i, c] = sum over j of signs[i, j] * v[j, c], for columns [first, first + kWide vectors) of rows of `size`.
template <int kWide>
static void paley_columns(const QbGatedNorm &a, const float *v, float *out, int64_t size, int64_t first) {
    const int64_t m = a.paley_order;
    const int64_t across = a.rotate == 2 ? 1 : m, along = a.rotate == 2 ? m : 1;
    for (int64_t i = 0; i < m; i += 4) {
        vf total[4][kWide] = {};
        for (int64_t j = 0; j < m; ++j) {
            const float *sign = a.paley + i * across + j * along;
            for (int w = 0; w < kWide; ++w) {
                const vf x = loadf(v + j * size + first + kFloats * w);
                for (int r = 0; r < 4; ++r) total[r][w] += sign[r * across] * x;
            }
        }
        for (int r = 0; r < 4; ++r)
            for (int w = 0; w < kWide; ++w) store(out + (i + r) * size + first + kFloats * w, total[r][w]);
    }
}

static void paley(const QbGatedNorm &a, const float *v, float *out, int64_t size) {
    const int64_t m = a.paley_order;
    int64_t c = 0;
    for (; c + 4 * kFloats <= size; c += 4 * kFloats) paley_columns<4>(a, v, out, size, c);
    for (; c + kFloats <= size; c += kFloats) paley_columns<1>(a, v, out, size, c);
    for (; c < size; ++c)  // rows shorter than a vector
        for (int64_t i = 0; i < m; ++i) {
            float total = 0.0f;
            for (int64_t j = 0; j < m; ++j)
                total += (a.rotate == 2 ? a.paley[j * m + i] : a.paley[i * m + j]) * v[j * size + c];
            out[i * size + c] = total;
        }
}

/// The rotation of v, but for its factor 1 / sqrt(columns); where it lies afterwards, v or other.
static float *rotate(const QbGatedNorm &a, float *v, float *other) {
    const int64_t m = a.paley_order, size = a.columns / m;
    for (int64_t i = 0; i < m; ++i) sylvester(v + i * size, size);
    float *from = v;
    if (m > 1) {
        paley(a, v, other, size);
        from = other;
    }
    return from;
}

static float *scaled(float *v, int64_t count) {
    const float scale = (float)(1.0 / __builtin_sqrt((double)count));
    for (int64_t i = 0; i < padded(count); i += kFloats) store(v + i, loadf(v + i) * scale);
    return v;
}

/// Channels that are gated at a time: what is read of z stays in the L1 cache beside all of v.
constexpr int64_t kPiece = 512;

/// v = x * silu(z) of one row, v may be x; the sum of its squares. x: whole vectors, zeros at the end.
static float gate(const QbGatedNorm &a, int64_t row, const float *x, float *v) {
    float z[kPiece];
    vf squares = {};
    for (int64_t first = 0; first < a.columns; first += kPiece) {
        const int64_t count = least(kPiece, a.columns - first);
        for (int64_t i = count; i < padded(count); ++i) z[i] = 0.0f;
        read_row(z, a.z, 0, row, first, count);
        for (int64_t i = 0; i < count; i += kFloats) {
            const vf y = loadf(x + first + i) * vsilu(loadf(z + i));
            store(v + first + i, y);
            squares += y * y;
        }
    }
    return sum(squares);
}

static float squares_of(const float *v, int64_t count) {
    vf squares = {}, more = {};
    int64_t i = 0;
    for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
        squares += loadf(v + i) * loadf(v + i);
        more += loadf(v + i + kFloats) * loadf(v + i + kFloats);
    }
    for (; i < count; i += kFloats) {
        const vf x = load_upto(v + i, count - i);
        squares += x * x;
    }
    return sum(squares + more);
}

/// v / sqrt(mean of squares + eps) * weight * scale, in place.
static void normalise(float *v, const float *weight, int64_t count, float squares, float eps, float scale) {
    const float factor = scale / __builtin_sqrtf(squares / (float)count + eps);
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats)
        store(v + i, loadf(v + i) * factor * (weight ? loadf(weight + i) : splat(1.0f)));
    for (; i < count; ++i) v[i] *= factor * (weight ? weight[i] : 1.0f);
}

/// What a.rotate and the norm before it leave of one row: in v or other. y: the row as floats, or v.
static const float *norm_row(const QbGatedNorm &a, int64_t row, const float *y, float *v, float *other) {
    const int64_t n = a.columns;
    // The rotation's factor goes with that of the norm.
    const float scale = a.rotate ? (float)(1.0 / __builtin_sqrt((double)n)) : 1.0f;
    if (!a.norm_before_gate) {
        const float squares = gate(a, row, y, v);
        for (int64_t g = 0; g < n; g += a.group_size)
            normalise(v + g, a.weight ? a.weight + g : nullptr, a.group_size,
                      a.group_size == n ? squares : squares_of(v + g, a.group_size), a.eps, scale);
    } else {
        if (y != v) __builtin_memcpy(v, y, (size_t)(4 * n));
        for (int64_t g = 0; g < n; g += a.group_size)
            normalise(v + g, a.weight ? a.weight + g : nullptr, a.group_size, squares_of(v + g, a.group_size), a.eps,
                      scale);
        gate(a, row, v, v);
    }
    return a.rotate ? rotate(a, v, other) : v;
}

void gated_norm(const void *args) {
    const QbGatedNorm &a = *(const QbGatedNorm *)args;
    const int64_t n = a.columns, whole = padded(n);
    const int64_t together = part_size(a.rows, 1 + 8192 / n, 1);
    each((a.rows + together - 1) / together, [&](int64_t part) {
        float *v = (float *)quamba::scratch(0, 4 * whole);
        float *other = (float *)quamba::scratch(1, 4 * whole);
        for (int64_t i = n; i < whole; ++i) v[i] = other[i] = 0.0f;
        const int64_t end = least((part + 1) * together, a.rows);
        for (int64_t row = part * together; row < end; ++row) {
            const bool floats = a.z.data && a.y.dtype == QB_F32 && n == whole;
            const float *y = floats ? (const float *)at(a.y, 0, row) : v;
            if (!floats) read_row(v, a.y, 0, row, 0, n);
            const float *result = v;
            if (a.z.data)
                result = norm_row(a, row, y, v, other);
            else if (a.rotate)
                result = scaled(rotate(a, v, other), n);
            write_row(a.out, 0, row, 0, n, result, a.rounding, a.overflow);
        }
    });
}

}  // namespace QB_ISA
