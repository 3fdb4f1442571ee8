// The work of each stage of a step, item by item.
#include <math.h>
#include <string.h>
#include <algorithm>

#include "norm.h"
#include "step_run.h"

static void normalise(const Norm& norm, const float* x, float* y) { rms_norm_row(x, norm.weight, norm.width, norm.eps, norm.offset, y); }

// Rotates the first `dims` of a head. Products and sum are rounded apart, as transformers' modules do.
static void rotate(const Rotation& rotation, int64_t position, float* x) {
    int half = rotation.dims / 2;
    const float *cos = rotation.cos + position * half, *sin = rotation.sin + position * half;
    for (int d = 0; d < half; d += LANES) {
        int n = std::min(LANES, half - d);
        Vec16 a = load16(x + d, n), b = load16(x + half + d, n), c = load16(cos + d, n), s = load16(sin + d, n);
        store16(x + d, n, sub(mul(a, c), mul(b, s)));
        store16(x + half + d, n, add(mul(b, c), mul(a, s)));
    }
}

static Share rows_of(int64_t rows, long item) {
    Share share(0, 0, 1);
    share.first = item * ROWS_PER_ITEM;
    share.last = std::min<int64_t>(share.first + ROWS_PER_ITEM, rows);
    return share;
}

    void Step::embed(const Stage& stage, long item, int) {
    Share rows = rows_of(stage.rows, item);
    for (long r = rows.first; r < rows.last; r++) {
        float* to = hidden + r * width;
        if (in.token_ids) scale_row(decoder.embedding + in.token_ids[r] * width, width, decoder.embedding_scale, to);
        else memcpy(to, in.hidden + r * width, sizeof(float) * width);
    }
}

void Step::quantise_one(const Stage& stage, const float* x, int64_t row, int thread) {
    if (stage.norm) {
        float* y = (float*)space.own[thread].base;
        normalise(*stage.norm, x, y);
        x = y;
    }
    quantise_row(x, stage.from_width, row, round_up(stage.from_width, GROUP), quantised);
}

void Step::quantise(const Stage& stage, long item, int thread) {
    Share rows = rows_of(stage.rows, item);
    for (long r = rows.first; r < rows.last; r++) quantise_one(stage, stage.from + r * stage.from_width, r, thread);
}

void Step::quantise_logit_rows(const Stage& stage, long item, int thread) {
    Share rows = rows_of(stage.rows, item);
    for (long r = rows.first; r < rows.last; r++) quantise_one(stage, hidden + in.logit_rows[r] * width, r, thread);
}

void Step::multiply_side_by_side(const Stage& stage, long item, int) {
    Share rows(stage.rows, item / stage.groups, stage.row_blocks), group(stage.panels, item % stage.groups, stage.groups);
    Target to = stage.to;
    int before = 0;  // panels of the weights to the left
    for (const PackedWeight* const* w = stage.weights; before < stage.panels; w++) {
        int count = (*w)->num_panels();
        int first = std::max((int)group.first - before, 0), last = std::min((int)group.last - before, count);
        if (first < last) multiply(**w, quantised, rows.first, rows.last, first, last, to);
        to.y += (*w)->n;
        before += count;
    }
}

// A panel of the gate is written and at once replaced by its activation times the panel of `up`.
void Step::multiply_gated(const Stage& stage, long item, int) {
    const Layer& y = decoder.layers[stage.layer];
    Share rows(stage.rows, item / stage.groups, stage.row_blocks), group(stage.panels, item % stage.groups, stage.groups);
    for (int p = group.first; p < group.last; p++) {
        multiply(*y.gate, quantised, rows.first, rows.last, p, p + 1, {stage.to.y, stage.to.ldy});
        multiply(*y.up, quantised, rows.first, rows.last, p, p + 1, stage.to);
    }
}

void Step::rotate_and_write(const Stage& stage, long item, int) {
    const Layer& y = decoder.layers[stage.layer];
    Call call = call_of(stage.layer);
    int dim = y.cache->key_dim, kv_heads = y.cache->num_kv_heads;
    Share rows = rows_of(stage.rows, item);
    for (long r = rows.first; r < rows.last; r++) {
        float *query = qkv + r * qkv_width(y), *key = query + y.num_heads * dim;
        if (y.query_norm.weight)
            for (int d = 0; d < y.num_heads * dim; d += y.query_norm.width) normalise(y.query_norm, query + d, query + d);
        if (y.key_norm.weight)
            for (int d = 0; d < kv_heads * dim; d += y.key_norm.width) normalise(y.key_norm, key + d, key + d);
        if (y.rotation.cos)
            for (int h = 0; h < y.num_heads + kv_heads; h++) rotate(y.rotation, in.positions[r], query + h * dim);
        write_token(call, r);
    }
}

void Step::attend(const Stage& stage, long item, int thread) {
    plans[plan_of[stage.layer]].attend(call_of(stage.layer), item, space.own[thread].base, partials);
}

void Step::merge(const Stage& stage, long item, int) { plans[plan_of[stage.layer]].merge(call_of(stage.layer), item, partials); }

void Step::settle(const Stage& stage, long item, int) {
    Share rows = rows_of(stage.rows, item);
    for (long r = rows.first; r < rows.last; r++) {
        float *x = aside + r * width, *y = stage.to.y + r * width;
        normalise(*stage.norm, x, x);
        for (int i = 0; i < width; i++) y[i] += stage.to.factor * x[i];
    }
}

void Step::finish_logits(const Stage&, long row, int) {
    float* y = in.logits + row * decoder.vocab_size;
    for (int i = 0; i < decoder.vocab_size; i += LANES) {
        int n = std::min(LANES, decoder.vocab_size - i);
        store16(y + i, n, cap(mul(load16(y + i, n), set16(decoder.logit_factor)), decoder.logit_softcap));
    }
}

// ---------------------------------------------------------------- the likeliest token

// Logits of some panels stay in a thread's scratch, a panel at a time; of each row the largest is kept, of equals the first.
void Step::find_best(const Stage& stage, long item, int thread) {
    const PackedWeight& head = *decoder.head;
    Share rows(stage.rows, item / stage.groups, stage.row_blocks), group(stage.panels, item % stage.groups, stage.groups);
    float* logits = (float*)space.own[thread].base;
    const Vec16 none = set16(-INFINITY), factor = set16(decoder.logit_factor);
    auto best_of = [&](long row) -> Best& { return bests[row * stage.groups + item % stage.groups]; };
    for (long r = rows.first; r < rows.last; r++) best_of(r) = {-INFINITY, 0};
    for (int p = group.first; p < group.last; p++) {
        multiply(head.only(p), quantised, rows.first, rows.last, 0, 1, {logits, PANEL});
        int real = std::min(PANEL, head.n - p * PANEL);
        for (long r = rows.first; r < rows.last; r++) {
            float* row = logits + r * PANEL;
            Vec16 top = none, spoilt = zero16();
            for (int i = 0; i < real; i += LANES) {
                Vec16 x = cap(mul(load16(row + i, std::min(LANES, real - i)), factor), decoder.logit_softcap);
                spoilt = fma(x, zero16(), spoilt);  // stays zero while all are finite
                x = keep_lanes(x, 0, real - i, none);
                store16(row + i, x);
                top = max(top, x);
            }
            Best& best = best_of(r);
            float largest = max_lanes(top);
            if (sum_lanes(spoilt) != 0.f) best.logit = NAN;
            if (largest > best.logit) best = {largest, p * PANEL + (int32_t)(std::find(row, row + real, largest) - row)};
        }
    }
}

void Step::choose(const Stage& stage, long item, int) {
    Share rows = rows_of(stage.rows, item);
    for (long r = rows.first; r < rows.last; r++) {
        Best best = bests[r * stage.groups];
        for (long g = 1; g < stage.groups; g++) {
            const Best& other = bests[r * stage.groups + g];
            if (other.logit > best.logit || other.logit != other.logit) best = other;
        }
        in.chosen[r] = best.id, in.chosen_logits[r] = best.logit;
    }
}
