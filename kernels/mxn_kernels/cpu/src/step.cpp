// One step of a decoder in one call: a list of stages, each cut into items, run by the team as phases of one job.
//
// A layer is: norm and quantise; q, k, v; head norms, rotation and cache write; attention; quantise; output projection onto the
// residual; norm and quantise; gate and up, multiplied as they are made; quantise; down onto the residual. A model that normalises
// what a sublayer gives has that stored aside and added by a stage of its own. Where only the likeliest token of each row is wanted,
// logits stay in the threads' scratch.
#include <string.h>
#include <algorithm>
#include <array>
#include <chrono>
#include <new>

#include "step_run.h"

// Everything that is used as an index, as in attention.
static Fault check(const Decoder& decoder, const StepInput& in) {
    for (int l = in.first_layer; l < in.last_layer; l++) {
        if (l > in.first_layer && decoder.layers[l].cache->num_blocks == decoder.layers[l - 1].cache->num_blocks) continue;
        Fault fault = check(*in.batch, *decoder.layers[l].cache);
        if (fault.kind != FINE) return fault;
    }
    int positions = INT32_MAX, tokens = in.batch->num_tokens;
    for (int l = in.first_layer; l < in.last_layer; l++)
        if (decoder.layers[l].rotation.cos) positions = std::min(positions, decoder.layers[l].rotation.positions);
    for (int t = 0; t < tokens; t++) {
        int64_t id = in.token_ids ? in.token_ids[t] : 0, position = in.positions[t];
        if (id < 0 || id >= decoder.vocab_size) return {BAD_TOKEN, t, (int32_t)id, decoder.vocab_size};
        if (position < 0 || position >= positions) return {BAD_POSITION, t, (int32_t)position, positions};
    }
    for (int r = 0; r < in.num_logit_rows; r++)
        if (in.logit_rows[r] < 0 || in.logit_rows[r] >= tokens) return {BAD_ROW, r, (int32_t)in.logit_rows[r], tokens};
    return {FINE, 0, 0, 0};
}

// ---------------------------------------------------------------- a step

bool Step::prepare() {
    size_t own = make_plans();
    if (in.chosen) own = std::max(own, sizeof(float) * PANEL * in.num_logit_rows);
    if (!space.shared.reserve(lay_out(nullptr))) return false;
    lay_out(space.shared.base);
    for (Arena& arena : space.own)
        if (!arena.reserve(own)) return false;
    for (int l = in.first_layer; l < in.last_layer; l++) operands[l] = operands_of(decoder.layers[l]);
    list_stages();
    return true;
}

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of one thread by kind of stage, on cache lines of its own.
struct alignas(CACHE_LINE) Seconds {
    double of[NUM_STAGE_KINDS] = {};
};

void Step::run() {
    std::vector<long> items;
    for (const Stage& stage : stages) items.push_back(stage.items);
    std::vector<Seconds> seconds(in.profile ? space.threads() : 0);
    double started = in.profile ? now() : 0;
    space.team.run(items.data(), (int)items.size(), false, [&](int phase, long item, int thread) {
        FlushDenormals guard;
        const Stage& stage = stages[phase];
        double before = in.profile ? now() : 0;
        (this->*stage.work)(stage, item, thread);
        if (in.profile) seconds[thread].of[stage.kind] += now() - before;
    });
    if (in.hidden_out) memcpy(in.hidden_out, hidden, sizeof(float) * tokens * width);
    if (!in.profile) return;
    in.profile[NUM_STAGE_KINDS] += now() - started;
    for (const Seconds& thread : seconds)
        for (int k = 0; k < NUM_STAGE_KINDS; k++) in.profile[k] += thread.of[k] / space.threads();
}

static std::array<const PackedWeight*, MAX_QKV + 4> weights_of(const Layer& l) {
    return {l.qkv[0], l.qkv[1], l.qkv[2], l.out, l.gate, l.up, l.down};
}

Operands Step::operands_of(const Layer& l) const {
    int64_t token_stride = qkv_width(l), dim = l.cache->key_dim;
    const float *keys = qkv + l.num_heads * dim, *values = keys + l.cache->num_kv_heads * dim;
    return {{qkv, dim, token_stride}, {keys, dim, token_stride}, {values, l.cache->value_dim, token_stride}, attended, l.sinks,
            l.num_heads, l.window, l.scaling, l.softcap};
}

// Layers of one shape and window share a plan. Returns the scratch that a thread needs for all of them.
size_t Step::make_plans() {
    size_t own = sizeof(float) * width, made = 0;
    plan_of.assign(in.last_layer, -1);
    operands.resize(in.last_layer);
    for (int l = in.first_layer; l < in.last_layer; l++) {
        const Layer& y = decoder.layers[l];
        operands[l].num_heads = y.num_heads, operands[l].window = y.window;
        for (int e = in.first_layer; e < l && plan_of[l] < 0; e++) {
            const Layer& x = decoder.layers[e];
            if (x.window == y.window && x.num_heads == y.num_heads && x.cache->num_kv_heads == y.cache->num_kv_heads &&
                x.cache->key_dim == y.cache->key_dim && x.cache->value_dim == y.cache->value_dim)
                plan_of[l] = plan_of[e];
        }
        if (plan_of[l] >= 0) continue;
        plan_of[l] = (int)made++;
        if (plans.size() < made) plans.resize(made);
        plans[plan_of[l]].make(call_of(l));
        own = std::max(own, plans[plan_of[l]].scratch_bytes(call_of(l)));
    }
    return own;
}

size_t Step::lay_out(char* base) {
    int qkv_max = 0, attended_max = 0, gated_max = 0, depth = decoder.head->depth();
    size_t partial_bytes = 0;
    for (int l = in.first_layer; l < in.last_layer; l++) {
        const Layer& y = decoder.layers[l];
        qkv_max = std::max(qkv_max, qkv_width(y));
        attended_max = std::max(attended_max, y.out->k);
        depth = std::max(depth, std::max(y.qkv[0]->depth(), y.out->depth()));
        if (y.down) gated_max = std::max(gated_max, y.down->k), depth = std::max(depth, y.down->depth());
        partial_bytes = std::max(partial_bytes, plans[plan_of[l]].partials_bytes(call_of(l)));
    }
    bool has_groups = decoder.head->format != INT8;
    for (int l = in.first_layer; l < in.last_layer; l++)
        for (const PackedWeight* w : weights_of(decoder.layers[l])) has_groups |= w && w->format != INT8;
    int64_t rows = std::max<int64_t>(tokens, in.num_logit_rows);
    Layout layout{base};
    hidden = layout.take<float>(tokens * width);
    aside = layout.take<float>(tokens * width);
    qkv = layout.take<float>(tokens * qkv_max);
    attended = layout.take<float>(tokens * attended_max);
    gated = layout.take<float>(tokens * gated_max);
    partials = (float*)layout.take<char>(partial_bytes);
    quantised = Activations::take(layout, rows, depth, has_groups);
    bests = layout.take<Best>(in.chosen ? in.num_logit_rows * head_division().groups : 0);
    return layout.used;
}

// ---------------------------------------------------------------- the list of stages

static long row_items(int64_t rows) { return (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM; }

Step::Stage& Step::add(StageKind kind, Work work, long items, int layer) {
    Stage stage;
    stage.kind = kind, stage.work = work, stage.items = items, stage.layer = layer;
    stages.push_back(stage);
    return stages.back();
}

Step::Stage& Step::add_rows(StageKind kind, Work work, int64_t rows, const Norm* norm, const float* from, int from_width) {
    Stage& stage = add(kind, work, row_items(rows));
    stage.rows = rows, stage.norm = norm && norm->weight ? norm : nullptr, stage.from = from, stage.from_width = from_width;
    return stage;
}

// The quantised rows times some weights side by side.
Step::Stage& Step::add_product(StageKind kind, Work work, int64_t rows, const PackedWeight* const* weights, int count, const Target& to) {
    int panels = 0;
    for (int i = 0; i < count; i++) panels += weights[i]->num_panels();
    Division division(rows, panels, weights[0]->depth(), space.threads());
    Stage& stage = add(kind, work, division.items());
    stage.rows = rows, stage.weights = weights, stage.panels = panels, stage.to = to;
    stage.groups = division.groups, stage.row_blocks = division.row_blocks;
    return stage;
}

// A sublayer's last product, onto the residual stream, through a norm if the model has one there.
void Step::add_residual(StageKind kind, const Layer& y, const PackedWeight* const* weight, const Norm& norm) {
    Target stream{hidden, width, ADD, y.residual_factor};
    if (!norm.weight) {
        add_product(kind, &Step::multiply_side_by_side, tokens, weight, 1, stream);
        return;
    }
    add_product(kind, &Step::multiply_side_by_side, tokens, weight, 1, {aside, width});
    add_rows(SETTLE, &Step::settle, tokens, &norm, aside, width).to = stream;
}

void Step::list_stages() {
    add_rows(EMBED, &Step::embed, tokens, nullptr, nullptr, width);
    for (int l = in.first_layer; l < in.last_layer; l++) {
        const Layer& y = decoder.layers[l];
        const Plan& plan = plans[plan_of[l]];
        add_rows(QUANTISE, &Step::quantise, tokens, &y.before_attention, hidden, width);
        int count = 0;
        while (count < MAX_QKV && y.qkv[count]) count++;
        add_product(QKV, &Step::multiply_side_by_side, tokens, y.qkv, count, {qkv, qkv_width(y)});
        add(ROTATE, &Step::rotate_and_write, row_items(tokens), l).rows = tokens;
        add(ATTEND, &Step::attend, plan.num_units(), l);
        add(MERGE, &Step::merge, (long)plan.merges.size(), l);
        add_rows(QUANTISE, &Step::quantise, tokens, nullptr, attended, y.out->k);
        add_residual(OUT, y, &y.out, y.after_attention);
        if (!y.gate) continue;
        add_rows(QUANTISE, &Step::quantise, tokens, &y.before_mlp, hidden, width);
        add_product(GATE_UP, &Step::multiply_gated, tokens, &y.gate, 1, {gated, y.down->k, (Combine)y.activation}).layer = l;
        add_rows(QUANTISE, &Step::quantise, tokens, nullptr, gated, y.down->k);
        add_residual(DOWN, y, &y.down, y.after_mlp);
    }
    int rows = in.num_logit_rows;
    if (!rows) return;
    add_rows(QUANTISE, &Step::quantise_logit_rows, rows, &decoder.final_norm, hidden, width);
    if (in.chosen) {
        long groups = add_product(HEAD, &Step::find_best, rows, &decoder.head, 1, {}).groups;
        Stage& last = add(HEAD, &Step::choose, row_items(rows));
        last.rows = rows, last.groups = groups;
        return;
    }
    add_product(HEAD, &Step::multiply_side_by_side, rows, &decoder.head, 1, {in.logits, decoder.vocab_size});
    if (decoder.logit_factor != 1.f || decoder.logit_softcap > 0) add(HEAD, &Step::finish_logits, rows);
}

// ---------------------------------------------------------------- entry points

extern "C" std::vector<Plan>* mxn_step_plans_create() { return new (std::nothrow) std::vector<Plan>(); }
extern "C" void mxn_step_plans_destroy(std::vector<Plan>* plans) { delete plans; }

extern "C" int mxn_step(Workspace* space, std::vector<Plan>* plans, const Decoder* decoder, const StepInput* in, Fault* fault) {
    *fault = check(*decoder, *in);
    if (fault->kind != FINE || in->batch->num_tokens == 0) return fault->kind;
    Turn turn(space);
    try {
        Step step(*decoder, *in, *space, *plans);
        if (!step.prepare()) return (fault->kind = NO_MEMORY);
        step.run();
    } catch (const std::bad_alloc&) {
        return (fault->kind = NO_MEMORY);
    }
    return FINE;
}
