// What the binary gives: see quamba_cpu.h.
#include <cstring>
#include <mutex>
#include <string>

#include "instruction_sets.h"
#include "pool.h"
#include "table.h"

#define QB_EXPORT extern "C" __attribute__((visibility("default")))

#define QB_DECLARE(isa)                                  \
    namespace isa {                                      \
    extern const quamba::InstructionSet instruction_set; \
    }
QB_INSTRUCTION_SETS(QB_DECLARE)

namespace {

using quamba::InstructionSet;

#define QB_ADDRESS(isa) &isa::instruction_set,
const InstructionSet *const kBuilt[] = {QB_INSTRUCTION_SETS(QB_ADDRESS)};

const InstructionSet *first_that_runs() {
    for (const InstructionSet *set : kBuilt)
        if (set->runs_here()) return set;
    return nullptr;
}

const InstructionSet *chosen() {
    static const InstructionSet *best = first_that_runs();
    return best;
}

const InstructionSet *&current() {
    static const InstructionSet *set = chosen();
    return set;
}

std::mutex &turn() {
    static std::mutex mutex;
    return mutex;
}

constexpr int64_t kSizes[QB_KINDS] = {
    sizeof(QbLinear), sizeof(QbEmbedding), sizeof(QbAddNorm),       sizeof(QbGatedNorm),
    sizeof(QbConv),   sizeof(QbSsd),       sizeof(QbSelectiveScan), sizeof(QbQuantize),
};

}  // namespace

QB_EXPORT int qb_abi(void) { return QB_ABI; }

QB_EXPORT int64_t qb_size_of(int64_t kind) { return kind < 0 || kind >= QB_KINDS ? -1 : kSizes[kind]; }

QB_EXPORT const char *qb_instruction_sets(void) {
    static const std::string names = [] {
        std::string all;
        for (const InstructionSet *set : kBuilt)
            if (set->runs_here()) all += (all.empty() ? "" : ",") + std::string(set->name);
        return all;
    }();
    return names.c_str();
}

QB_EXPORT const char *qb_instruction_set(void) { return current() ? current()->name : ""; }

QB_EXPORT int qb_use_instruction_set(const char *name) {
    std::lock_guard<std::mutex> hold(turn());
    for (const InstructionSet *set : kBuilt)
        if (!std::strcmp(set->name, name) && set->runs_here()) {
            current() = set;
            return 0;
        }
    return -1;
}

QB_EXPORT int qb_threads(void) { return quamba::threads(); }

QB_EXPORT void qb_set_threads(int count) {
    std::lock_guard<std::mutex> hold(turn());
    quamba::set_threads(count);
}

QB_EXPORT void qb_run(const QbOp *ops, int64_t count) {
    std::lock_guard<std::mutex> hold(turn());
    const InstructionSet *set = current();
    for (int64_t i = 0; i < count; ++i) set->ops[ops[i].kind](ops[i].args);
}

QB_EXPORT uint64_t qb_read(const void *data, int64_t bytes) {
    std::lock_guard<std::mutex> hold(turn());
    constexpr int64_t kPart = 1 << 20;
    struct Read {
        const char *data;
        int64_t bytes;
        uint64_t sums[64];
    } read = {static_cast<const char *>(data), bytes, {}};
    quamba::parallel(
        (bytes + kPart - 1) / kPart,
        [](void *context, int64_t i) {
            Read &r = *static_cast<Read *>(context);
            const int64_t end = (i + 1) * kPart < r.bytes ? (i + 1) * kPart : r.bytes;
            typedef uint64_t wide __attribute__((vector_size(64), aligned(1), may_alias));
            wide sums[4] = {};
            int64_t at = i * kPart;
            for (; at + 256 <= end; at += 256)
                for (int j = 0; j < 4; ++j) sums[j] += *reinterpret_cast<const wide *>(r.data + at + 64 * j);
            uint64_t total = 0;
            for (const wide &sum : sums)
                for (int j = 0; j < 8; ++j) total += sum[j];
            __atomic_fetch_add(&r.sums[i % 64], total, __ATOMIC_RELAXED);
        },
        &read);
    uint64_t total = 0;
    for (uint64_t sum : read.sums) total += sum;
    return total;
}
