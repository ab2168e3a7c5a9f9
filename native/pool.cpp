#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quamba {
namespace {

// A ticket is the number of the job, how many parts it has and the next part, in one word: a thread that comes late
// sees from its own ticket that nothing is left, whatever has begun since.
constexpr int kPartBits = 24;
constexpr uint64_t kPartMask = (uint64_t{1} << kPartBits) - 1;

// A thread that has nothing to do looks for this long before it sleeps: the ops of a step, and those of a prompt with what
// Python does between them, follow within it.
constexpr auto kSpin = std::chrono::microseconds(500);
constexpr int kLooksPerClock = 64;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> sleepers{0};
    std::atomic<bool> closing{false};
    void (*work)(void *, int64_t) = nullptr;
    void *context = nullptr;
    uint64_t jobs = 0;
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> workers;

    ~Pool() { close(); }

    void close() {
        {
            std::lock_guard<std::mutex> hold(mutex);
            closing = true;
        }
        wake.notify_all();
        for (auto &worker : workers) worker.join();
        workers.clear();
        closing = false;
    }

    void open(int count) {
        for (int i = 1; i < count; ++i) workers.emplace_back([this] { serve(); });
    }

    // Takes parts of the job at hand until none is left. Whether there was one.
    bool help() {
        bool helped = false;
        for (;;) {
            if (!left(ticket.load(std::memory_order_relaxed))) return helped;
            const uint64_t mine = ticket.fetch_add(1, std::memory_order_acq_rel);
            if (!left(mine)) return helped;
            work(context, static_cast<int64_t>(mine & kPartMask));
            done.fetch_add(1, std::memory_order_release);
            helped = true;
        }
    }

    static bool left(uint64_t value) { return (value & kPartMask) < ((value >> kPartBits) & kPartMask); }

    void serve() {
        auto idle_since = std::chrono::steady_clock::now();
        for (int look = 1; !closing.load(std::memory_order_relaxed); ++look) {
            if (help()) {
                idle_since = std::chrono::steady_clock::now();
                continue;
            }
            pause();
            if (look % kLooksPerClock || std::chrono::steady_clock::now() - idle_since < kSpin) continue;
            std::unique_lock<std::mutex> hold(mutex);
            sleepers.fetch_add(1);
            wake.wait(hold, [this] { return closing.load() || left(ticket.load()); });
            sleepers.fetch_sub(1);
            idle_since = std::chrono::steady_clock::now();
        }
    }

    void run(int64_t count, void (*job)(void *, int64_t), void *with) {
        if (workers.empty() || count == 1) {
            for (int64_t i = 0; i < count; ++i) job(with, i);
            return;
        }
        work = job;
        context = with;
        done.store(0, std::memory_order_relaxed);
        ++jobs;
        const uint64_t parts = static_cast<uint64_t>(count);
        // Sequentially consistent, as what sleepers do is: either they see the job or they are seen.
        ticket.store(jobs << (2 * kPartBits) | parts << kPartBits);
        if (sleepers.load() > 0) {
            { std::lock_guard<std::mutex> hold(mutex); }
            wake.notify_all();
        }
        help();
        for (int look = 1; done.load(std::memory_order_acquire) < count; ++look) {
            pause();
            if (look % 4096 == 0) std::this_thread::yield();  // the other thread may wait for this core
        }
    }
};

Pool *pool = nullptr;

void forget_after_fork() {
    // The child has none of the threads; what they were joined by is left behind.
    pool = nullptr;
}

Pool &the_pool() {
    if (!pool) {
        static bool registered = false;
        if (!registered) {
            pthread_atfork(nullptr, nullptr, forget_after_fork);
            registered = true;
        }
        pool = new Pool;
    }
    return *pool;
}

struct Scratch {
    void *data[kScratchSlots] = {};
    int64_t bytes[kScratchSlots] = {};
    ~Scratch() {
        for (void *memory : data) std::free(memory);
    }
};

}  // namespace

void parallel(int64_t count, void (*work)(void *, int64_t), void *context) {
    if (count > 0) the_pool().run(count, work, context);
}

int threads() { return static_cast<int>(the_pool().workers.size()) + 1; }

void set_threads(int count) {
    if (count < 1 || count == threads()) return;
    the_pool().close();
    the_pool().open(count);
}

void *scratch(int slot, int64_t bytes) {
    thread_local Scratch mine;
    if (mine.bytes[slot] < bytes) {
        std::free(mine.data[slot]);
        const int64_t rounded = (bytes + 4095) / 4096 * 4096;
        mine.data[slot] = std::aligned_alloc(64, static_cast<size_t>(rounded));
        mine.bytes[slot] = mine.data[slot] ? rounded : 0;
        if (!mine.data[slot]) throw std::bad_alloc();
    }
    return mine.data[slot];
}

}  // namespace quamba
