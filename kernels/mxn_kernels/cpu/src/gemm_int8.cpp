// Products with one scale per channel: sums of a whole row are exact in int32.
#include "epilogue.h"
#include "dot.h"

constexpr int PREFETCH_BYTES = 2048;

typedef void Tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t depth, const Epilogue& out, int64_t row);
#include "gemm_tiles.inc"

// Rows are cut into tiles of nearly equal height: 32 is 11 + 11 + 10.
void multiply_int8(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to) {
    int depth = w.depth(), tiles = (last - first + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int p = p0; p < p1; p++) {
        const uint8_t* panel = w.panel(p);
        Epilogue out(w, x, p, to);
        for (int t = 0; t < tiles; t++) {
            Share rows(last - first, t, tiles);
            int64_t row = first + rows.first;
            TILES[rows.last - rows.first](x.values + row * depth, depth, panel, depth, out, row);
        }
    }
}
