// Vectors of int32 sums and the 8-bit dot product, one way per instruction set: every lane adds four products of weight and input bytes.
//
// Eight-bit weights are stored as value + 128. Where the dot product wants them signed, loading turns them back (WEIGHT_OFFSET 0);
// elsewhere the surplus of WEIGHT_OFFSET times the sum of a row's inputs is taken off its result.
#pragma once
#include <stdint.h>

#include "simd.h"

#if MXN_AVX512
typedef __m512i VecI;
typedef __m512i Inputs;
constexpr int WEIGHT_OFFSET = 128;
MXN_INLINE VecI zero_i() { return _mm512_setzero_si512(); }
MXN_INLINE VecI set_i(int32_t x) { return _mm512_set1_epi32(x); }
MXN_INLINE VecI add_i(VecI a, VecI b) { return _mm512_add_epi32(a, b); }
MXN_INLINE VecI sub_i(VecI a, VecI b) { return _mm512_sub_epi32(a, b); }
MXN_INLINE VecI load_weights(const uint8_t* p) { return _mm512_load_si512(p); }
MXN_INLINE VecI load_nibbles(const uint8_t* p) { return _mm512_load_si512(p); }
MXN_INLINE VecI low_nibbles(VecI x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
MXN_INLINE VecI high_nibbles(VecI x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) { return _mm512_set1_epi32(*(const int32_t*)p); }
MXN_INLINE Vec16 real(VecI s) { return {_mm512_cvtepi32_ps(s)}; }
#define DOT(sum, weights, inputs) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs))

#elif MXN_NEON
typedef int32x4_t VecI;
typedef int8x16_t Inputs;
constexpr int WEIGHT_OFFSET = 0;
MXN_INLINE VecI set_i(int32_t x) { return vdupq_n_s32(x); }
MXN_INLINE VecI zero_i() { return set_i(0); }
MXN_INLINE VecI add_i(VecI a, VecI b) { return vaddq_s32(a, b); }
MXN_INLINE VecI sub_i(VecI a, VecI b) { return vsubq_s32(a, b); }
MXN_INLINE VecI load_weights(const uint8_t* p) { return vreinterpretq_s32_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }
MXN_INLINE VecI load_nibbles(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
MXN_INLINE VecI low_nibbles(VecI x) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(15))); }
MXN_INLINE VecI high_nibbles(VecI x) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) { return vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t*)p)); }
MXN_INLINE Vec16 real(VecI a, VecI b, VecI c, VecI d) {
    return {vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d)};
}
#define DOT(sum, weights, inputs) sum = vdotq_s32(sum, vreinterpretq_s8_s32(weights), inputs)

#else
typedef __m256i VecI;
MXN_INLINE VecI zero_i() { return _mm256_setzero_si256(); }
MXN_INLINE VecI set_i(int32_t x) { return _mm256_set1_epi32(x); }
MXN_INLINE VecI add_i(VecI a, VecI b) { return _mm256_add_epi32(a, b); }
MXN_INLINE VecI sub_i(VecI a, VecI b) { return _mm256_sub_epi32(a, b); }
MXN_INLINE VecI load_nibbles(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }
MXN_INLINE VecI low_nibbles(VecI x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
MXN_INLINE VecI high_nibbles(VecI x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
MXN_INLINE Vec16 real(VecI lo, VecI hi) { return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)}; }
#if defined(__AVXVNNI__)
typedef __m256i Inputs;
constexpr int WEIGHT_OFFSET = 128;
MXN_INLINE VecI load_weights(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) { return _mm256_set1_epi32(*(const int32_t*)p); }
#define DOT(sum, weights, inputs) asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs))
#else
// Without a dot-product instruction: |w| times sign(w) * x in 16 bits. No sum overflows: 2 * 128 * 127 < 2^15.
typedef __m256i Inputs;
constexpr int WEIGHT_OFFSET = 0;
MXN_INLINE VecI load_weights(const uint8_t* p) {
    return _mm256_xor_si256(_mm256_load_si256((const __m256i*)p), _mm256_set1_epi8((char)128));
}
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) { return _mm256_set1_epi32(*(const int32_t*)p); }
MXN_INLINE VecI dot(VecI sum, VecI weights, Inputs x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#define DOT(sum, weights, inputs) sum = dot(sum, weights, inputs)
#endif
#endif
