// The ops of one instruction set.
#pragma once

#include "quamba_cpu.h"

namespace quamba {

using OpFunction = void (*)(const void *args);

struct InstructionSet {
    const char *name;
    bool (*runs_here)();
    OpFunction ops[QB_KINDS];
};

}  // namespace quamba
