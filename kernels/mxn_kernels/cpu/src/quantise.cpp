// Rows of activations to int8, each by its own largest value.
#include <math.h>
#include <string.h>

#include "dot.h"
#include "gemm.h"

constexpr uint32_t INFINITY_BITS = 0x7f800000;

#if MXN_AVX512
MXN_INLINE __m512i max_bits(__m512i m, Vec16 x) {
    return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)));
}
MXN_INLINE uint32_t largest(__m512i m) { return _mm512_reduce_max_epi32(m); }
MXN_INLINE __m512i round16(Vec16 x, int8_t* q) {
    __m512i v = _mm512_cvtps_epi32(x.v);
    _mm_storeu_si128((__m128i*)q, _mm512_cvtsepi32_epi8(v));
    return v;
}
MXN_INLINE int32_t sum_i(__m512i v) { return _mm512_reduce_add_epi32(v); }
#elif MXN_NEON
MXN_INLINE int32x4_t max_bits(int32x4_t m, Vec16 x) {
    auto bits = [](float32x4_t v) { return vreinterpretq_s32_f32(vabsq_f32(v)); };
    return vmaxq_s32(m, vmaxq_s32(vmaxq_s32(bits(x.a), bits(x.b)), vmaxq_s32(bits(x.c), bits(x.d))));
}
MXN_INLINE uint32_t largest(int32x4_t m) { return vmaxvq_s32(m); }
MXN_INLINE int32x4_t round16(Vec16 x, int8_t* q) {
    int32x4_t a = vcvtnq_s32_f32(x.a), b = vcvtnq_s32_f32(x.b), c = vcvtnq_s32_f32(x.c), d = vcvtnq_s32_f32(x.d);
    int16x8_t lo = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), hi = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    vst1q_s8(q, vcombine_s8(vqmovn_s16(lo), vqmovn_s16(hi)));
    return vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d));
}
MXN_INLINE int32_t sum_i(int32x4_t v) { return vaddvq_s32(v); }
#else
MXN_INLINE __m256i max_bits(__m256i m, Vec16 x) {
    __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i lo = _mm256_and_si256(_mm256_castps_si256(x.lo), mask), hi = _mm256_and_si256(_mm256_castps_si256(x.hi), mask);
    return _mm256_max_epi32(m, _mm256_max_epi32(lo, hi));
}
MXN_INLINE uint32_t largest(__m256i m) {
    __m128i v = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
MXN_INLINE __m256i round16(Vec16 x, int8_t* q) {
    __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
    __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
    _mm_storeu_si128((__m128i*)q, _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
    return _mm256_add_epi32(lo, hi);
}
MXN_INLINE int32_t sum_i(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#endif

static void add_groups(const int8_t* q, int depth, int32_t* sums) {
    for (int g = 0; g < depth / GROUP; g++) {
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) sum += q[g * GROUP + i];
        sums[g] = sum;
    }
}

void quantise_row(const float* x, int k, int64_t row, int depth, const Activations& to) {
    int tail = k % LANES, whole = k - tail;
    VecI bits = zero_i();
    for (int i = 0; i < whole; i += LANES) bits = max_bits(bits, load16(x + i));
    if (tail) bits = max_bits(bits, load16(x + whole, tail));
    uint32_t peak_bits = largest(bits);
    float peak;
    memcpy(&peak, &peak_bits, sizeof peak);

    int8_t* q = to.values + row * depth;
    if (peak_bits >= INFINITY_BITS || peak < SMALLEST) {
        memset(q, 0, depth);
        to.scales[row] = peak_bits >= INFINITY_BITS ? NAN : 0.f;
        to.surplus[row] = 0;
        if (to.group_sums) memset(to.group_sums + row * (depth / GROUP), 0, sizeof(int32_t) * (depth / GROUP));
        return;
    }
    Vec16 inverse = set16(127.f / peak);
    VecI sum = zero_i();
    for (int i = 0; i < whole; i += LANES) sum = add_i(sum, round16(mul(load16(x + i), inverse), q + i));
    if (tail) sum = add_i(sum, round16(mul(load16(x + whole, tail), inverse), q + whole));
    for (int i = round_up(k, LANES); i < depth; i++) q[i] = 0;
    to.scales[row] = peak / 127.f;
    to.surplus[row] = WEIGHT_OFFSET * sum_i(sum);
    if (to.group_sums) add_groups(q, depth, to.group_sums + row * (depth / GROUP));
}
