#include "simd.h"

namespace QB_ISA {

void add_norm(const void *) { __builtin_trap(); }

}  // namespace QB_ISA
