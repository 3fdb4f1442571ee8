// The parts of an int8 product, for callers that put several of them into one run of a team. See gemm_int8.cpp.
#pragma once
#include <stdint.h>

#include "workspace.h"

constexpr int PANEL = 32;         // output channels per panel: [n / 32][k / 4][32][4]
constexpr int DEPTH_STEP = 16;    // inputs are padded to a multiple of this
constexpr int ROWS_PER_ITEM = 8;  // rows that a thread quantises at a time

struct Activations {
    int8_t* values;    // [rows][depth], zero beyond k
    float* scales;     // [rows]
    int32_t* surplus;  // [rows]: what the weights' offset adds to every sum of the row

    static Activations take(Layout& layout, int64_t rows, int depth) {
        return {layout.take<int8_t>(rows * depth), layout.take<float>(rows), layout.take<int32_t>(rows)};
    }
};

struct Int8Weight {
    const uint8_t* panels;
    const float* scales;  // one per channel, padded to whole panels
    const float* bias;    // likewise; zeros if the layer has none
    int32_t n, k;

    int depth() const { return (k + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP; }
    int num_panels() const { return (n + PANEL - 1) / PANEL; }
};

// What becomes of a result v: y = v, y = y + factor * v, or y = activation(y) * v.
enum Combine : int32_t { STORE, ADD, SILU_TIMES, GELU_TANH_TIMES };

struct Target {
    float* y;
    int64_t ldy;  // floats from row to row
    Combine combine = STORE;
    float factor = 1.f;
};

// How a product is divided. Weights of a panel are read once per row block, whose activations stay in the second-level cache.
struct Division {
    int64_t row_blocks, groups;
    int threads;
    bool quantise_alone;  // each thread quantises all rows for itself: cheaper than waiting for the others

    Division(int64_t rows, int panels, int depth, int max_threads);
    int64_t items() const { return row_blocks * groups; }
};

void quantise_row(const float* x, int k, int64_t row, int depth, const Activations& to);

// Rows [first, last) times panels [p0, p1).
void multiply(const Int8Weight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to);
