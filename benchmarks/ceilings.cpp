// What this machine can do at most, as one line of JSON: read bandwidth over a working set, int8 and float arithmetic.
//
//     ceilings THREADS BYTES...
//
// Arithmetic runs on registers only, in assembly: compilers spill arrays of accumulators.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_of(int threads, const std::function<void(int)>& work) {
    const auto start = Clock::now();
    std::vector<std::thread> team;
    for (int i = 1; i < threads; i++) team.emplace_back(work, i);
    work(0);
    for (auto& thread : team) thread.join();
    return std::chrono::duration<double>(Clock::now() - start).count();
}

double best_of(int times, const std::function<double()>& rate) {
    double best = 0;
    for (int i = 0; i < times; i++) best = std::max(best, rate());
    return best;
}

// Twelve accumulators hide the latency of two instructions a cycle.
#define TWELVE(OP, R) \
    OP(R, 0) OP(R, 1) OP(R, 2) OP(R, 3) OP(R, 4) OP(R, 5) OP(R, 6) OP(R, 7) OP(R, 8) OP(R, 9) OP(R, 10) OP(R, 11)
#define CLOBBERED                                                                                                  \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"

#if defined(__AVX512F__)
#define REGISTER "zmm"
constexpr int kBits = 512;
#else
#define REGISTER "ymm"
constexpr int kBits = 256;
#endif

#define CLEAR(R, I) "vpxor %%xmm" #I ",%%xmm" #I ",%%xmm" #I "\n"
#define FMA(R, I) "vfmadd231ps %%" R "13,%%" R "12,%%" R #I "\n"
#define DOT_VEX(R, I) "{vex} vpdpbusd %%" R "13,%%" R "12,%%" R #I "\n"
#define DOT_EVEX(R, I) "vpdpbusd %%" R "13,%%" R "12,%%" R #I "\n"
#define DOT_BF16(R, I) "vdpbf16ps %%" R "13,%%" R "12,%%" R #I "\n"
// AVX2 without a dot product: multiply-add to 16 bits, again to 32, add.
#define DOT_AVX2(R, I) \
    "vpmaddubsw %%" R "13,%%" R "12,%%" R "14\nvpmaddwd %%" R "14,%%" R "15,%%" R "14\n" \
    "vpaddd %%" R "14,%%" R #I ",%%" R #I "\n"

constexpr long kTurns = 4'000'000;

#define REPEAT(OP)                                                                                                    \
    [](int) {                                                                                                         \
        long turns = kTurns;                                                                                          \
        asm volatile(TWELVE(CLEAR, REGISTER) "vpxor %%xmm12,%%xmm12,%%xmm12\nvpxor %%xmm13,%%xmm13,%%xmm13\n"         \
                     "vpxor %%xmm15,%%xmm15,%%xmm15\n"                                                                \
                     "1:\n" TWELVE(OP, REGISTER) "dec %0\njnz 1b\nvzeroupper\n"                                       \
                     : "+r"(turns)                                                                                    \
                     :                                                                                                \
                     : "cc", CLOBBERED, "xmm12", "xmm13", "xmm14", "xmm15");                                          \
    }

// Operations per second in units of 1e9; `per_lane`: multiplications and additions of one 32-bit lane.
double giga_ops(int threads, int per_lane, void (*loop)(int)) {
    const double ops = 12.0 * kTurns * (kBits / 32) * per_lane * threads;
    return best_of(5, [&] { return ops / seconds_of(threads, loop) / 1e9; });
}

double read_gb_per_s(int threads, const char* data, size_t bytes) {
    std::vector<char> sums(threads);
    const int turns = std::max<int>(1, int((size_t(1) << 30) / bytes));
    return best_of(7, [&] {
        const double s = seconds_of(threads, [&](int i) {
            const size_t part = bytes / threads / 256 * 256;
            const char* begin = data + part * i;
            __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
            for (int turn = 0; turn < turns; turn++) {
                for (const char* p = begin; p < begin + part; p += 128) {
                    a = _mm256_xor_si256(a, _mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
                    b = _mm256_xor_si256(b, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32)));
                    c = _mm256_xor_si256(c, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 64)));
                    d = _mm256_xor_si256(d, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 96)));
                }
                asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d));
            }
            const __m256i all = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
            sums[i] = char(_mm256_extract_epi8(all, 0));
        });
        return double(bytes) * turns / s / 1e9;
    });
}

}  // namespace

int main(int count, char** words) {
    const int threads = std::atoi(words[1]);
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    const double int8 = giga_ops(threads, 8, REPEAT(DOT_EVEX));
#elif defined(__AVXVNNI__)
    const double int8 = giga_ops(threads, 8, REPEAT(DOT_VEX));
#else
    const double int8 = giga_ops(threads, 8, REPEAT(DOT_AVX2));
#endif
    double flops = giga_ops(threads, 2, REPEAT(FMA));
#if defined(__AVX512BF16__)
    const double bf16 = giga_ops(threads, 4, REPEAT(DOT_BF16));
#else
    const double bf16 = 0;
#endif
    std::printf("{\"int8_gops\": %.1f, \"fp32_gflops\": %.1f, \"bf16_gflops\": %.1f, \"read_gb_per_s\": [", int8, flops, bf16);
    for (int i = 2; i < count; i++) {
        const size_t bytes = std::strtoull(words[i], nullptr, 10) / 256 * 256;
        char* data = static_cast<char*>(std::aligned_alloc(size_t(2) << 20, (bytes + (size_t(2) << 20)) >> 21 << 21));
        madvise(data, bytes, MADV_HUGEPAGE);
        std::memset(data, 1, bytes);
        std::printf("%s%.2f", i > 2 ? ", " : "", read_gb_per_s(threads, data, bytes));
        std::free(data);
    }
    std::printf("]}\n");
}
