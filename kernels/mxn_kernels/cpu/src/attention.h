// What the parts of paged attention share: the cache, the batch, one call's operands. See attention.cpp for the way of a call.
#pragma once
#include <stdint.h>
#include <vector>

#include "simd.h"
#include "workspace.h"

enum KvType : int32_t { KV_HALF, KV_INT8 };

// Sixteen tokens of one head, as numbers of type T: keys [key_dim][16], so that a register holds one dimension of sixteen tokens; values
// [16][pitch], so that it holds sixteen dimensions of one token. Bytes are preceded by sixteen scales, one per token.
template <class T> struct Sub {
    const uint8_t* start;

    static constexpr bool HAS_SCALES = sizeof(T) == 1;
    static constexpr size_t SCALE_BYTES = HAS_SCALES ? LANES * sizeof(float) : 0;
    static size_t bytes(int width) { return SCALE_BYTES + sizeof(T) * LANES * width; }
    const T* numbers() const { return (const T*)(start + SCALE_BYTES); }
    const float* scales() const { return (const float*)start; }
};
MXN_INLINE Vec16 load_numbers(const half_t* p) { return load16_half(p); }
MXN_INLINE Vec16 load_numbers(const int8_t* p) { return load16_bytes(p); }

// One layer's cache: a block is [kv_heads][block_size / 16] sub-blocks.
struct LayerCache {
    uint8_t *keys, *values;
    int32_t num_blocks, block_size, num_kv_heads, key_dim, value_dim, value_pitch;
    KvType type;

    int sub_blocks() const { return block_size / LANES; }
    size_t sub_bytes(int width) const { return type == KV_INT8 ? Sub<int8_t>::bytes(width) : Sub<half_t>::bytes(width); }
    uint8_t* key_sub(int64_t block, int head, int sub) const {
        return keys + ((block * num_kv_heads + head) * sub_blocks() + sub) * sub_bytes(key_dim);
    }
    uint8_t* value_sub(int64_t block, int head, int sub) const {
        return values + ((block * num_kv_heads + head) * sub_blocks() + sub) * sub_bytes(value_pitch);
    }
};
constexpr int MAX_INT8_KEY_DIM = 1024;

// The flat ragged batch, as AttentionMetadata describes it.
struct Batch {
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_table;
    const int32_t* slot_mapping;
    int32_t num_tokens, num_seqs, max_blocks;
};

// Rows of a head: element (head, token, d) lies at data[head * head_stride + token * token_stride + d].
struct Rows {
    const float* data;
    int64_t head_stride, token_stride;
    const float* at(int64_t head, int64_t token) const { return data + head * head_stride + token * token_stride; }
};

struct Operands {
    Rows query, key, value;
    float* out;          // [tokens][heads][value_dim]
    const float* sinks;  // [heads] or null
    int32_t num_heads, window;  // window 0: no limit
    float scaling, softcap;     // softcap 0: none
};

struct Call {
    const LayerCache& cache;
    const Batch& batch;
    const Operands& in;

    int group() const { return in.num_heads / cache.num_kv_heads; }
    int query_len(int seq) const { return batch.query_starts[seq + 1] - batch.query_starts[seq]; }
    int context(int seq) const { return batch.context_lens[seq]; }
    // First position that the query at `position` sees.
    int first_seen(int position) const { return in.window > 0 && position >= in.window ? position - in.window + 1 : 0; }
    template <class T> Sub<T> keys(int seq, int head, int sub) const {
        return {cache.key_sub(block(seq, sub), head, sub % cache.sub_blocks())};
    }
    template <class T> Sub<T> values(int seq, int head, int sub) const {
        return {cache.value_sub(block(seq, sub), head, sub % cache.sub_blocks())};
    }
    float* out(int64_t token, int head) const { return in.out + (token * in.num_heads + head) * cache.value_dim; }

   private:
    int64_t block(int seq, int sub) const {
        return batch.block_table[(int64_t)seq * batch.max_blocks + sub / cache.sub_blocks()];
    }
};

MXN_INLINE Vec16 cap(Vec16 score, float softcap) {
    return softcap > 0 ? mul(tanh(mul(score, set16(1.f / softcap))), set16(softcap)) : score;
}

// Copies `dim` floats times a factor.
MXN_INLINE void scale_row(const float* from, int dim, float factor, float* to) {
    Vec16 s = set16(factor);
    for (int d = 0; d < dim; d += LANES) {
        int n = dim - d;
        if (n >= LANES) store16(to + d, mul(load16(from + d), s));
        else store16(to + d, n, mul(load16(from + d, n), s));
    }
}

// ---------------------------------------------------------------- decode: one query per sequence

// A context is cut at multiples of this many tokens, whatever the batch or the number of threads, so that a row's result depends on
// its own sequence alone.
constexpr int CHUNK = 512;

struct DecodeUnit {
    int32_t seq, head, chunk;
    int32_t partial;  // where the chunk's result waits for its siblings, or -1 if it is the only one
};

size_t decode_scratch_bytes(const Call& call);
int64_t partial_floats(const Call& call);
void decode_chunk(const Call& call, const DecodeUnit& unit, char* scratch, float* partials);
void merge_chunks(const Call& call, int seq, int head, int first_partial, int count, float* partials);
int first_chunk(const Call& call, int seq);
int last_chunk(const Call& call, int seq);

// ---------------------------------------------------------------- prefill: many queries per sequence

struct PrefillUnit {
    int32_t seq, head, first, last;  // queries [first, last) of the sequence's new tokens
};

int prefill_tokens(const Call& call);  // queries per unit
size_t prefill_scratch_bytes(const Call& call);
void prefill_tile(const Call& call, const PrefillUnit& unit, char* scratch);

// ---------------------------------------------------------------- a call

struct Fault {
    int32_t kind, index, found, limit;
};

enum FaultKind { FINE, BAD_QUERY_STARTS, BAD_CONTEXT, BAD_BLOCK, BAD_SLOT, NO_MEMORY, BAD_TOKEN, BAD_POSITION, BAD_ROW };

// Looks at everything that is used as an index, so that nothing reaches outside the cache.
Fault check(const Batch& batch, const LayerCache& cache);

void write_token(const Call& call, int64_t token);

// The work of a call, kept between calls only for its memory. It depends on shapes and the window, not on operands.
struct Plan {
    std::vector<PrefillUnit> prefill;
    std::vector<DecodeUnit> decode;
    std::vector<DecodeUnit> merges;  // chunk holds the number of chunks, partial the first of them
    int num_partials = 0;

    void make(const Call& call);
    size_t scratch_bytes(const Call& call) const;  // of each thread
    size_t partials_bytes(const Call& call) const;  // of all
    long num_units() const { return (long)(prefill.size() + decode.size()); }
    void attend(const Call& call, long unit, char* scratch, float* partials) const;
    void merge(const Call& call, long unit, float* partials) const;
};
