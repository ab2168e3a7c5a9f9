// Compiled once for each instruction set, as the kernels are.
#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define QB_TEXT_OF(x) #x
#define QB_TEXT(x) QB_TEXT_OF(x)

namespace QB_ISA {

void linear(const void *args);
void embedding(const void *args);
void add_norm(const void *args);
void gated_norm(const void *args);
void conv(const void *args);
void ssd(const void *args);
void selective_scan(const void *args);
void quantize(const void *args);

static bool runs_here() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool all = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(__AVXVNNI__)
    // Clang 14's __builtin_cpu_supports does not know this name.
    unsigned a = 0, b, c, d;
    all = all && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 16);
#endif
#if defined(__AVX512F__)
    all = all && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512vnni");
#endif
    return all;
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long kNeeded = HWCAP_ASIMDDP | HWCAP_ASIMDHP | HWCAP_ATOMICS;
    return (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
#else
    return true;  // Apple's processors have all of it
#endif
}

extern const quamba::InstructionSet instruction_set;
const quamba::InstructionSet instruction_set = {
    QB_TEXT(QB_ISA),
    runs_here,
    {linear, embedding, add_norm, gated_norm, conv, ssd, selective_scan, quantize},
};

}  // namespace QB_ISA
