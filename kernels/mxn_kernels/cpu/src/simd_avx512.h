// Sixteen floats in one AVX-512 register. Included by simd.h.
#pragma once
#include <immintrin.h>

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
