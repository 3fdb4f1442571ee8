// Products of 8-bit activations with packed weights, in parts, for callers that put several of them into one run of a team.
#pragma once
#include <stdint.h>

#include "workspace.h"

constexpr int PANEL = 32;         // output channels per panel
constexpr int GROUP = 32;         // inputs that share a scale in the grouped formats; rows are padded to a multiple of it
constexpr int ROWS_PER_ITEM = 8;  // rows that a thread quantises at a time
constexpr float SMALLEST = 1e-30f;  // below this a row counts as zero: 127 / max would overflow

// How a weight's values are stored. INT8 has one float scale per channel. The others have one half-precision scale d for each channel
// and group of inputs, and are the formats of the same names in GGUF files, value for value:
//   INT8  [panel][k / 4][32 channels][4] bytes of value + 128
//   Q8_0  [panel][group]: [8][32][4] bytes of q + 128; [32] d                  value = d * q
//   Q4_0  [panel][group]: [4][32][4] bytes of two q;   [32] d                  value = d * (q - 8)
//   Q4_1  [panel][group]: [4][32][4] bytes of two q;   [32] d; [32] minimum m  value = d * q + m
// A byte of two holds input 4 i + j of its group in the low half and input 16 + 4 i + j in the high half.
enum Format : int32_t { INT8, Q8_0, Q4_0, Q4_1 };

constexpr int value_bytes(Format f) { return PANEL * GROUP / (f == INT8 || f == Q8_0 ? 1 : 2); }
constexpr int group_bytes(Format f) { return value_bytes(f) + (f == INT8 ? 0 : f == Q4_1 ? 4 : 2) * PANEL; }

struct PackedWeight {
    const uint8_t* panels;
    const float* scales;  // of INT8: one per channel, padded to whole panels; else null
    const float* bias;    // one per channel, padded likewise; zeros if the layer has none
    int32_t n, k;
    Format format;

    int depth() const { return (k + GROUP - 1) / GROUP * GROUP; }
    int num_panels() const { return (n + PANEL - 1) / PANEL; }
    const uint8_t* panel(int p) const { return panels + (int64_t)p * (depth() / GROUP) * group_bytes(format); }
    PackedWeight only(int p) const {
        int rest = n - p * PANEL;
        return {panel(p), scales ? scales + p * PANEL : nullptr, bias + p * PANEL, rest < PANEL ? rest : PANEL, k, format};
    }
};

struct Activations {
    int8_t* values;       // [rows][depth], zero beyond k
    float* scales;        // [rows]
    int32_t* surplus;     // [rows]: what the weights' offset adds to every sum of the row
    int32_t* group_sums;  // [rows][depth / GROUP], or null where no weight is grouped

    static Activations take(Layout& layout, int64_t rows, int depth, bool has_groups) {
        return {layout.take<int8_t>(rows * depth), layout.take<float>(rows), layout.take<int32_t>(rows),
                has_groups ? layout.take<int32_t>(rows * depth / GROUP) : nullptr};
    }
};

void quantise_row(const float* x, int k, int64_t row, int depth, const Activations& to);

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

// Rows [first, last) times panels [p0, p1). A row's result depends on that row alone, bit for bit, however rows are cut.
void multiply(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to);
void multiply_int8(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to);
void multiply_groups(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to);
