// One step of a decoder in one call: a list of stages, each cut into items, run by the team as phases of one job.
//
// A layer is: norm and quantise; q, k, v; head norms, rotation and cache write; attention; quantise; output projection onto the
// residual; norm and quantise; gate and up, multiplied as they are made; quantise; down onto the residual. A model that normalises
// what a sublayer gives has that stored aside and added by a stage of its own.
#include "step.h"

#include <math.h>
#include <string.h>
#include <algorithm>
#include <array>
#include <new>

#include "norm.h"

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

class Step {
   public:
    Step(const Decoder& decoder, const StepInput& in, Workspace& space, std::vector<Plan>& plans)
        : decoder(decoder), in(in), space(space), plans(plans), tokens(in.batch->num_tokens), width(decoder.hidden_size) {}

    // Finds memory and lists the work. False if there is not enough memory.
    bool prepare() {
        size_t own = make_plans();
        if (!space.shared.reserve(lay_out(nullptr))) return false;
        lay_out(space.shared.base);
        for (Arena& arena : space.own)
            if (!arena.reserve(own)) return false;
        for (int l = in.first_layer; l < in.last_layer; l++) operands[l] = operands_of(decoder.layers[l]);
        list_stages();
        return true;
    }

    void run() {
        std::vector<long> items;
        for (const Stage& stage : stages) items.push_back(stage.items);
        space.team.run(items.data(), (int)items.size(), false, [&](int phase, long item, int thread) {
            FlushDenormals guard;
            (this->*stages[phase].work)(stages[phase], item, thread);
        });
        if (in.hidden_out) memcpy(in.hidden_out, hidden, sizeof(float) * tokens * width);
    }

   private:
    struct Stage {
        void (Step::*work)(const Stage&, long item, int thread);
        long items;
        int layer = -1;
        // Of rows that are normalised, quantised or added up:
        int64_t rows = 0;
        const Norm* norm = nullptr;
        const float* from = nullptr;
        int from_width = 0;
        // Of products:
        const PackedWeight* const* weights = nullptr;
        int panels = 0;
        long groups = 0, row_blocks = 0;
        Target to{};
    };

    const Decoder& decoder;
    const StepInput& in;
    Workspace& space;
    std::vector<Plan>& plans;
    const int64_t tokens;
    const int width;
    std::vector<int> plan_of;
    std::vector<Operands> operands;
    std::vector<Stage> stages;
    float *hidden, *aside, *qkv, *attended, *gated, *partials;  // hidden: the residual stream; aside: a sublayer's result before its norm
    Activations quantised;

    // ------------------------------------------------------------ memory

    static int qkv_width(const Layer& l) {
        return l.num_heads * l.cache->key_dim + l.cache->num_kv_heads * (l.cache->key_dim + l.cache->value_dim);
    }

    static std::array<const PackedWeight*, MAX_QKV + 4> weights_of(const Layer& l) {
        return {l.qkv[0], l.qkv[1], l.qkv[2], l.out, l.gate, l.up, l.down};
    }

    Operands operands_of(const Layer& l) const {
        int64_t token_stride = qkv_width(l), dim = l.cache->key_dim;
        const float *keys = qkv + l.num_heads * dim, *values = keys + l.cache->num_kv_heads * dim;
        return {{qkv, dim, token_stride}, {keys, dim, token_stride}, {values, l.cache->value_dim, token_stride}, attended, l.sinks,
                l.num_heads, l.window, l.scaling, l.softcap};
    }

    Call call_of(int l) const { return {*decoder.layers[l].cache, *in.batch, operands[l]}; }

    // Layers of one shape and window share a plan. Returns the scratch that a thread needs for all of them.
    size_t make_plans() {
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

    size_t lay_out(char* base) {
        int qkv_max = 0, attended_max = 0, gated_max = 0, depth = decoder.head->depth();
        size_t partial_bytes = 0;
        for (int l = in.first_layer; l < in.last_layer; l++) {
            const Layer& y = decoder.layers[l];
            qkv_max = std::max(qkv_max, qkv_width(y));
            attended_max = std::max(attended_max, y.out->k);
            gated_max = std::max(gated_max, y.down->k);
            depth = std::max({depth, y.out->depth(), y.down->depth(), y.gate->depth()});
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
        return layout.used;
    }

    // ------------------------------------------------------------ the list of stages

    static long row_items(int64_t rows) { return (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM; }
    static Share rows_of(const Stage& stage, long item) {
        Share share(0, 0, 1);
        share.first = item * ROWS_PER_ITEM;
        share.last = std::min<int64_t>(share.first + ROWS_PER_ITEM, stage.rows);
        return share;
    }

    Stage& add(void (Step::*work)(const Stage&, long, int), long items, int layer = -1) {
        Stage stage;
        stage.work = work, stage.items = items, stage.layer = layer;
        stages.push_back(stage);
        return stages.back();
    }

    Stage& add_rows(void (Step::*work)(const Stage&, long, int), int64_t rows, const Norm* norm, const float* from, int from_width) {
        Stage& stage = add(work, row_items(rows));
        stage.rows = rows, stage.norm = norm && norm->weight ? norm : nullptr, stage.from = from, stage.from_width = from_width;
        return stage;
    }

    // The quantised rows times some weights side by side.
    void add_product(void (Step::*work)(const Stage&, long, int), int64_t rows, const PackedWeight* const* weights, int count, const Target& to) {
        int panels = 0;
        for (int i = 0; i < count; i++) panels += weights[i]->num_panels();
        Division division(rows, panels, weights[0]->depth(), space.threads());
        Stage& stage = add(work, division.items());
        stage.rows = rows, stage.weights = weights, stage.panels = panels, stage.to = to;
        stage.groups = division.groups, stage.row_blocks = division.row_blocks;
    }

    // A sublayer's last product, onto the residual stream, through a norm if the model has one there.
    void add_residual(const Layer& y, const PackedWeight* const* weight, const Norm& norm) {
        if (!norm.weight) return add_product(&Step::multiply_side_by_side, tokens, weight, 1, {hidden, width, ADD, y.residual_factor});
        add_product(&Step::multiply_side_by_side, tokens, weight, 1, {aside, width});
        add_rows(&Step::settle, tokens, &norm, aside, width).to = {hidden, width, ADD, y.residual_factor};
    }

    void list_stages() {
        add_rows(&Step::embed, tokens, nullptr, nullptr, width);
        for (int l = in.first_layer; l < in.last_layer; l++) {
            const Layer& y = decoder.layers[l];
            const Plan& plan = plans[plan_of[l]];
            add_rows(&Step::quantise, tokens, &y.before_attention, hidden, width);
            int count = 0;
            while (count < MAX_QKV && y.qkv[count]) count++;
            add_product(&Step::multiply_side_by_side, tokens, y.qkv, count, {qkv, qkv_width(y)});
            add(&Step::rotate_and_write, row_items(tokens), l).rows = tokens;
            add(&Step::attend, plan.num_units(), l);
            add(&Step::merge, (long)plan.merges.size(), l);
            add_rows(&Step::quantise, tokens, nullptr, attended, y.out->k);
            add_residual(y, &y.out, y.after_attention);
            add_rows(&Step::quantise, tokens, &y.before_mlp, hidden, width);
            add_product(&Step::multiply_gated, tokens, &y.gate, 1, {gated, y.down->k, (Combine)y.activation});
            stages.back().layer = l;
            add_rows(&Step::quantise, tokens, nullptr, gated, y.down->k);
            add_residual(y, &y.down, y.after_mlp);
        }
        if (!in.num_logit_rows) return;
        add_rows(&Step::quantise_logit_rows, in.num_logit_rows, &decoder.final_norm, hidden, width);
        add_product(&Step::multiply_side_by_side, in.num_logit_rows, &decoder.head, 1, {in.logits, decoder.vocab_size});
        if (decoder.logit_factor != 1.f || decoder.logit_softcap > 0) add(&Step::finish_logits, in.num_logit_rows);
    }

    // ------------------------------------------------------------ the stages

    void embed(const Stage& stage, long item, int) {
        Share rows = rows_of(stage, item);
        for (long r = rows.first; r < rows.last; r++) {
            float* to = hidden + r * width;
            if (in.token_ids) scale_row(decoder.embedding + in.token_ids[r] * width, width, decoder.embedding_scale, to);
            else memcpy(to, in.hidden + r * width, sizeof(float) * width);
        }
    }

    void quantise_one(const Stage& stage, const float* x, int64_t row, int thread) {
        if (stage.norm) {
            float* y = (float*)space.own[thread].base;
            normalise(*stage.norm, x, y);
            x = y;
        }
        quantise_row(x, stage.from_width, row, round_up(stage.from_width, GROUP), quantised);
    }

    void quantise(const Stage& stage, long item, int thread) {
        Share rows = rows_of(stage, item);
        for (long r = rows.first; r < rows.last; r++) quantise_one(stage, stage.from + r * stage.from_width, r, thread);
    }

    void quantise_logit_rows(const Stage& stage, long item, int thread) {
        Share rows = rows_of(stage, item);
        for (long r = rows.first; r < rows.last; r++) quantise_one(stage, hidden + in.logit_rows[r] * width, r, thread);
    }

    void multiply_side_by_side(const Stage& stage, long item, int) {
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
    void multiply_gated(const Stage& stage, long item, int) {
        const Layer& y = decoder.layers[stage.layer];
        Share rows(stage.rows, item / stage.groups, stage.row_blocks), group(stage.panels, item % stage.groups, stage.groups);
        for (int p = group.first; p < group.last; p++) {
            multiply(*y.gate, quantised, rows.first, rows.last, p, p + 1, {stage.to.y, stage.to.ldy});
            multiply(*y.up, quantised, rows.first, rows.last, p, p + 1, stage.to);
        }
    }

    void rotate_and_write(const Stage& stage, long item, int) {
        const Layer& y = decoder.layers[stage.layer];
        Call call = call_of(stage.layer);
        int dim = y.cache->key_dim, kv_heads = y.cache->num_kv_heads;
        Share rows = rows_of(stage, item);
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

    void attend(const Stage& stage, long item, int thread) {
        plans[plan_of[stage.layer]].attend(call_of(stage.layer), item, space.own[thread].base, partials);
    }

    void merge(const Stage& stage, long item, int) { plans[plan_of[stage.layer]].merge(call_of(stage.layer), item, partials); }

    void settle(const Stage& stage, long item, int) {
        Share rows = rows_of(stage, item);
        for (long r = rows.first; r < rows.last; r++) {
            float *x = aside + r * width, *y = stage.to.y + r * width;
            normalise(*stage.norm, x, x);
            for (int i = 0; i < width; i++) y[i] += stage.to.factor * x[i];
        }
    }

    void finish_logits(const Stage&, long row, int) {
        float* y = in.logits + row * decoder.vocab_size;
        for (int i = 0; i < decoder.vocab_size; i += LANES) {
            int n = std::min(LANES, decoder.vocab_size - i);
            store16(y + i, n, cap(mul(load16(y + i, n), set16(decoder.logit_factor)), decoder.logit_softcap));
        }
    }
};

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
