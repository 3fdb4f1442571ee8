// A team of threads for work of a few microseconds to milliseconds, on cores that others use too.
//
// Work comes as any number of phases of numbered items which threads claim one by one. The caller always works itself and waits only for items that
// somebody has begun: a thread that sleeps, or that the system keeps from running, is not waited for. (With OpenMP one busy
// neighbour made a step twenty times slower: the caller spun for a thread that could not run.)
#pragma once
#include <pthread.h>
#include <sched.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

constexpr size_t CACHE_LINE = 64;

// Tells the core that this thread only waits.
static inline void idle() {
#if defined(__aarch64__)
    asm volatile("yield");
#else
    __builtin_ia32_pause();
#endif
}

class Team {
   public:
    explicit Team(int size) : forks_before(forks()) {
        try {
            for (int i = 1; i < size; i++) threads.emplace_back(&Team::serve, this, i);
        } catch (...) {  // no more threads to be had: work with those that started
        }
    }

    ~Team() {
        stopping.store(true);
        wake();
        for (std::thread& t : threads) t.join();
    }

    int size() const { return (int)threads.size() + 1; }

    // A fork copies the team but not its threads: the copy works alone, and must not be destroyed.
    bool lost_threads() const { return forks() != forks_before; }

    // Calls work(phase, item, thread) for every item below items[phase], phase after phase: all of one before any of the next.
    // The work must not throw.
    template <class Work> void run(const long* items, int count, bool alone, const Work& work) {
        if (alone || threads.empty() || lost_threads()) {
            for (int p = 0; p < count; p++)
                for (long i = 0; i < items[p]; i++) work(p, i, 0);
            return;
        }
        if (count > capacity) {  // nobody is inside, so nobody holds the old ones
            phases.reset(new Phase[count]);
            capacity = count;
        }
        num_phases = 0;
        for (int p = 0; p < count; p++) {
            phases[p].items = items[p];
            phases[p].claimed.store(0, std::memory_order_relaxed);
            phases[p].done.store(0, std::memory_order_relaxed);
            if (items[p]) num_phases = p + 1;
        }
        context = &work;
        call = [](const void* w, int phase, long item, int thread) { (*(const Work*)w)(phase, item, thread); };
        job.fetch_add(1, std::memory_order_relaxed);
        gate.store(OPEN);
        if (sleepers.load()) wake();
        take_part(0);
        gate.fetch_and(~OPEN);  // nobody enters any more; who is inside finishes the item it began
        for (int spins = 0; gate.load(std::memory_order_acquire);) pause(&spins);
    }

   private:
    static constexpr unsigned OPEN = 1u << 31;  // the rest of the gate counts the threads inside
    static constexpr int SPINS_BEFORE_YIELD = 2000;
    static constexpr std::chrono::microseconds AWAKE{100};  // covers the gaps between the calls of a step

    struct alignas(CACHE_LINE) Phase {
        std::atomic<long> claimed{0};
        alignas(CACHE_LINE) std::atomic<long> done{0};
        long items = 0;
    };

    std::unique_ptr<Phase[]> phases;
    int capacity = 0, num_phases = 0;
    const void* context = nullptr;
    void (*call)(const void*, int, long, int) = nullptr;
    alignas(CACHE_LINE) std::atomic<unsigned> gate{0};
    std::atomic<unsigned> job{0};
    alignas(CACHE_LINE) std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false};
    std::mutex mutex;
    std::condition_variable bell;
    std::vector<std::thread> threads;
    const int forks_before;

    static int forks() {
        static std::atomic<int> count{0};
        static const int watched = pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1); });
        (void)watched;
        return count.load(std::memory_order_relaxed);
    }

    static void pause(int* spins) {
        idle();
        if (++*spins % SPINS_BEFORE_YIELD == 0) sched_yield();
    }

    void take_part(int thread) {
        for (int p = 0; p < num_phases; p++) {
            Phase& phase = phases[p];
            if (phase.items == 0) continue;
            long finished = 0;
            for (long i; phase.claimed.load(std::memory_order_relaxed) < phase.items &&
                         (i = phase.claimed.fetch_add(1, std::memory_order_relaxed)) < phase.items;
                 finished++)
                call(context, p, i, thread);
            if (p + 1 == num_phases) return;
            if (finished) phase.done.fetch_add(finished, std::memory_order_acq_rel);
            for (int spins = 0; phase.done.load(std::memory_order_acquire) < phase.items;) pause(&spins);
        }
    }

    bool enter() {
        unsigned seen = gate.load(std::memory_order_relaxed);
        while (seen & OPEN)
            if (gate.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
        return false;
    }

    void wake() {
        std::lock_guard<std::mutex> lock(mutex);
        bell.notify_all();
    }

    void serve(int thread) {
        unsigned served = 0;  // the last job taken part in, so that it is not entered twice
        auto waiting = [&] { return (gate.load() & OPEN) && job.load(std::memory_order_relaxed) != served; };
        for (auto since = std::chrono::steady_clock::now(); !stopping.load(std::memory_order_relaxed);) {
            if (waiting() && enter()) {
                served = job.load(std::memory_order_relaxed);
                take_part(thread);
                gate.fetch_sub(1, std::memory_order_release);
                since = std::chrono::steady_clock::now();
                continue;
            }
            for (int i = 0; i < 32; i++) idle();
            if (std::chrono::steady_clock::now() - since < AWAKE) continue;
            std::unique_lock<std::mutex> lock(mutex);
            sleepers.fetch_add(1);
            bell.wait(lock, [&] { return stopping.load() || waiting(); });
            sleepers.fetch_sub(1);
            since = std::chrono::steady_clock::now();
        }
    }
};
