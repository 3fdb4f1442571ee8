// One linear layer: y = x W^T + bias, W in any packed format.
#include <algorithm>

#include "dot.h"
#include "gemm.h"

void multiply(const PackedWeight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to) {
    (w.format == INT8 ? multiply_int8 : multiply_groups)(w, x, first, last, p0, p1, to);
}

constexpr int ROW_STEP = 12;  // a multiple of every tile's height, so that only a product's last tiles are lower

Division::Division(int64_t rows, int panels, int depth, int max_threads) {
    int64_t work = (int64_t)panels * PANEL * depth * (1 + rows / 8);
    threads = work < 65536 ? 1 : max_threads;
    if (threads > panels) threads = panels;
    quantise_alone = threads == 1 || rows * depth <= 4096;
    int64_t row_block = 393216 / depth / ROW_STEP * ROW_STEP;
    if (row_block < 48) row_block = 48;
    row_blocks = (rows + row_block - 1) / row_block;
    // Large products are handed out in small pieces, so that a core lost to a neighbour does not hold up the other.
    groups = threads == 1 ? 1 : work < (4 << 20) ? threads : threads * 8;
    if (groups > panels) groups = panels;
}

extern "C" int mxn_linear(Workspace* space, const PackedWeight* w, const float* x, int64_t rows, float* y) {
    if (rows == 0) return 0;
    Turn turn(space);
    int depth = w->depth(), panels = w->num_panels();
    Division division(rows, panels, depth, space->threads());
    auto lay_out = [&](char* base, Activations* to) {
        Layout layout{base};
        *to = Activations::take(layout, rows, depth, w->format != INT8);
        return layout.used;
    };
    Activations common;
    size_t bytes = lay_out(nullptr, &common);
    if (division.quantise_alone) {
        for (int t = 0; t < division.threads; t++)
            if (!space->own[t].reserve(bytes)) return OUT_OF_MEMORY;
    } else if (!space->shared.reserve(bytes)) return OUT_OF_MEMORY;
    lay_out(space->shared.base, &common);

    // Phase 0 quantises rows, phase 1 multiplies. A thread that quantises alone does so before its first item.
    std::vector<char> ready(division.quantise_alone ? division.threads : 0);
    const long quantise_items = division.quantise_alone ? 0 : (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
    const long items[] = {quantise_items, division.items()};
    space->team.run(items, 2, division.threads == 1, [&](int phase, long item, int thread) {
        FlushDenormals guard;
        if (phase == 0) {
            int64_t last = std::min((item + 1) * ROWS_PER_ITEM, rows);
            for (int64_t r = item * ROWS_PER_ITEM; r < last; r++) quantise_row(x + r * w->k, w->k, r, depth, common);
            return;
        }
        Activations input = common;
        if (division.quantise_alone) {
            lay_out(space->own[thread].base, &input);
            if (!ready[thread])
                for (int64_t r = 0; r < rows; r++) quantise_row(x + r * w->k, w->k, r, depth, input);
            ready[thread] = 1;
        }
        Share block(rows, item / division.groups, division.row_blocks), group(panels, item % division.groups, division.groups);
        multiply(*w, input, block.first, block.last, group.first, group.last, {y, w->n});
    });
    return 0;
}

extern "C" Workspace* mxn_workspace_create(int threads) { return new (std::nothrow) Workspace(threads); }
extern "C" void mxn_workspace_destroy(Workspace* space) {
    if (!space->team.lost_threads()) delete space;  // threads that are not there cannot be waited for
}
