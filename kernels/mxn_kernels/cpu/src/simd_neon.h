// Sixteen floats in four NEON registers. Included by simd.h.
#pragma once
#include <arm_neon.h>
#include <string.h>

struct Vec16 {
    float32x4_t a, b, c, d;
};

template <class F> MXN_INLINE Vec16 each(Vec16 x, F f) { return {f(x.a), f(x.b), f(x.c), f(x.d)}; }
template <class F> MXN_INLINE Vec16 each(Vec16 x, Vec16 y, F f) { return {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}; }

MXN_INLINE Vec16 set16(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
MXN_INLINE Vec16 zero16() { return set16(0.f); }
MXN_INLINE Vec16 load16(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
MXN_INLINE void store16(float* p, Vec16 x) {
    vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d);
}
MXN_INLINE Vec16 load16(const float* p, int n) {
    float whole[LANES] = {};
    if (n > 0) memcpy(whole, p, sizeof(float) * (n < LANES ? n : LANES));
    return load16(whole);
}
MXN_INLINE void store16(float* p, int n, Vec16 x) {
    float whole[LANES];
    store16(whole, x);
    if (n > 0) memcpy(p, whole, sizeof(float) * (n < LANES ? n : LANES));
}
MXN_INLINE float32x4_t load_half(const half_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
MXN_INLINE void store_half(half_t* p, float32x4_t x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
MXN_INLINE Vec16 load16_half(const half_t* p) { return {load_half(p), load_half(p + 4), load_half(p + 8), load_half(p + 12)}; }
MXN_INLINE void store16_half(half_t* p, Vec16 x) {
    store_half(p, x.a), store_half(p + 4, x.b), store_half(p + 8, x.c), store_half(p + 12, x.d);
}
MXN_INLINE Vec16 load16_bytes(const int8_t* p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_s8(vget_high_s8(bytes));
    auto real = [](int16x4_t x) { return vcvtq_f32_s32(vmovl_s16(x)); };
    return {real(vget_low_s16(lo)), real(vget_high_s16(lo)), real(vget_low_s16(hi)), real(vget_high_s16(hi))};
}
MXN_INLINE Vec16 add(Vec16 x, Vec16 y) {
    return each(x, y, [](float32x4_t p, float32x4_t q) { return vaddq_f32(p, q); });
}
MXN_INLINE Vec16 sub(Vec16 x, Vec16 y) {
    return each(x, y, [](float32x4_t p, float32x4_t q) { return vsubq_f32(p, q); });
}
MXN_INLINE Vec16 mul(Vec16 x, Vec16 y) {
    return each(x, y, [](float32x4_t p, float32x4_t q) { return vmulq_f32(p, q); });
}
MXN_INLINE Vec16 div(Vec16 x, Vec16 y) {
    return each(x, y, [](float32x4_t p, float32x4_t q) { return vdivq_f32(p, q); });
}
MXN_INLINE Vec16 max(Vec16 x, Vec16 y) {
    return each(x, y, [](float32x4_t p, float32x4_t q) { return vmaxq_f32(p, q); });
}
MXN_INLINE Vec16 fma(Vec16 x, Vec16 y, Vec16 z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
MXN_INLINE float sum_lanes(Vec16 x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d))); }
MXN_INLINE float max_lanes(Vec16 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }
MXN_INLINE Vec16 keep_lanes(Vec16 x, int first, int last, Vec16 fill) {
    auto keep = [&](float32x4_t p, float32x4_t q, int at) {
        static const int32_t INDEX[] = {0, 1, 2, 3};
        int32x4_t lane = vaddq_s32(vld1q_s32(INDEX), vdupq_n_s32(at));
        uint32x4_t mask = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(first)), vcltq_s32(lane, vdupq_n_s32(last)));
        return vbslq_f32(mask, p, q);
    };
    return {keep(x.a, fill.a, 0), keep(x.b, fill.b, 4), keep(x.c, fill.c, 8), keep(x.d, fill.d, 12)};
}
MXN_INLINE float32x4_t exp4(float32x4_t x) {
    const float32x4_t lo = vdupq_n_f32(-87.f);
    uint32x4_t alive = vmvnq_u32(vcltq_f32(x, lo));
    float32x4_t c = vminq_f32(vdupq_n_f32(88.f), vmaxq_f32(lo, x));
    float32x4_t n = vrndnq_f32(vmulq_f32(c, vdupq_n_f32(1.44269504f)));
    float32x4_t r = vfmsq_f32(c, n, vdupq_n_f32(0.693145752f));
    r = vfmsq_f32(r, n, vdupq_n_f32(1.42860677e-6f));
    float32x4_t p = vdupq_n_f32(1.f / 720);
    p = vfmaq_f32(vdupq_n_f32(1.f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.f), p, r);
    int32x4_t scale = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    float32x4_t e = vmulq_f32(p, vreinterpretq_f32_s32(scale));
    return vreinterpretq_f32_u32(vandq_u32(alive, vreinterpretq_u32_f32(e)));
}
MXN_INLINE Vec16 exp(Vec16 x) { return each(x, exp4); }
