// Single half-precision numbers, for code that is not in a loop over lanes.
#pragma once
#include "simd.h"

MXN_INLINE float to_float(half_t h) {
    half_t halves[LANES] = {h};
    float floats[LANES];
    store16(floats, load16_half(halves));
    return floats[0];
}
MXN_INLINE half_t to_half(float x) {
    half_t halves[LANES];
    store16_half(halves, set16(x));
    return halves[0];
}
