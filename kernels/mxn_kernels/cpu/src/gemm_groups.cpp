// Products with a scale per channel and group of 32 inputs, 4 or 8 bits wide: a group's sum is exact in int32, groups are added as
// floats in their order, so a row's result is the same in a tile of any height.
#include "epilogue.h"
#include "dot.h"

constexpr int PREFETCH_BYTES = 2048;

// What is added to every stored value of a group, so that its sum is that of the values meant.
template <Format F> constexpr int32_t stored_offset() { return F == Q8_0 ? WEIGHT_OFFSET : F == Q4_0 ? 8 : 0; }

typedef void Tile(const int8_t* a, int64_t lda, const int32_t* sums, const uint8_t* w, int64_t depth, const Epilogue& out, int64_t row);
#include "group_tiles.inc"

template <Format F>
static void multiply(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to) {
    int depth = w.depth(), tiles = (last - first + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int p = p0; p < p1; p++) {
        const uint8_t* panel = w.panel(p);
        Epilogue out(w, x, p, to);
        for (int t = 0; t < tiles; t++) {
            Share rows(last - first, t, tiles);
            int64_t row = first + rows.first;
            const int32_t* sums = x.group_sums + row * (depth / GROUP);
            TILES<F>[rows.last - rows.first](x.values + row * depth, depth, sums, panel, depth, out, row);
        }
    }
}

void multiply_groups(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to) {
    auto* run = w.format == Q8_0 ? multiply<Q8_0> : w.format == Q4_0 ? multiply<Q4_0> : multiply<Q4_1>;
    run(w, x, first, last, p0, p1, to);
}
