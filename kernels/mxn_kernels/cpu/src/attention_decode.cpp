// Decode attention: the query heads that share a KV head are rows; scores of a chunk of the context, softmax, weighted values.
#include <math.h>

#include "attention.h"

// Rows are taken this many at a time, and for each the number of sub-blocks (scores) or of 16-wide columns (values) that still keeps
// all sums in registers.
#if MXN_AVX512
constexpr int MAX_ROWS = 8;
constexpr int score_blocks(int rows) { return rows <= 4 ? 4 : 2; }
constexpr int value_columns(int rows) { return rows <= 5 ? 4 : 2; }
#else
constexpr int MAX_ROWS = 4;
constexpr int score_blocks(int rows) { return rows <= 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int value_columns(int rows) { return rows <= 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif

struct Chunk {
    int first, last;   // token positions [first, last)
    int base, blocks;  // sub-blocks that hold them: base .. base + blocks
    int pitch() const { return blocks * LANES; }
};

constexpr int LINE = 64;  // bytes of a cache line

// Scores of R rows against B sub-blocks. `soon` are read a little later: their lines are fetched meanwhile.
template <class T, int R, int B>
MXN_INLINE void score(const float* q, int dim, const Sub<T>* keys, const Sub<T>* soon, float* to, int pitch) {
    constexpr int DIMS_A_LINE = LINE / (LANES * sizeof(T));
    const T *now[B], *next[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) now[b] = keys[b].numbers(), next[b] = soon[b].numbers();
    Vec16 sum[R][B];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[r][b] = zero16();
    for (int d = 0; d < dim; d++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            Vec16 k = load_numbers(now[b] + d * LANES);
            if (d % DIMS_A_LINE == 0) prefetch(next[b] + d * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r][b] = fma(set16(q[r * dim + d]), k, sum[r][b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            Vec16 s = sum[r][b];
            if constexpr (Sub<T>::HAS_SCALES) s = mul(s, load16(keys[b].scales()));
            store16(to + r * pitch + b * LANES, s);
        }
}

template <class T, int R> static void score_chunk(const Call& call, int seq, int head, const Chunk& chunk, const float* q, float* scores) {
    constexpr int B = score_blocks(R);
    int dim = call.cache.key_dim, i = 0;
    Sub<T> keys[B], soon[B];
    for (; i + B <= chunk.blocks; i += B) {
        for (int b = 0; b < B; b++) {
            int next = i + B + b < chunk.blocks ? i + B + b : chunk.blocks - 1;
            keys[b] = call.keys<T>(seq, head, chunk.base + i + b);
            soon[b] = call.keys<T>(seq, head, chunk.base + next);
        }
        score<T, R, B>(q, dim, keys, soon, scores + i * LANES, chunk.pitch());
    }
    for (; i < chunk.blocks; i++) {
        keys[0] = call.keys<T>(seq, head, chunk.base + i);
        score<T, R, 1>(q, dim, keys, keys, scores + i * LANES, chunk.pitch());
    }
}

// Scores to weights e^(s - peak), zero outside the chunk; peak and sum of the weights are kept.
static void soften(float* scores, const Chunk& chunk, float softcap, float* peak, float* total) {
    const Vec16 none = set16(-INFINITY);
    int from = chunk.first - chunk.base * LANES, to = chunk.last - chunk.base * LANES;
    Vec16 top = none;
    for (int i = 0; i < chunk.pitch(); i += LANES) {
        Vec16 s = load16(scores + i);
        if (softcap > 0) s = cap(s, softcap);
        if (i < from || i + LANES > to) s = keep_lanes(s, from - i, to - i, none);
        store16(scores + i, s);
        top = max(top, s);
    }
    *peak = max_lanes(top);
    Vec16 shift = set16(*peak), sum = zero16();
    for (int i = 0; i < chunk.pitch(); i += LANES) {
        Vec16 e = exp(sub(load16(scores + i), shift));
        store16(scores + i, e);
        sum = add(sum, e);
    }
    *total = sum_lanes(sum);
}

// Where values have scales of their own, weights take them over: a token's scale times its weight.
template <class T> static void take_scales(const Call& call, int seq, int head, const Chunk& chunk, int rows, float* weights) {
    for (int i = 0; i < chunk.blocks; i++) {
        Vec16 scales = load16(call.values<T>(seq, head, chunk.base + i).scales());
        for (int r = 0; r < rows; r++) {
            float* w = weights + r * chunk.pitch() + i * LANES;
            store16(w, mul(load16(w), scales));
        }
    }
}

template <class T, int R, int C>
MXN_INLINE void weigh(const Call& call, int seq, int head, const Chunk& chunk, const float* weights, int column, float* to) {
    int pitch = call.cache.value_pitch;
    Vec16 sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[r][c] = zero16();
    for (int i = 0; i < chunk.blocks; i++) {
        int start = (chunk.base + i) * LANES;
        int from = chunk.first > start ? chunk.first - start : 0, end = chunk.last < start + LANES ? chunk.last - start : LANES;
        const T* values = call.values<T>(seq, head, chunk.base + i).numbers() + column;
        const T* soon = call.values<T>(seq, head, chunk.base + (i + 1 < chunk.blocks ? i + 1 : i)).numbers() + column;
        const float* w = weights + i * LANES;
        for (int t = from; t < end; t++) {  // tokens outside are never read: they may hold anything
            Vec16 v[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) v[c] = load_numbers(values + t * pitch + c * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < C; c += LINE / (LANES * (int)sizeof(T))) prefetch(soon + t * pitch + c * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                Vec16 p = set16(w[r * chunk.pitch() + t]);
#pragma GCC unroll 8
                for (int c = 0; c < C; c++) sum[r][c] = fma(p, v[c], sum[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store16(to + r * pitch + column + c * LANES, sum[r][c]);
}

template <class T, int R>
static void attend(const Call& call, int seq, int head, const Chunk& chunk, const float* q, float* scores, float* sums, float* peaks, float* totals) {
    constexpr int C = value_columns(R);
    score_chunk<T, R>(call, seq, head, chunk, q, scores);
    for (int r = 0; r < R; r++) soften(scores + r * chunk.pitch(), chunk, call.in.softcap, peaks + r, totals + r);
    if constexpr (Sub<T>::HAS_SCALES) take_scales<T>(call, seq, head, chunk, R, scores);
    int column = 0, width = call.cache.value_pitch;
    for (; column + C * LANES <= width; column += C * LANES) weigh<T, R, C>(call, seq, head, chunk, scores, column, sums);
    for (; column < width; column += LANES) weigh<T, R, 1>(call, seq, head, chunk, scores, column, sums);
}

typedef void Attend(const Call&, int, int, const Chunk&, const float*, float*, float*, float*, float*);
template <class T>
static Attend* const ATTEND[] = {nullptr,      attend<T, 1>, attend<T, 2>, attend<T, 3>, attend<T, 4>,
#if MXN_AVX512
                                 attend<T, 5>, attend<T, 6>, attend<T, 7>, attend<T, 8>
#endif
};

// ---------------------------------------------------------------- chunks and their merging

int first_chunk(const Call& call, int seq) { return call.first_seen(call.context(seq) - 1) / CHUNK; }
int last_chunk(const Call& call, int seq) { return (call.context(seq) - 1) / CHUNK; }

// A chunk's result per row: its sums [pitch], its peak, its total.
int64_t partial_floats(const Call& call) { return (int64_t)call.group() * (call.cache.value_pitch + 2); }

static float* lay_out(const Call& call, char* scratch, float** scores, float** sums, size_t* bytes) {
    Layout layout{scratch};
    float* q = layout.take<float>((size_t)call.group() * call.cache.key_dim);
    *scores = layout.take<float>((size_t)MAX_ROWS * CHUNK);
    *sums = layout.take<float>(partial_floats(call));
    *bytes = layout.used;
    return q;
}

size_t decode_scratch_bytes(const Call& call) {
    float *scores, *sums;
    size_t bytes;
    lay_out(call, nullptr, &scores, &sums, &bytes);
    return bytes;
}

static void finish_row(const Call& call, int64_t token, int head, float peak, float total, const float* sums) {
    float shrink = 1.f;
    if (call.in.sinks) {
        float sink = call.in.sinks[head], top = fmaxf(peak, sink);
        shrink = expf(peak - top);
        total = total * shrink + expf(sink - top);
    }
    scale_row(sums, call.cache.value_dim, shrink / total, call.out(token, head));
}

void decode_chunk(const Call& call, const DecodeUnit& unit, char* scratch, float* partials) {
    int seq = unit.seq, group = call.group(), dim = call.cache.key_dim, pitch = call.cache.value_pitch;
    int context = call.context(seq), lowest = call.first_seen(context - 1);
    int64_t token = call.batch.query_starts[seq];
    Chunk chunk;
    chunk.first = unit.chunk * CHUNK > lowest ? unit.chunk * CHUNK : lowest;
    chunk.last = (unit.chunk + 1) * CHUNK < context ? (unit.chunk + 1) * CHUNK : context;
    chunk.base = chunk.first / LANES;
    chunk.blocks = (chunk.last + LANES - 1) / LANES - chunk.base;

    float *scores, *sums;
    size_t bytes;
    float* q = lay_out(call, scratch, &scores, &sums, &bytes);
    if (unit.partial >= 0) sums = partials + unit.partial * partial_floats(call);
    float *peaks = sums + (int64_t)group * pitch, *totals = peaks + group;
    for (int g = 0; g < group; g++) scale_row(call.in.query.at(unit.head * group + g, token), dim, call.in.scaling, q + g * dim);
    for (int g = 0; g < group;) {
        int rows = group - g < MAX_ROWS ? group - g : MAX_ROWS;
        (call.cache.type == KV_INT8 ? ATTEND<int8_t> : ATTEND<half_t>)[rows](call, seq, unit.head, chunk, q + g * dim, scores, sums + (int64_t)g * pitch, peaks + g, totals + g);
        g += rows;
    }
    if (unit.partial >= 0) return;
    for (int g = 0; g < group; g++)
        finish_row(call, token, unit.head * group + g, peaks[g], totals[g], sums + (int64_t)g * pitch);
}

// Adds the chunks of one sequence and KV head in ascending order; the first chunk's sums are not needed afterwards.
void merge_chunks(const Call& call, int seq, int head, int first_partial, int count, float* partials) {
    int group = call.group(), pitch = call.cache.value_pitch;
    int64_t stride = partial_floats(call), token = call.batch.query_starts[seq];
    float* into = partials + first_partial * stride;
    for (int g = 0; g < group; g++) {
        int64_t at_peak = (int64_t)group * pitch + g, at_total = at_peak + group;
        float top = into[at_peak];
        for (int c = 1; c < count; c++) top = fmaxf(top, into[c * stride + at_peak]);
        float total = 0;
        float* sums = into + (int64_t)g * pitch;
        for (int c = 0; c < count; c++) {
            float shrink = expf(into[c * stride + at_peak] - top);
            total += shrink * into[c * stride + at_total];
            const float* from = sums + c * stride;
            for (int d = 0; d < pitch; d += LANES) {
                Vec16 part = mul(load16(from + d), set16(shrink));
                store16(sums + d, c ? add(load16(sums + d), part) : part);
            }
        }
        finish_row(call, token, head * group + g, top, total, sums);
    }
}
