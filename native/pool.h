// Threads that share the work of one op at a time.
#pragma once

#include <cstdint>

namespace quamba {

/// Calls work(context, i) for every i below count, on all threads; returns when all calls have. count < 2^24.
void parallel(int64_t count, void (*work)(void *context, int64_t i), void *context);

int threads();
void set_threads(int count);

/// Memory of the calling thread, 64-byte aligned, kept between calls. Slots are independent.
void *scratch(int slot, int64_t bytes);
constexpr int kScratchSlots = 8;

}  // namespace quamba
