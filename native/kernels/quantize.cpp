#include "simd.h"

namespace QB_ISA {

/// Elements taken together: what is read is still in the L1 cache when it is written.
constexpr int64_t kPiece = 2048;

void quantize(const void *args) {
    const QbQuantize &a = *(const QbQuantize *)args;
    const int64_t width = least(a.columns, kPiece);
    const int64_t pieces = (a.columns + width - 1) / width, total = a.rows * pieces;
    const int64_t together = part_size(total, 16 * kPiece / width, 1);
    each((total + together - 1) / together, [&](int64_t part) {
        float *values = (float *)quamba::scratch(0, 4 * kPiece);
        const int64_t end = least((part + 1) * together, total);
        for (int64_t i = part * together; i < end; ++i) {
            const int64_t row = i / pieces, first = i % pieces * width;
            const int64_t count = least(width, a.columns - first);
            read_row(values, a.x, 0, row, first, count);
            write_row(a.y, 0, row, first, count, values, a.rounding, a.overflow);
        }
    });
}

}  // namespace QB_ISA
