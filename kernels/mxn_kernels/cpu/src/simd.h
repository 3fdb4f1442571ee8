// Sixteen floats as one value: one AVX-512 register or two AVX registers. Everything above this file is written once.
//
// NaN propagates through every operation here unless it says otherwise: a broken row must end as a broken row.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define MXN_INLINE static inline __attribute__((always_inline))
#define MXN_INLINE_MEMBER inline __attribute__((always_inline))

typedef uint16_t half_t;  // IEEE binary16 as stored in the KV cache
constexpr int LANES = 16;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MXN_AVX512 1

struct Vec16 {
    __m512 v;
};

MXN_INLINE __mmask16 lanes_below(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

MXN_INLINE Vec16 zero16() { return {_mm512_setzero_ps()}; }
MXN_INLINE Vec16 set16(float x) { return {_mm512_set1_ps(x)}; }
MXN_INLINE Vec16 load16(const float* p) { return {_mm512_loadu_ps(p)}; }
MXN_INLINE Vec16 load16(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
MXN_INLINE void store16(float* p, Vec16 x) { _mm512_storeu_ps(p, x.v); }
MXN_INLINE void store16(float* p, int n, Vec16 x) { _mm512_mask_storeu_ps(p, lanes_below(n), x.v); }
MXN_INLINE Vec16 load16_half(const half_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
MXN_INLINE Vec16 load16_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
MXN_INLINE void store16_half(half_t* p, Vec16 x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, 0)); }
MXN_INLINE Vec16 add(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
MXN_INLINE Vec16 sub(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
MXN_INLINE Vec16 mul(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
MXN_INLINE Vec16 div(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
MXN_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MXN_INLINE Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }  // drops a NaN in `a`
MXN_INLINE float sum_lanes(Vec16 x) { return _mm512_reduce_add_ps(x.v); }
MXN_INLINE float max_lanes(Vec16 x) { return _mm512_reduce_max_ps(x.v); }
// Lanes [first, last) of x, `fill` elsewhere.
MXN_INLINE Vec16 keep_lanes(Vec16 x, int first, int last, Vec16 fill) {
    return {_mm512_mask_mov_ps(fill.v, (__mmask16)(lanes_below(last) & ~lanes_below(first)), x.v)};
}
// e^x with 2 ulp; 0 below -87, which covers -infinity.
MXN_INLINE Vec16 exp(Vec16 x) {
    const __m512 lo = _mm512_set1_ps(-87.f);
    __mmask16 alive = _mm512_cmp_ps_mask(x.v, lo, _CMP_NLT_UQ);
    __m512 c = _mm512_min_ps(_mm512_set1_ps(88.f), _mm512_max_ps(lo, x.v));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(c, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), c);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    return {_mm512_maskz_scalef_ps(alive, p, n)};
}

#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#define MXN_AVX512 0

struct Vec16 {
    __m256 lo, hi;
};

MXN_INLINE __m256i lanes_below(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

MXN_INLINE Vec16 zero16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MXN_INLINE Vec16 set16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MXN_INLINE Vec16 load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MXN_INLINE Vec16 load16(const float* p, int n) {
    return {_mm256_maskload_ps(p, lanes_below(n)), _mm256_maskload_ps(p + 8, lanes_below(n - 8))};
}
MXN_INLINE void store16(float* p, Vec16 x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
MXN_INLINE void store16(float* p, int n, Vec16 x) {
    _mm256_maskstore_ps(p, lanes_below(n), x.lo), _mm256_maskstore_ps(p + 8, lanes_below(n - 8), x.hi);
}
MXN_INLINE Vec16 load16_half(const half_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
MXN_INLINE Vec16 load16_bytes(const int8_t* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
MXN_INLINE void store16_half(half_t* p, Vec16 x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.lo, 0)), _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.hi, 0));
}
MXN_INLINE Vec16 add(Vec16 a, Vec16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
MXN_INLINE Vec16 sub(Vec16 a, Vec16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
MXN_INLINE Vec16 mul(Vec16 a, Vec16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
MXN_INLINE Vec16 div(Vec16 a, Vec16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
MXN_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
MXN_INLINE Vec16 max(Vec16 a, Vec16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
MXN_INLINE float sum_lanes(Vec16 x) {
    __m256 a = _mm256_add_ps(x.lo, x.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
MXN_INLINE float max_lanes(Vec16 x) {
    __m256 a = _mm256_max_ps(x.lo, x.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
MXN_INLINE Vec16 keep_lanes(Vec16 x, int first, int last, Vec16 fill) {
    __m256i lo = _mm256_andnot_si256(lanes_below(first), lanes_below(last));
    __m256i hi = _mm256_andnot_si256(lanes_below(first - 8), lanes_below(last - 8));
    return {_mm256_blendv_ps(fill.lo, x.lo, _mm256_castsi256_ps(lo)), _mm256_blendv_ps(fill.hi, x.hi, _mm256_castsi256_ps(hi))};
}
MXN_INLINE __m256 exp8(__m256 x) {
    const __m256 lo = _mm256_set1_ps(-87.f);
    __m256 alive = _mm256_cmp_ps(x, lo, _CMP_NLT_UQ);
    __m256 c = _mm256_min_ps(_mm256_set1_ps(88.f), _mm256_max_ps(lo, x));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(c, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), c);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
    __m256 p = _mm256_set1_ps(1.f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.f));
    __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(alive, _mm256_mul_ps(p, _mm256_castsi256_ps(scale)));
}
MXN_INLINE Vec16 exp(Vec16 x) { return {exp8(x.lo), exp8(x.hi)}; }

#else
#error "mxn's CPU kernels need AVX-512 VNNI, or AVX2 with F16C and FMA"
#endif

// tanh by e^2x: absolute error under 2e-7, which is what a capped logit needs.
MXN_INLINE Vec16 tanh(Vec16 x) {
    Vec16 one = set16(1.f);
    return sub(one, div(set16(2.f), add(exp(add(x, x)), one)));
}

// Treats denormals as zero while it lives. Threads differ in what they were started with, results must not.
struct FlushDenormals {
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
};

MXN_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

MXN_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }
