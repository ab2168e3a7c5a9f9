#include "simd.h"

namespace QB_ISA {

static float scale_at(const QbEmbedding &a, int64_t row, int64_t group) {
    const int64_t at = (a.scale_rows == 1 ? 0 : row * a.groups) + group;
    return a.scale_dtype == QB_F16 ? f16_value(((const uint16_t *)a.scale)[at]) : ((const float *)a.scale)[at];
}

static void look_up(const QbEmbedding &a, int64_t token, float *out) {
    const int64_t row = a.ids[token];
    if (a.bits == 32 || a.bits == 16) {
        const QbTensor table = {(void *)a.weight, nullptr, 0, a.columns, a.scale_dtype, 0};
        read_row(out, table, 0, row, 0, a.columns);
        return;
    }
    const int64_t width = a.columns / a.groups;
    if (a.bits == 4) {
        const uint8_t *bytes = (const uint8_t *)a.weight + row * (a.columns / 2);
        for (int64_t i = 0; i < a.columns / 2; ++i) {
            out[2 * i] = (float)(((bytes[i] & 15) ^ 8) - 8);
            out[2 * i + 1] = (float)(((bytes[i] >> 4) ^ 8) - 8);
        }
    } else {
        const int8_t *codes = (const int8_t *)a.weight + row * a.columns;
        for (int64_t i = 0; i < a.columns; ++i) out[i] = (float)codes[i];
    }
    for (int64_t g = 0; g < a.groups; ++g) {
        const float scale = scale_at(a, row, g);
        for (int64_t i = g * width; i < (g + 1) * width; ++i) out[i] *= scale;
    }
}

void embedding(const void *args) {
    const QbEmbedding &a = *(const QbEmbedding *)args;
    const int64_t together = part_size(a.rows, 1 + 32768 / a.columns, 1);
    each((a.rows + together - 1) / together, [&](int64_t part) {
        float *out = (float *)quamba::scratch(0, 4 * a.columns);
        const int64_t end = least((part + 1) * together, a.rows);
        for (int64_t token = part * together; token < end; ++token) {
            look_up(a, token, out);
            write_row(a.y, 0, token, 0, a.columns, out);
        }
    });
}

}  // namespace QB_ISA
