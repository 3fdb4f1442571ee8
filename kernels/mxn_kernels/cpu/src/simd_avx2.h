// Sixteen floats in two AVX registers. Included by simd.h.
#pragma once
#include <immintrin.h>

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
