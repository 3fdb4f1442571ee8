// The end of a tile of a product: sums of one row and panel are scaled and combined with what the target holds.
#pragma once
#include "gemm.h"
#include "simd.h"

MXN_INLINE Vec16 silu(Vec16 x) { return div(x, add(set16(1.f), exp(sub(zero16(), x)))); }
MXN_INLINE Vec16 gelu_tanh(Vec16 x) {
    Vec16 inner = mul(mul(x, set16(0.797884561f)), fma(mul(x, x), set16(0.044715f), set16(1.f)));
    return mul(mul(x, set16(.5f)), add(set16(1.f), tanh(inner)));
}

struct Epilogue {
    const float* row_scales;
    const int32_t* row_surplus;
    const float* column_scales;  // null where the sums have them already
    const float* bias;
    Target to;
    int columns;  // of the panel that are real

    Epilogue(const PackedWeight& w, const Activations& x, int p, const Target& target)
        : row_scales(x.scales), row_surplus(x.surplus), column_scales(w.scales ? w.scales + p * PANEL : nullptr),
          bias(w.bias + p * PANEL), to(target), columns(w.n - p * PANEL) {
        to.y += p * PANEL;
    }

    MXN_INLINE_MEMBER void store(int64_t row, Vec16 left, Vec16 right) const {
        write(row, 0, left);
        write(row, LANES, right);
    }
    MXN_INLINE_MEMBER void write(int64_t row, int column, Vec16 sum) const {
        Vec16 scale = set16(row_scales[row]), shift = load16(bias + column);
        Vec16 value = column_scales ? fma(mul(sum, scale), load16(column_scales + column), shift) : fma(sum, scale, shift);
        float* y = to.y + row * to.ldy + column;
        int n = columns - column;
        if (n >= LANES) store16(y, to.combine == STORE ? value : combined(load16(y), value));
        else if (n > 0) store16(y, n, to.combine == STORE ? value : combined(load16(y, n), value));
    }
    MXN_INLINE_MEMBER Vec16 combined(Vec16 before, Vec16 value) const {
        if (to.combine == ADD) return add(before, mul(value, set16(to.factor)));
        return mul(to.combine == SILU_TIMES ? silu(before) : gelu_tanh(before), value);
    }
};
