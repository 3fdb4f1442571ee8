// Prefill attention: a tile of queries times the heads that share a KV head are rows; keys and values come in tiles of 64 tokens, turned
// into floats once per tile; running softmax (the flash method). Key tiles start at multiples of 64, so a row's sums do not depend
// on how the prompt was cut into steps.
#include <math.h>
#include <string.h>

#include "attention.h"

constexpr int KEY_TILE = 64;
constexpr int TILE_SUBS = KEY_TILE / LANES;
constexpr int TILE_ROWS = 192;  // rows aimed at per unit: the conversion of keys and values is shared by this many

#if MXN_AVX512
constexpr int ROWS = 12, SCORE_SUBS = 2;           // rows taken together; sub-blocks whose scores fill the registers
constexpr int VALUE_ROWS = 6, VALUE_COLUMNS = 4;
#else
constexpr int ROWS = 6, SCORE_SUBS = 1;
constexpr int VALUE_ROWS = 3, VALUE_COLUMNS = 2;
#endif

// Scores of ROWS rows against SCORE_SUBS sub-blocks of keys in float.
MXN_INLINE void score(const float* q, int dim, const float* keys, float* to) {
    Vec16 sum[ROWS][SCORE_SUBS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int b = 0; b < SCORE_SUBS; b++) sum[r][b] = zero16();
    for (int d = 0; d < dim; d++) {
        Vec16 k[SCORE_SUBS];
#pragma GCC unroll 2
        for (int b = 0; b < SCORE_SUBS; b++) k[b] = load16(keys + (b * dim + d) * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            Vec16 x = set16(q[r * dim + d]);
#pragma GCC unroll 2
            for (int b = 0; b < SCORE_SUBS; b++) sum[r][b] = fma(x, k[b], sum[r][b]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int b = 0; b < SCORE_SUBS; b++) store16(to + r * KEY_TILE + b * LANES, sum[r][b]);
}

// sums = sums * shrink + weights x values, for VALUE_ROWS rows and C columns of sixteen.
template <int C>
MXN_INLINE void weigh(const float* weights, const float* values, int pitch, int first, int last, const float* shrink, float* sums) {
    Vec16 sum[VALUE_ROWS][C];
#pragma GCC unroll 6
    for (int r = 0; r < VALUE_ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[r][c] = mul(set16(shrink[r]), load16(sums + r * pitch + c * LANES));
    for (int t = first; t < last; t++) {
        Vec16 v[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) v[c] = load16(values + t * pitch + c * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < VALUE_ROWS; r++) {
            Vec16 p = set16(weights[r * KEY_TILE + t]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] = fma(p, v[c], sum[r][c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < VALUE_ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store16(sums + r * pitch + c * LANES, sum[r][c]);
}

static __attribute__((noinline)) void score_tile(const float* q, int dim, const float* keys, int first, int last, float* scores) {
    constexpr int WIDTH = SCORE_SUBS * LANES;
    for (int k = first / WIDTH * WIDTH; k < last; k += WIDTH) score(q, dim, keys + k * dim, scores + k);
}

static __attribute__((noinline)) void weigh_tile(const float* weights, const float* values, int pitch, int first, int last, const float* shrink, float* sums) {
    for (int r = 0; r < ROWS; r += VALUE_ROWS) {
        const float* w = weights + r * KEY_TILE;
        float* to = sums + r * pitch;
        int c = 0;
        for (; c + VALUE_COLUMNS * LANES <= pitch; c += VALUE_COLUMNS * LANES)
            weigh<VALUE_COLUMNS>(w, values + c, pitch, first, last, shrink + r, to + c);
        for (; c < pitch; c += LANES) weigh<1>(w, values + c, pitch, first, last, shrink + r, to + c);
    }
}

// One row's scores to weights against its running peak; lanes outside [first, last) weigh nothing. Writes peak - new peak to `drop`.
static void soften(float* scores, int first, int last, int from_sub, int end_sub, float softcap, float* peak, float* total, float* drop) {
    const Vec16 none = set16(-INFINITY);
    Vec16 top = none;
    for (int b = from_sub; b < end_sub; b++) {
        Vec16 s = load16(scores + b * LANES);
        if (softcap > 0) s = cap(s, softcap);
        if (first > b * LANES || last < (b + 1) * LANES) s = keep_lanes(s, first - b * LANES, last - b * LANES, none);
        store16(scores + b * LANES, s);
        top = max(top, s);
    }
    float before = *peak, now = fmaxf(before, max_lanes(top));
    float base = now == -INFINITY ? 0.f : now;  // nothing seen yet: every weight is e^-infinity
    Vec16 shift = set16(base), sum = zero16();
    for (int b = from_sub; b < end_sub; b++) {
        Vec16 e = exp(sub(load16(scores + b * LANES), shift));
        store16(scores + b * LANES, e);
        sum = add(sum, e);
    }
    *drop = before - base;
    *peak = now;
    *total = *total * (before == base ? 1.f : expf(before - base)) + sum_lanes(sum);
}

template <class T> MXN_INLINE Vec16 scaled(Vec16 numbers, Vec16 scales) { return Sub<T>::HAS_SCALES ? mul(numbers, scales) : numbers; }

template <class T> static void load_tile(const Call& call, int seq, int head, int start, int end, float* keys, float* values) {
    int dim = call.cache.key_dim, pitch = call.cache.value_pitch;
    const Vec16 one = set16(1.f);
    for (int b = 0; b < TILE_SUBS; b++) {
        float *k = keys + b * LANES * dim, *v = values + b * LANES * pitch;
        int present = end - start - b * LANES;
        if (present > LANES) present = LANES;
        if (present <= 0) {
            memset(k, 0, sizeof(float) * LANES * dim);
            memset(v, 0, sizeof(float) * LANES * pitch);
            continue;
        }
        Sub<T> from = call.keys<T>(seq, head, start / LANES + b);
        Vec16 scales = Sub<T>::HAS_SCALES ? load16(from.scales()) : one;
        for (int i = 0; i < LANES * dim; i += LANES) store16(k + i, scaled<T>(load_numbers(from.numbers() + i), scales));
        from = call.values<T>(seq, head, start / LANES + b);
        for (int t = 0; t < present; t++) {
            Vec16 scale = Sub<T>::HAS_SCALES ? set16(from.scales()[t]) : one;
            for (int i = t * pitch; i < (t + 1) * pitch; i += LANES) store16(v + i, scaled<T>(load_numbers(from.numbers() + i), scale));
        }
        memset(v + present * pitch, 0, sizeof(float) * (LANES - present) * pitch);  // unwritten slots may hold NaN
    }
}

int prefill_tokens(const Call& call) {
    int tokens = TILE_ROWS / call.group();
    return tokens < 16 ? 16 : tokens > 128 ? 128 : tokens / 16 * 16;
}

struct Scratch {
    float *q, *sums, *keys, *values, *scores, *peaks, *totals;
    size_t bytes;

    Scratch(const Call& call, char* base) {
        Layout layout{base};
        size_t rows = round_up(prefill_tokens(call) * call.group(), ROWS);
        q = layout.take<float>(rows * call.cache.key_dim);
        sums = layout.take<float>(rows * call.cache.value_pitch);
        keys = layout.take<float>(KEY_TILE * call.cache.key_dim);
        values = layout.take<float>(KEY_TILE * call.cache.value_pitch);
        scores = layout.take<float>(ROWS * KEY_TILE);
        peaks = layout.take<float>(rows);
        totals = layout.take<float>(rows);
        bytes = layout.used;
    }
};

size_t prefill_scratch_bytes(const Call& call) { return Scratch(call, nullptr).bytes; }

void prefill_tile(const Call& call, const PrefillUnit& unit, char* base) {
    Scratch s(call, base);
    int group = call.group(), dim = call.cache.key_dim, pitch = call.cache.value_pitch;
    int count = (unit.last - unit.first) * group, padded = round_up(count, ROWS);
    int64_t token = call.batch.query_starts[unit.seq] + unit.first;
    int position = call.context(unit.seq) - call.query_len(unit.seq) + unit.first;  // of the tile's first query
    int last_position = position + unit.last - unit.first - 1;
    auto position_of = [&](int row) { return position + (row < count ? row : count - 1) / group; };

    for (int r = 0; r < padded; r++) {
        int row = r < count ? r : count - 1;  // rows that fill the last group repeat the last real one
        int head = unit.head * group + row % group;
        scale_row(call.in.query.at(head, token + row / group), dim, call.in.scaling, s.q + (int64_t)r * dim);
        s.peaks[r] = call.in.sinks ? call.in.sinks[head] : -INFINITY;
        s.totals[r] = call.in.sinks ? 1.f : 0.f;
    }
    memset(s.sums, 0, sizeof(float) * padded * pitch);

    for (int start = call.first_seen(position) / KEY_TILE * KEY_TILE; start <= last_position; start += KEY_TILE) {
        (call.cache.type == KV_INT8 ? load_tile<int8_t> : load_tile<half_t>)(call, unit.seq, unit.head, start, last_position + 1, s.keys, s.values);
        for (int r = 0; r < padded; r += ROWS) {
            // Keys that any row of the group sees, relative to the tile.
            int first = call.first_seen(position_of(r)) - start, last = position_of(r + ROWS - 1) + 1 - start;
            first = first < 0 ? 0 : first;
            last = last > KEY_TILE ? KEY_TILE : last;
            if (first >= last) continue;
            score_tile(s.q + (int64_t)r * dim, dim, s.keys, first, last, s.scores);
            float shrink[LANES] = {};
            int from_sub = first / LANES, end_sub = (last + LANES - 1) / LANES;
            for (int i = 0; i < ROWS; i++) {
                int p = position_of(r + i);
                soften(s.scores + i * KEY_TILE, call.first_seen(p) - start, p + 1 - start, from_sub, end_sub, call.in.softcap,
                       s.peaks + r + i, s.totals + r + i, shrink + i);
            }
            store16(shrink, exp(load16(shrink)));
            weigh_tile(s.scores, s.values, pitch, first, last, shrink, s.sums + (int64_t)r * pitch);
        }
    }
    for (int r = 0; r < count; r++)
        scale_row(s.sums + (int64_t)r * pitch, call.cache.value_dim, 1.f / s.totals[r], call.out(token + r / group, unit.head * group + r % group));
}
