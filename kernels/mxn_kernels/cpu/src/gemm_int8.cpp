// y = x W^T + bias with int8 weights (one scale per output channel) and int8 activations (one scale per row, found here).
//
// Weights are kept unsigned, w + 128, because the dot-product instruction multiplies unsigned by signed; the surplus 128 * sum(x) is
// one number per row. Sums are exact in int32, so a row's result does not depend on which rows it is computed with.
// A row that holds NaN or infinity gets a NaN scale and zero inputs: its outputs are NaN and nothing else changes.
#include "gemm_int8.h"

#include <math.h>
#include <string.h>
#include <algorithm>
#include <atomic>

#include "simd.h"

constexpr int PREFETCH_BYTES = 2048;
constexpr float SMALLEST = 1e-30f;  // below this a row counts as zero: 127 / max would overflow
constexpr uint32_t INFINITY_BITS = 0x7f800000;

// ---------------------------------------------------------------- integer vectors

#if MXN_AVX512
typedef __m512i VecI;
typedef __m512i Inputs;
constexpr int WEIGHT_OFFSET = 128;
MXN_INLINE VecI zero_i() { return _mm512_setzero_si512(); }
MXN_INLINE VecI add_i(VecI a, VecI b) { return _mm512_add_epi32(a, b); }
MXN_INLINE VecI load_weights(const uint8_t* p) { return _mm512_load_si512(p); }
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) { return _mm512_set1_epi32(*(const int32_t*)p); }
#define DOT(sum, weights, inputs) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs))
#else
typedef __m256i VecI;
MXN_INLINE VecI zero_i() { return _mm256_setzero_si256(); }
MXN_INLINE VecI add_i(VecI a, VecI b) { return _mm256_add_epi32(a, b); }
#if defined(__AVXVNNI__)
typedef __m256i Inputs;
constexpr int WEIGHT_OFFSET = 128;
MXN_INLINE VecI load_weights(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) { return _mm256_set1_epi32(*(const int32_t*)p); }
#define DOT(sum, weights, inputs) asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs))
#else
// Without a dot-product instruction: |x| times sign(x) * w in 16 bits. No sum overflows: 2 * 127 * 127 < 2^15.
struct Inputs {
    __m256i value, magnitude;
};
constexpr int WEIGHT_OFFSET = 0;
MXN_INLINE VecI load_weights(const uint8_t* p) {
    return _mm256_xor_si256(_mm256_load_si256((const __m256i*)p), _mm256_set1_epi8((char)128));
}
MXN_INLINE Inputs broadcast_inputs(const int8_t* p) {
    __m256i x = _mm256_set1_epi32(*(const int32_t*)p);
    return {x, _mm256_abs_epi8(x)};
}
MXN_INLINE VecI dot(VecI sum, VecI weights, Inputs x) {
    __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(weights, x.value));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#define DOT(sum, weights, inputs) sum = dot(sum, weights, inputs)
#endif
#endif

MXN_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// ---------------------------------------------------------------- activations to int8

#if MXN_AVX512
MXN_INLINE __m512i max_bits(__m512i m, Vec16 x) {
    return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)));
}
MXN_INLINE uint32_t largest(__m512i m) { return _mm512_reduce_max_epi32(m); }
MXN_INLINE __m512i round16(Vec16 x, int8_t* q) {
    __m512i v = _mm512_cvtps_epi32(x.v);
    _mm_storeu_si128((__m128i*)q, _mm512_cvtsepi32_epi8(v));
    return v;
}
MXN_INLINE int32_t sum_i(__m512i v) { return _mm512_reduce_add_epi32(v); }
#else
MXN_INLINE __m256i max_bits(__m256i m, Vec16 x) {
    __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i lo = _mm256_and_si256(_mm256_castps_si256(x.lo), mask), hi = _mm256_and_si256(_mm256_castps_si256(x.hi), mask);
    return _mm256_max_epi32(m, _mm256_max_epi32(lo, hi));
}
MXN_INLINE uint32_t largest(__m256i m) {
    __m128i v = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
MXN_INLINE __m256i round16(Vec16 x, int8_t* q) {
    __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
    __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
    _mm_storeu_si128((__m128i*)q, _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
    return _mm256_add_epi32(lo, hi);
}
MXN_INLINE int32_t sum_i(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#endif

void quantise_row(const float* x, int k, int64_t row, int depth, const Activations& to) {
    int tail = k % LANES, whole = k - tail;
    VecI bits = zero_i();
    for (int i = 0; i < whole; i += LANES) bits = max_bits(bits, load16(x + i));
    if (tail) bits = max_bits(bits, load16(x + whole, tail));
    uint32_t peak_bits = largest(bits);
    float peak;
    memcpy(&peak, &peak_bits, sizeof peak);

    int8_t* q = to.values + row * depth;
    if (peak_bits >= INFINITY_BITS || peak < SMALLEST) {
        memset(q, 0, depth);
        to.scales[row] = peak_bits >= INFINITY_BITS ? NAN : 0.f;
        to.surplus[row] = 0;
        return;
    }
    Vec16 inverse = set16(127.f / peak);
    VecI sum = zero_i();
    for (int i = 0; i < whole; i += LANES) sum = add_i(sum, round16(mul(load16(x + i), inverse), q + i));
    if (tail) sum = add_i(sum, round16(mul(load16(x + whole, tail), inverse), q + whole));
    to.scales[row] = peak / 127.f;
    to.surplus[row] = WEIGHT_OFFSET * sum_i(sum);
}

// ---------------------------------------------------------------- the product

MXN_INLINE Vec16 silu(Vec16 x) { return div(x, add(set16(1.f), exp(sub(zero16(), x)))); }
MXN_INLINE Vec16 gelu_tanh(Vec16 x) {
    Vec16 inner = mul(mul(x, set16(0.797884561f)), fma(mul(x, x), set16(0.044715f), set16(1.f)));
    return mul(mul(x, set16(.5f)), add(set16(1.f), tanh(inner)));
}

// Turns the exact sums of one row and panel into floats and combines them with the panel's real columns of the target.
struct Epilogue {
    const float* row_scales;
    const int32_t* row_surplus;
    const float* column_scales;
    const float* bias;
    Target to;
    int columns;

#if MXN_AVX512
    MXN_INLINE_MEMBER void store(int64_t row, __m512i s0, __m512i s1) const {
        __m512i surplus = _mm512_set1_epi32(row_surplus[row]);
        write(row, 0, {_mm512_cvtepi32_ps(_mm512_sub_epi32(s0, surplus))});
        write(row, 16, {_mm512_cvtepi32_ps(_mm512_sub_epi32(s1, surplus))});
    }
#else
    MXN_INLINE_MEMBER void store(int64_t row, __m256i s0, __m256i s1, __m256i s2, __m256i s3) const {
        __m256i surplus = _mm256_set1_epi32(row_surplus[row]);
        auto real = [surplus](__m256i s) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(s, surplus)); };
        write(row, 0, {real(s0), real(s1)});
        write(row, 16, {real(s2), real(s3)});
    }
#endif
    MXN_INLINE_MEMBER void write(int64_t row, int column, Vec16 sum) const {
        Vec16 value = fma(mul(sum, set16(row_scales[row])), load16(column_scales + column), load16(bias + column));
        float* y = to.y + row * to.ldy + column;
        int n = columns - column;
        if (n >= LANES) store16(y, to.combine == STORE ? value : combined(load16(y), value));
        else if (n > 0) store16(y, n, to.combine == STORE ? value : combined(load16(y, n), value));
    }
    MXN_INLINE_MEMBER Vec16 combined(Vec16 before, Vec16 value) const {
        if (to.combine == ADD) return add(before, mul(value, set16(to.factor)));
        return mul(to.combine == SILU_TIMES ? silu(before) : gelu_tanh(before), value);
    }
};

typedef void Tile(const int8_t* a, int64_t lda, const uint8_t* w, int64_t depth, const Epilogue& out, int64_t row);
#include "gemm_tiles.inc"

// Rows are cut into tiles of nearly equal height: 32 is 11 + 11 + 10.
void multiply(const Int8Weight& w, const Activations& x, int64_t first, int64_t last, int p0, int p1, const Target& to) {
    int depth = w.depth(), tiles = (last - first + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int p = p0; p < p1; p++) {
        const uint8_t* panel = w.panels + (int64_t)p * PANEL * depth;
        Target columns = to;
        columns.y += p * PANEL;
        Epilogue out{x.scales, x.surplus, w.scales + p * PANEL, w.bias + p * PANEL, columns, w.n - p * PANEL};
        for (int t = 0; t < tiles; t++) {
            Share rows(last - first, t, tiles);
            int64_t row = first + rows.first;
            TILES[rows.last - rows.first](x.values + row * depth, depth, panel, depth, out, row);
        }
    }
}

Division::Division(int64_t rows, int panels, int depth, int max_threads) {
    int64_t work = (int64_t)panels * PANEL * depth * (1 + rows / 8);
    threads = work < 65536 ? 1 : max_threads;
    if (threads > panels) threads = panels;
    quantise_alone = threads == 1 || rows * depth <= 4096;
    int64_t row_block = 393216 / depth / MAX_TILE_ROWS * MAX_TILE_ROWS;
    if (row_block < 48) row_block = 48;
    row_blocks = (rows + row_block - 1) / row_block;
    // Large products are handed out in small pieces, so that a core lost to a neighbour does not hold up the other.
    groups = threads == 1 ? 1 : work < (4 << 20) ? threads : threads * 8;
    if (groups > panels) groups = panels;
}

extern "C" int mxn_int8_linear(Workspace* space, const Int8Weight* w, const float* x, int64_t rows, float* y) {
    if (rows == 0) return 0;
    Turn turn(space);
    int depth = w->depth(), panels = w->num_panels();
    Division division(rows, panels, depth, space->threads());
    auto lay_out = [&](char* base, Activations* to) {
        Layout layout{base};
        *to = Activations::take(layout, rows, depth);
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

// ---------------------------------------------------------------- packing

// Packs rows of a float matrix into panels. Returns -1, or the first row that holds NaN or infinity.
extern "C" int64_t mxn_pack_int8(Workspace* space, const float* weight, int64_t n, int64_t k, uint8_t* panels, float* scales) {
    int64_t depth = (k + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP;
    long count = (n + PANEL - 1) / PANEL;
    std::atomic<int64_t> bad{n};
    Turn turn(space);
    space->team.run(&count, 1, false, [&](int, long p, int) {
        uint8_t* panel = panels + p * PANEL * depth;
        memset(panel, 128, PANEL * depth);
        for (int c = 0; c < PANEL; c++) {
            int64_t row = p * PANEL + c;
            scales[row] = 0.f;
            if (row >= n) continue;
            const float* x = weight + row * k;
            float peak = 0.f;
            bool finite = true;
            for (int64_t i = 0; i < k; i++) {
                float size = fabsf(x[i]);
                finite &= size < INFINITY;
                peak = size > peak ? size : peak;
            }
            if (!finite) {
                int64_t seen = bad.load();
                while (row < seen && !bad.compare_exchange_weak(seen, row)) {}
                continue;
            }
            if (peak < SMALLEST) continue;
            float inverse = 127.f / peak;
            for (int64_t i = 0; i < k; i++) panel[i / 4 * (4 * PANEL) + c * 4 + i % 4] = (uint8_t)(128 + (int)rintf(x[i] * inverse));
            scales[row] = peak / 127.f;
        }
    });
    int64_t row = bad.load();
    return row == n ? -1 : row;
}

extern "C" Workspace* mxn_workspace_create(int threads) { return new (std::nothrow) Workspace(threads); }
extern "C" void mxn_workspace_destroy(Workspace* space) {
    if (!space->team.lost_threads()) delete space;  // threads that are not there cannot be waited for
}
