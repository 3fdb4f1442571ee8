// A mixture of experts in int8: every token goes through the experts chosen for it, and what they give is added up by weight.
//
// Tokens are grouped by expert, so an expert's weights are read once however many tokens chose it, and not at all if none did. A
// (token, choice) pair is a row: its sums do not depend on the rows beside it, and a token's experts are added in the order in which
// they were chosen, so a token's result does not depend on its neighbours.
#include <math.h>
#include <string.h>
#include <algorithm>
#include <new>

#include "gemm.h"
#include "simd.h"

// activated = g * sigmoid(slope * g + cubic * g^3) * (u + shift), with g at most `limit` and u within +-`limit`: SiLU, GELU in its tanh
// form, and the clamped SwiGLU of GPT-OSS.
struct Gate {
    float slope, cubic, limit, shift;
};

struct Experts {
    const PackedWeight* const* gate_up;  // [num_experts]: gate channels, then as many of up
    const PackedWeight* const* down;
    int32_t num_experts;
    Gate gate;
};

MXN_INLINE Vec16 negative(Vec16 x) { return sub(zero16(), x); }
MXN_INLINE Vec16 at_most(Vec16 x, Vec16 limit) { return negative(max(negative(limit), negative(x))); }  // keeps NaN

static void activate(const Gate& gate, const float* g, const float* u, int width, float* y) {
    Vec16 limit = set16(gate.limit);
    for (int i = 0; i < width; i += LANES) {
        int n = std::min(LANES, width - i);
        Vec16 a = at_most(load16(g + i, n), limit), b = max(negative(limit), at_most(load16(u + i, n), limit));
        Vec16 power = mul(a, fma(mul(a, a), set16(gate.cubic), set16(gate.slope)));
        Vec16 opened = div(a, add(set16(1.f), exp(negative(power))));
        store16(y + i, n, mul(opened, add(b, set16(gate.shift))));
    }
}

class ExpertsCall {
   public:
    ExpertsCall(const Experts& experts, Workspace& space, const float* x, int64_t tokens, const int64_t* chosen, const float* weights,
                int top_k, float* y)
        : experts(experts), space(space), x(x), tokens(tokens), chosen(chosen), weights(weights), top_k(top_k), y(y),
          hidden(experts.gate_up[0]->k), inner(experts.down[0]->k), rows(tokens * top_k) {}

    // Returns the first pair whose expert is not there, or -1.
    int64_t sort_by_expert() {
        std::vector<int64_t> first(experts.num_experts + 1, 0);
        for (int64_t pair = 0; pair < rows; pair++) {
            if (chosen[pair] < 0 || chosen[pair] >= experts.num_experts) return pair;
            first[chosen[pair] + 1]++;
        }
        for (int e = 0; e < experts.num_experts; e++) first[e + 1] += first[e];
        for (int e = 0; e < experts.num_experts; e++) {
            if (first[e] == first[e + 1]) continue;
            add_products(products[0], e, *experts.gate_up[e], first[e], first[e + 1]);
            add_products(products[1], e, *experts.down[e], first[e], first[e + 1]);
        }
        row_of.resize(rows);
        for (int64_t pair = 0; pair < rows; pair++) row_of[pair] = first[chosen[pair]]++;
        return -1;
    }

    bool reserve() {
        if (!space.shared.reserve(lay_out(nullptr))) return false;
        lay_out(space.shared.base);
        for (Arena& arena : space.own)
            if (!arena.reserve(sizeof(float) * round_up(inner, LANES))) return false;
        return true;
    }

    void run() {
        const long blocks = (tokens + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, row_blocks = (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
        const long items[] = {blocks, (long)products[0].size(), row_blocks, (long)products[1].size(), blocks};
        space.team.run(items, 5, false, [&](int phase, long item, int thread) {
            FlushDenormals guard;
            int64_t from = item * ROWS_PER_ITEM, to = std::min<int64_t>(from + ROWS_PER_ITEM, phase == 2 ? rows : tokens);
            switch (phase) {
                case 0: for (int64_t t = from; t < to; t++) quantise_token(t); break;
                case 1: run_product(products[0][item], *experts.gate_up[products[0][item].expert], inputs, gate_up); break;
                case 2: for (int64_t r = from; r < to; r++) gate_row(r, (float*)space.own[thread].base); break;
                case 3: run_product(products[1][item], *experts.down[products[1][item].expert], gated, given); break;
                default: for (int64_t t = from; t < to; t++) add_up(t);
            }
        });
    }

   private:
    struct Product {
        int expert;
        int64_t first, last;  // rows
        int p0, p1;           // panels
    };

    const Experts& experts;
    Workspace& space;
    const float* x;
    const int64_t tokens;
    const int64_t* chosen;
    const float* weights;
    const int top_k;
    float* y;
    const int hidden, inner;
    const int64_t rows;
    std::vector<int64_t> row_of;  // of a pair, once sorted
    std::vector<Product> products[2];
    Activations inputs, gated;
    float *gate_up, *given;

    bool has_groups(const PackedWeight* const* weights) const {
        return std::any_of(weights, weights + experts.num_experts, [](const PackedWeight* w) { return w->format != INT8; });
    }

    size_t lay_out(char* base) {
        Layout layout{base};
        inputs = Activations::take(layout, rows, experts.gate_up[0]->depth(), has_groups(experts.gate_up));
        gated = Activations::take(layout, rows, experts.down[0]->depth(), has_groups(experts.down));
        gate_up = layout.take<float>(rows * 2 * inner);
        given = layout.take<float>(rows * hidden);
        return layout.used;
    }

    void add_products(std::vector<Product>& to, int expert, const PackedWeight& w, int64_t first, int64_t last) {
        Division division(last - first, w.num_panels(), w.depth(), space.threads());
        for (int64_t b = 0; b < division.row_blocks; b++)
            for (int64_t g = 0; g < division.groups; g++) {
                Share block(last - first, b, division.row_blocks), group(w.num_panels(), g, division.groups);
                to.push_back({expert, first + block.first, first + block.last, (int)group.first, (int)group.last});
            }
    }

    static void run_product(const Product& part, const PackedWeight& w, const Activations& from, float* to) {
        multiply(w, from, part.first, part.last, part.p0, part.p1, {to, w.n});
    }

    // Once, into the row of its first expert; the other rows get copies.
    void quantise_token(int64_t token) {
        const int depth = experts.gate_up[0]->depth();
        const int64_t* to = &row_of[token * top_k];
        quantise_row(x + token * hidden, hidden, to[0], depth, inputs);
        for (int j = 1; j < top_k; j++) {
            memcpy(inputs.values + to[j] * depth, inputs.values + to[0] * depth, depth);
            inputs.scales[to[j]] = inputs.scales[to[0]];
            inputs.surplus[to[j]] = inputs.surplus[to[0]];
            const int64_t groups = depth / GROUP;
            if (inputs.group_sums) memcpy(inputs.group_sums + to[j] * groups, inputs.group_sums + to[0] * groups, sizeof(int32_t) * groups);
        }
    }

    void gate_row(int64_t row, float* scratch) {
        const float* g = gate_up + row * 2 * inner;
        activate(experts.gate, g, g + inner, inner, scratch);
        quantise_row(scratch, inner, row, experts.down[0]->depth(), gated);
    }

    void add_up(int64_t token) {
        const int64_t* from = &row_of[token * top_k];
        for (int i = 0; i < hidden; i += LANES) {
            int n = std::min(LANES, hidden - i);
            Vec16 sum = zero16();
            for (int j = 0; j < top_k; j++) sum = fma(set16(weights[token * top_k + j]), load16(given + from[j] * hidden + i, n), sum);
            store16(y + token * hidden + i, n, sum);
        }
    }
};

// Returns 0, OUT_OF_MEMORY, or 1 + the first pair whose expert is not there.
extern "C" int64_t mxn_int8_experts(Workspace* space, const Experts* experts, const float* x, int64_t tokens, const int64_t* chosen,
                                    const float* weights, int top_k, float* y) {
    if (tokens == 0 || top_k == 0) return 0;
    Turn turn(space);
    try {
        ExpertsCall call(*experts, *space, x, tokens, chosen, weights, top_k, y);
        int64_t missing = call.sort_by_expert();
        if (missing >= 0) return missing + 1;
        if (!call.reserve()) return OUT_OF_MEMORY;
        call.run();
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return 0;
}
