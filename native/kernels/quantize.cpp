#include "simd.h"

namespace QB_ISA {

void quantize(const void *) { __builtin_trap(); }

}  // namespace QB_ISA
