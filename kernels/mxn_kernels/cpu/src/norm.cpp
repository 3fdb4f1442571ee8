// Root-mean-square normalisation of rows: y = x / sqrt(mean(x^2) + eps) * (weight + offset).
#include <math.h>

#include "simd.h"
#include "workspace.h"

static void rms_norm_row(const float* x, const float* weight, int width, float eps, float offset, float* y) {
    FlushDenormals guard;
    Vec16 sum = zero16();
    int tail = width % LANES, whole = width - tail;
    for (int i = 0; i < whole; i += LANES) {
        Vec16 v = load16(x + i);
        sum = fma(v, v, sum);
    }
    if (tail) {
        Vec16 v = load16(x + whole, tail);
        sum = fma(v, v, sum);
    }
    Vec16 scale = set16(1.f / sqrtf(sum_lanes(sum) / width + eps)), shift = set16(offset);
    for (int i = 0; i < whole; i += LANES) store16(y + i, mul(mul(load16(x + i), scale), add(load16(weight + i), shift)));
    if (tail) store16(y + whole, tail, mul(mul(load16(x + whole, tail), scale), add(load16(weight + whole, tail), shift)));
}

extern "C" void mxn_rms_norm(const float* x, const float* weight, long rows, int width, float eps, float offset, float* y, int threads) {
    // Below 64 K values a parallel region costs more than it saves.
    if (rows * width < 65536) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long r = 0; r < rows; r++) rms_norm_row(x + r * width, weight, width, eps, offset, y + r * width);
}
