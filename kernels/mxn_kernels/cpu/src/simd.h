// Sixteen floats as one value: one AVX-512 register, two AVX or four NEON registers. Everything above this file is written once.
//
// NaN propagates through every operation here unless it says otherwise: a broken row must end as a broken row.
#pragma once
#include <stdint.h>

#define MXN_INLINE static inline __attribute__((always_inline))
#define MXN_INLINE_MEMBER inline __attribute__((always_inline))

typedef uint16_t half_t;  // IEEE binary16 as stored in the KV cache
constexpr int LANES = 16;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MXN_AVX512 1
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#define MXN_AVX2 1
#include "simd_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#define MXN_NEON 1
#include "simd_neon.h"
#else
#error "mxn's CPU kernels need AVX-512 VNNI, AVX2 with F16C and FMA, or NEON with dot products"
#endif

// tanh by e^2x: absolute error under 2e-7, which is what a capped logit needs.
MXN_INLINE Vec16 tanh(Vec16 x) {
    Vec16 one = set16(1.f);
    return sub(one, div(set16(2.f), add(exp(add(x, x)), one)));
}

#if MXN_NEON
MXN_INLINE void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
MXN_INLINE uint64_t float_mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
constexpr uint64_t FLUSH = 1 << 24;
MXN_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
#else
MXN_INLINE void set_float_mode(unsigned mode) { _mm_setcsr(mode); }
MXN_INLINE unsigned float_mode() { return _mm_getcsr(); }
constexpr unsigned FLUSH = 0x8040;
MXN_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
#endif

// Treats denormals as zero while it lives. Threads differ in what they were started with, results must not.
struct FlushDenormals {
    decltype(float_mode()) before = float_mode();
    FlushDenormals() { set_float_mode(before | FLUSH); }
    ~FlushDenormals() { set_float_mode(before); }
};

MXN_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }
