#include "simd.h"

namespace QB_ISA {

void linear(const void *) { __builtin_trap(); }

}  // namespace QB_ISA
