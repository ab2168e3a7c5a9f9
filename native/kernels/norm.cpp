#include "simd.h"

namespace QB_ISA {

/// v (count floats, zeros up to whole vectors) in place: divided by the root of its mean square, weighted.
static void normalise(const QbAddNorm &a, float *v) {
    const int64_t n = a.columns;
    if (a.center) {
        vf total = {};
        for (int64_t i = 0; i < n; i += kFloats) total += loadf(v + i);
        const float mean = sum(total) / (float)n;
        for (int64_t i = 0; i < n; i += kFloats) store_upto(v + i, loadf(v + i) - mean, n - i);
    }
    vf squares = {}, more = {};
    int64_t i = 0;
    for (; i + kFloats < n; i += 2 * kFloats) {
        squares += loadf(v + i) * loadf(v + i);
        more += loadf(v + i + kFloats) * loadf(v + i + kFloats);
    }
    for (; i < n; i += kFloats) squares += loadf(v + i) * loadf(v + i);
    const float factor = 1.0f / __builtin_sqrtf(sum(squares + more) / (float)n + a.eps);
    for (i = 0; i < n; i += kFloats) {
        vf y = loadf(v + i) * factor;
        if (a.weight) y *= load_upto(a.weight + i, n - i);
        if (a.bias) y += load_upto(a.bias + i, n - i);
        store(v + i, y);
    }
}

static void one_row(const QbAddNorm &a, int64_t row, float *v, float *other) {
    const int64_t n = a.columns, whole = padded(n);
    for (int64_t i = n; i < whole; ++i) v[i] = other[i] = 0.0f;
    read_row(v, a.x, 0, row, 0, n);
    if (a.residual.data) {
        read_row(other, a.residual, 0, row, 0, n);
        round_to(a.residual.dtype, v, whole);
        for (int64_t i = 0; i < whole; i += kFloats) store(v + i, loadf(v + i) + loadf(other + i));
        round_to(a.residual.dtype, v, whole);
    }
    round_to(a.sum.dtype, v, whole);
    if (a.sum.data) write_row(a.sum, 0, row, 0, n, v);
    normalise(a, v);
    write_row(a.y, 0, row, 0, n, v);
}

void add_norm(const void *args) {
    const QbAddNorm &a = *(const QbAddNorm *)args;
    const int64_t together = part_size(a.rows, 1 + 16384 / a.columns, 1);
    each((a.rows + together - 1) / together, [&](int64_t part) {
        float *v = (float *)quamba::scratch(0, 4 * padded(a.columns));
        float *other = (float *)quamba::scratch(1, 4 * padded(a.columns));
        const int64_t end = least((part + 1) * together, a.rows);
        for (int64_t row = part * together; row < end; ++row) one_row(a, row, v, other);
    });
}

}  // namespace QB_ISA
