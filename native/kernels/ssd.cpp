#include "simd.h"

namespace QB_ISA {

void ssd(const void *) { __builtin_trap(); }

}  // namespace QB_ISA
