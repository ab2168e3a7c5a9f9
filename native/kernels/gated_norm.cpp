#include "simd.h"

namespace QB_ISA {

void gated_norm(const void *) { __builtin_trap(); }

}  // namespace QB_ISA
