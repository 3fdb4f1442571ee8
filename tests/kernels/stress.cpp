// Runs the CPU kernels on more threads than cores, in quick turns, and compares every result with one thread's. Built with sanitizers
// by test_sanitizers.py; prints "done" at the end.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <random>
#include <thread>

#include "step.h"

extern "C" {
Workspace* mxn_workspace_create(int threads);
void mxn_workspace_destroy(Workspace* space);
int64_t mxn_pack_int8(Workspace* space, const float* weight, int64_t n, int64_t k, uint8_t* panels, float* scales);
int64_t mxn_pack_groups(Workspace* space, const float* weight, int64_t n, int64_t k, Format format, uint8_t* panels);
int mxn_linear(Workspace* space, const PackedWeight* w, const float* x, int64_t rows, float* y);
void mxn_rms_norm(Workspace* space, const float* x, const float* weight, int64_t rows, int width, float eps, float offset, float* y);
int mxn_paged_attention(Workspace* space, Plan* plan, const LayerCache* cache, const Batch* batch, const Operands* in, Fault* fault);
int mxn_step(Workspace* space, std::vector<Plan>* plans, const Decoder* decoder, const StepInput* in, Fault* fault);
}

static std::mt19937 generator(0);

static void expect(bool fact, const char* what) {
    if (fact) return;
    fprintf(stderr, "failed: %s\n", what);
    exit(1);
}

static std::vector<float> normal(size_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float& v : values) v = distribution(generator);
    return values;
}

static bool equal(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

template <class T> struct Aligned {
    T* data;
    explicit Aligned(size_t count) : data((T*)aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) { memset((void*)data, 0, count * sizeof(T)); }
    Aligned(const Aligned&) = delete;
    Aligned(Aligned&& other) : data(other.data) { other.data = nullptr; }
    ~Aligned() { free(data); }
};

// ---------------------------------------------------------------- the team

static void every_item_runs_once_and_in_order(int threads, int turns) {
    Team team(threads);
    for (int turn = 0; turn < turns; turn++) {
        int phases = generator() % 9;
        std::vector<long> items(phases);
        for (long& n : items) n = generator() % 4 ? generator() % 40 : 0;
        std::vector<std::vector<int>> seen(phases);  // plain memory: a race shows
        for (int p = 0; p < phases; p++) seen[p].assign(items[p], 0);
        team.run(items.data(), phases, false, [&](int phase, long item, int thread) {
            expect(thread >= 0 && thread < team.size(), "thread number");
            for (int p = 0; p < phase; p++)
                for (int count : seen[p]) expect(count == 1, "an earlier phase is done");
            seen[phase][item]++;
        });
        for (auto& phase : seen)
            for (int count : phase) expect(count == 1, "every item runs once");
        if (turn % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));  // long enough for the team to fall asleep
    }
}

static void teams_come_and_go() {
    for (int i = 0; i < 40; i++) {
        Team team(1 + i % 5);
        const long items[] = {i % 3, 7};
        std::atomic<long> count{0};
        for (int turn = 0; turn < i % 4; turn++) team.run(items, 2, false, [&](int, long, int) { count++; });
        expect(count == (i % 4) * (i % 3 + 7), "work of a short-lived team");
    }
}

// ---------------------------------------------------------------- products and norms

static const Format FORMATS[] = {INT8, Q4_0, Q8_0, Q4_1};

struct Weight {
    Aligned<uint8_t> panels;
    std::vector<float> scales, bias;
    PackedWeight view;

    Weight(int n, int k, Format format, Workspace* space)
        : panels(size_t((n + 31) / 32) * ((k + 31) / 32) * group_bytes(format)), scales((n + 31) / 32 * 32), bias(scales.size()) {
        view = {panels.data, format == INT8 ? scales.data() : nullptr, bias.data(), n, k, format};
        std::vector<float> values = normal(size_t(n) * k);
        int64_t bad = format == INT8 ? mxn_pack_int8(space, values.data(), n, k, panels.data, scales.data())
                                     : mxn_pack_groups(space, values.data(), n, k, format, panels.data);
        expect(bad == -1, "packing");
    }
};

static void products_and_norms_equal_one_thread(Workspace* alone, Workspace* many) {
    const int shapes[][3] = {{1, 40, 33}, {1, 300, 576}, {7, 65, 100}, {40, 200, 96}, {130, 96, 300}};
    for (int turn = 0; turn < 8; turn++)
        for (auto [rows, n, k] : shapes) {
            Weight w(n, k, FORMATS[turn % 4], many);
            std::vector<float> x = normal(size_t(rows) * k), one(size_t(rows) * n), other(one.size());
            mxn_linear(alone, &w.view, x.data(), rows, one.data());
            mxn_linear(many, &w.view, x.data(), rows, other.data());
            expect(equal(one, other), "products are equal");
            std::vector<float> scale = normal(k), y(x.size()), z(x.size());
            mxn_rms_norm(alone, x.data(), scale.data(), rows, k, 1e-6f, 1.f, y.data());
            mxn_rms_norm(many, x.data(), scale.data(), rows, k, 1e-6f, 1.f, z.data());
            expect(equal(y, z), "norms are equal");
        }
}

// ---------------------------------------------------------------- attention and the step

constexpr int BLOCK = 16, BLOCKS_EACH = 40, SEQS = 3;

struct Ragged {
    std::vector<int32_t> starts{0}, contexts, table, slots;
    std::vector<int64_t> ids, positions;
    Batch view;

    explicit Ragged(const std::vector<std::pair<int, int>>& lengths) {
        for (size_t s = 0; s < lengths.size(); s++) {
            auto [queries, context] = lengths[s];
            starts.push_back(starts.back() + queries);
            contexts.push_back(context);
            for (int b = 0; b < BLOCKS_EACH; b++) table.push_back(s * BLOCKS_EACH + b);
            for (int p = context - queries; p < context; p++) {
                slots.push_back(s * BLOCKS_EACH * BLOCK + p);
                positions.push_back(p);
                ids.push_back(generator() % 90);
            }
        }
        view = {starts.data(), contexts.data(), table.data(), slots.data(), (int32_t)slots.size(), (int32_t)lengths.size(), BLOCKS_EACH};
    }
};

struct Cache {
    Aligned<uint8_t> keys, values;
    LayerCache view;
    Cache(int heads, int dim, KvType type) : keys(bytes(heads, dim, type)), values(bytes(heads, round_up(dim, 16), type)) {
        view = {keys.data, values.data, SEQS * BLOCKS_EACH, BLOCK, heads, dim, dim, round_up(dim, 16), type};
    }
    static size_t bytes(int heads, int width, KvType type) {
        return size_t(SEQS) * BLOCKS_EACH * heads * (type == KV_INT8 ? Sub<int8_t>::bytes(width) : Sub<half_t>::bytes(width));
    }
};

static const std::vector<std::vector<std::pair<int, int>>> BATCHES = {
    {{20, 20}, {1, 1}, {3, 3}}, {{1, 21}, {70, 71}, {0, 3}}, {{1, 600}, {1, 600}, {1, 4}}, {{5, 605}, {1, 601}, {1, 5}}};

static void attention_equals_one_thread(Workspace* alone, Workspace* many) {
    for (auto [window, type] : {std::pair{0, KV_HALF}, {37, KV_HALF}, {0, KV_INT8}, {37, KV_INT8}}) {
        Cache first(2, 20, type), second(2, 20, type);
        Plan plan;
        for (auto& lengths : BATCHES) {
            Ragged batch(lengths);
            int tokens = batch.view.num_tokens, heads = 6, dim = 20;
            std::vector<float> q = normal(tokens * heads * dim), k = normal(tokens * 2 * dim), v = normal(k.size()), sinks = normal(heads);
            std::vector<float> one(q.size()), other(q.size());
            Operands in{{q.data(), dim, heads * dim}, {k.data(), dim, 2 * dim}, {v.data(), dim, 2 * dim}, one.data(), sinks.data(), heads, window, .2f, 30.f};
            Fault fault;
            expect(!mxn_paged_attention(alone, &plan, &first.view, &batch.view, &in, &fault), "attention");
            in.out = other.data();
            expect(!mxn_paged_attention(many, &plan, &second.view, &batch.view, &in, &fault), "attention");
            expect(equal(one, other), "attention is equal");
        }
    }
}

static void steps_equal_one_thread(Workspace* alone, Workspace* many) {
    constexpr int HIDDEN = 72, HEADS = 4, KV = 2, DIM = 24, INNER = 80, VOCAB = 90, LAYERS = 3;
    std::vector<Weight> weights;
    weights.reserve(LAYERS * 7 + 1);
    std::vector<Cache> caches[2];
    std::vector<float> norm = normal(HIDDEN), head_norm = normal(DIM), cos = normal(640 * DIM / 2), sin = normal(cos.size());
    auto weight = [&](int n, int k) { return &weights.emplace_back(n, k, FORMATS[weights.size() % 4], many).view; };
    std::vector<Layer> layers[2];
    Norm whole{norm.data(), HIDDEN, 1e-6f, 1.f}, heads{head_norm.data(), DIM, 1e-6f, 0.f}, none{};
    for (int l = 0; l < LAYERS; l++) {
        Layer y{};
        y.before_attention = whole, y.query_norm = y.key_norm = heads, y.after_attention = l % 2 ? whole : none;
        y.before_mlp = whole, y.after_mlp = l % 2 ? whole : none;
        y.qkv[0] = weight(HEADS * DIM, HIDDEN), y.qkv[1] = weight(KV * DIM, HIDDEN), y.qkv[2] = weight(KV * DIM, HIDDEN);
        y.out = weight(HIDDEN, HEADS * DIM), y.gate = weight(INNER, HIDDEN), y.up = weight(INNER, HIDDEN), y.down = weight(HIDDEN, INNER);
        y.rotation = {cos.data(), sin.data(), DIM, 640};
        y.num_heads = HEADS, y.window = l % 2 ? 37 : 0, y.scaling = .2f, y.residual_factor = .5f;
        y.activation = l % 2 ? GELU_TANH_TIMES : SILU_TIMES;
        for (int side : {0, 1}) layers[side].push_back(y), caches[side].emplace_back(KV, DIM, l % 2 ? KV_INT8 : KV_HALF);
    }
    for (int side : {0, 1})
        for (int l = 0; l < LAYERS; l++) layers[side][l].cache = &caches[side][l].view;
    std::vector<float> embedding = normal(VOCAB * HIDDEN);
    const PackedWeight* head = weight(VOCAB, HIDDEN);
    for (auto& lengths : BATCHES) {
        Ragged batch(lengths);
        std::vector<int64_t> rows{batch.view.num_tokens - 1, 0, 1};
        std::vector<float> logits[2];
        // Both threads use both workspaces, each with its own caches: callers must wait for each other.
        auto run = [&](int side, Workspace* space) {
            std::vector<Plan> plans;
            Decoder decoder{layers[side].data(), embedding.data(), head, whole, LAYERS, HIDDEN, VOCAB, 2.f, .5f, 30.f};
            std::vector<float> found(rows.size() * VOCAB), after(batch.ids.size() * HIDDEN), best(rows.size());
            std::vector<int64_t> chosen(rows.size());
            double seconds[NUM_STAGE_KINDS + 1] = {};
            for (int again = 0; again < 3; again++) {
                StepInput in{batch.ids.data(), nullptr, batch.positions.data(), &batch.view, rows.data(), found.data(), nullptr, nullptr, after.data(), seconds, (int32_t)rows.size(), 0, LAYERS};
                Fault fault;
                expect(!mxn_step(again % 2 ? many : space, &plans, &decoder, &in, &fault), "step");
                in.logits = nullptr, in.chosen = chosen.data(), in.chosen_logits = best.data(), in.profile = nullptr;
                expect(!mxn_step(again % 2 ? many : space, &plans, &decoder, &in, &fault), "greedy step");
                for (size_t r = 0; r < rows.size(); r++) {
                    const float* row = &found[r * VOCAB];
                    expect(chosen[r] == std::max_element(row, row + VOCAB) - row && best[r] == row[chosen[r]], "the likeliest token");
                }
                expect(logits[side].empty() || equal(logits[side], found), "a step repeats itself");
                logits[side] = found;
            }
        };
        std::thread other(run, 1, many);
        run(0, alone);
        other.join();
        expect(equal(logits[0], logits[1]), "steps are equal");
    }
}

int main() {
    every_item_runs_once_and_in_order(1, 20);
    every_item_runs_once_and_in_order(2, 300);
    every_item_runs_once_and_in_order(6, 300);
    teams_come_and_go();
    Workspace *alone = mxn_workspace_create(1), *many = mxn_workspace_create(5);
    products_and_norms_equal_one_thread(alone, many);
    attention_equals_one_thread(alone, many);
    steps_equal_one_thread(alone, many);
    mxn_workspace_destroy(many);
    mxn_workspace_destroy(alone);
    puts("done");
}
