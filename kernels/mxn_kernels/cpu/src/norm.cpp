#include "norm.h"

#include <math.h>

#include "simd.h"
#include "workspace.h"

void rms_norm_row(const float* x, const float* weight, int width, float eps, float offset, float* y) {
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

constexpr int64_t SERIAL_VALUES = 65536;  // below this a second thread costs more than it saves

extern "C" void mxn_rms_norm(Workspace* space, const float* x, const float* weight, int64_t rows, int width, float eps, float offset, float* y) {
    long parts = rows * width < SERIAL_VALUES ? 1 : space->threads() * 4;
    Turn turn(space);
    space->team.run(&parts, 1, parts == 1, [&](int, long item, int) {
        Share mine(rows, item, parts);
        for (long r = mine.first; r < mine.last; r++) rms_norm_row(x + r * width, weight, width, eps, offset, y + r * width);
    });
}
