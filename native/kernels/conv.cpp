#include "simd.h"

namespace QB_ISA {

void conv(const void *) { __builtin_trap(); }

}  // namespace QB_ISA
