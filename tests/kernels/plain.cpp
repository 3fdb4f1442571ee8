// Compares the CPU kernels with plain loops in double precision. Built for the CPU at hand and for NEON by test_plain.py; prints "done".
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <array>
#include <memory>
#include <random>

#include "half.h"
#include "step.h"

extern "C" {
Workspace* mxn_workspace_create(int threads);
void mxn_workspace_destroy(Workspace* space);
int64_t mxn_pack_int8(Workspace* space, const float* weight, int64_t n, int64_t k, uint8_t* panels, float* scales);
int64_t mxn_pack_groups(Workspace* space, const float* weight, int64_t n, int64_t k, Format format, uint8_t* panels);
int mxn_linear(Workspace* space, const PackedWeight* w, const float* x, int64_t rows, float* y);
void mxn_rms_norm(Workspace* space, const float* x, const float* weight, int64_t rows, int width, float eps, float offset, float* y);
int mxn_paged_attention(Workspace* space, Plan* plan, const LayerCache* cache, const Batch* batch, const Operands* in, Fault* fault);
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

template <class T> static std::unique_ptr<T, decltype(&free)> aligned(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    T* data = (T*)aligned_alloc(64, bytes);
    memset((void*)data, 0, bytes);
    return {data, &free};
}

// The value of a packed weight, read by the definition of its format.
static double weight_at(const PackedWeight& w, int row, int column) {
    const uint8_t* panel = w.panel(row / PANEL);
    int channel = row % PANEL, i = column % GROUP;
    if (w.format == INT8) return (panel[column / 4 * 4 * PANEL + channel * 4 + column % 4] - 128) * (double)w.scales[row];
    const uint8_t* group = panel + column / GROUP * group_bytes(w.format);
    const half_t* halves = (const half_t*)(group + value_bytes(w.format));
    double d = to_float(halves[channel]);
    if (w.format == Q8_0) return d * (group[i / 4 * 4 * PANEL + channel * 4 + i % 4] - 128);
    int byte = group[i % 16 / 4 * 4 * PANEL + channel * 4 + i % 4], code = i < 16 ? byte & 15 : byte >> 4;
    return w.format == Q4_0 ? d * (code - 8) : d * code + to_float(halves[PANEL + channel]);
}

static void products(Workspace* space) {
    for (Format format : {INT8, Q8_0, Q4_0, Q4_1})
        for (auto [rows, n, k] : {std::array{1, 33, 40}, {2, 64, 96}, {7, 50, 65}, {13, 40, 200}}) {
            auto panels = aligned<uint8_t>(size_t(n + 31) / 32 * (size_t(k + 31) / 32) * group_bytes(format));
            std::vector<float> w = normal(size_t(n) * k), scales(round_up(n, 32)), bias(scales.size(), .5f);
            PackedWeight packed{panels.get(), format == INT8 ? scales.data() : nullptr, bias.data(), n, k, format};
            int64_t bad = format == INT8 ? mxn_pack_int8(space, w.data(), n, k, panels.get(), scales.data())
                                         : mxn_pack_groups(space, w.data(), n, k, format, panels.get());
            expect(bad == -1, "packing");
            std::vector<float> x = normal(size_t(rows) * k), y(size_t(rows) * n);
            expect(!mxn_linear(space, &packed, x.data(), rows, y.data()), "a product");
            for (int r = 0; r < rows; r++) {
                float peak = 0;
                for (int i = 0; i < k; i++) peak = fmaxf(peak, fabsf(x[r * k + i]));
                for (int c = 0; c < n; c++) {
                    double sum = .5, error = 0, size = 0;
                    for (int i = 0; i < k; i++) {
                        double value = weight_at(packed, c, i);
                        sum += rintf(x[r * k + i] * (127.f / peak)) * (peak / 127.) * value;
                        error += pow(value - w[c * k + i], 2), size += pow(w[c * k + i], 2);
                    }
                    expect(fabs(y[r * n + c] - sum) < 1e-4, "a product is that of the stored values");
                    expect(sqrt(error / size) < (format == INT8 || format == Q8_0 ? .015 : .12), "stored values are close");
                }
            }
        }
}

static void norms(Workspace* space) {
    for (int width : {1, 16, 37}) {
        std::vector<float> x = normal(5 * width), w = normal(width), y(x.size());
        mxn_rms_norm(space, x.data(), w.data(), 5, width, 1e-5f, 1.f, y.data());
        for (int r = 0; r < 5; r++) {
            double sum = 0;
            for (int i = 0; i < width; i++) sum += (double)x[r * width + i] * x[r * width + i];
            for (int i = 0; i < width; i++)
                expect(fabs(y[r * width + i] - x[r * width + i] / sqrt(sum / width + 1e-5) * (w[i] + 1.)) < 1e-5, "a norm");
        }
    }
}

static void functions() {
    for (float x = -100.f; x < 88.f; x += .37f) {
        float e[LANES], t[LANES];
        store16(e, exp(set16(x)));
        store16(t, tanh(set16(x)));
        expect(fabs(e[7] - ::exp((double)x)) <= 4e-7 * ::exp((double)x) + 1e-37, "exp");
        expect(fabs(t[7] - ::tanh((double)x)) < 3e-7, "tanh");
        expect(fabs(to_float(to_half(x)) - x) <= fabsf(x) / 1024, "halves");
    }
    float bad[LANES];
    store16(bad, exp(set16(NAN)));
    expect(bad[3] != bad[3], "exp keeps NaN");
    store16(bad, exp(set16(-INFINITY)));
    expect(bad[15] == 0, "exp of -infinity is zero");
    std::vector<float> x = normal(LANES);
    for (int first = 0; first <= LANES; first++)
        for (int last = 0; last <= LANES; last++) {
            float kept[LANES];
            store16(kept, keep_lanes(load16(x.data()), first, last, set16(9.f)));
            for (int i = 0; i < LANES; i++) expect(kept[i] == (i >= first && i < last ? x[i] : 9.f), "lanes kept");
        }
}

// A prompt in two chunks, then single tokens, past the end of a chunk of decode.
static void attention(Workspace* space) {
    constexpr int BLOCK = 16, BLOCKS = 40, HEADS = 6, KV = 2, DIM = 20;
    for (KvType type : {KV_HALF, KV_INT8})
        for (int window : {0, 37}) {
            auto bytes = [&](int width) { return size_t(BLOCKS) * KV * (type == KV_INT8 ? Sub<int8_t>::bytes(width) : Sub<half_t>::bytes(width)); };
            auto k = aligned<uint8_t>(bytes(DIM)), v = aligned<uint8_t>(bytes(32));
            LayerCache cache{k.get(), v.get(), BLOCKS, BLOCK, KV, DIM, DIM, 32, type};
            std::vector<float> keys, values, sinks = normal(HEADS);
            std::vector<int32_t> table(BLOCKS);
            for (int b = 0; b < BLOCKS; b++) table[b] = (b * 7 + 3) % BLOCKS;
            Plan plan;
            int context = 0;
            for (int queries : {70, 480, 1, 1}) {
                std::vector<float> q = normal(queries * HEADS * DIM), nk = normal(queries * KV * DIM), nv = normal(nk.size()), out(q.size());
                keys.insert(keys.end(), nk.begin(), nk.end()), values.insert(values.end(), nv.begin(), nv.end());
                std::vector<int32_t> slots;
                for (int t = context; t < context + queries; t++) slots.push_back(table[t / BLOCK] * BLOCK + t % BLOCK);
                context += queries;
                int32_t starts[] = {0, queries};
                Batch batch{starts, &context, table.data(), slots.data(), queries, 1, BLOCKS};
                Operands in{{q.data(), DIM, HEADS * DIM}, {nk.data(), DIM, KV * DIM}, {nv.data(), DIM, KV * DIM}, out.data(), sinks.data(), HEADS, window, .2f, 30.f};
                Fault fault;
                expect(!mxn_paged_attention(space, &plan, &cache, &batch, &in, &fault), "attention");
                for (int t = 0; t < queries; t++)
                    for (int h = 0; h < HEADS; h++) {
                        int position = context - queries + t, from = window && position >= window ? position - window + 1 : 0;
                        double total = ::exp((double)sinks[h]), sum[DIM] = {};
                        for (int p = from; p <= position; p++) {
                            double score = 0;
                            for (int d = 0; d < DIM; d++) score += (double)q[(t * HEADS + h) * DIM + d] * keys[(p * KV + h / 3) * DIM + d];
                            double weight = ::exp(::tanh(score * .2 / 30) * 30);
                            total += weight;
                            for (int d = 0; d < DIM; d++) sum[d] += weight * values[(p * KV + h / 3) * DIM + d];
                        }
                        for (int d = 0; d < DIM; d++)
                            expect(fabs(out[(t * HEADS + h) * DIM + d] - sum[d] / total) < (type == KV_INT8 ? .06 : .004), "attention");
                    }
            }
        }
}

int main() {
    Workspace* space = mxn_workspace_create(2);
    functions();
    norms(space);
    products(space);
    attention(space);
    mxn_workspace_destroy(space);
    puts("done");
}
