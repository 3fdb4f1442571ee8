// Paged attention with write. The way of a call: check every index it will follow, write the new keys and values, then attend to each
// sequence by its own length: one new token goes the decode way, more go the prefill way, whatever its neighbours do.
#include <algorithm>
#include <new>

#include "attention.h"
#include "gemm.h"

Fault check(const Batch& batch, const LayerCache& cache) {
    const int32_t* starts = batch.query_starts;
    if (starts[0] != 0) return {BAD_QUERY_STARTS, 0, starts[0], 0};
    if (starts[batch.num_seqs] != batch.num_tokens) return {BAD_QUERY_STARTS, batch.num_seqs, starts[batch.num_seqs], batch.num_tokens};
    for (int s = 0; s < batch.num_seqs; s++) {
        int queries = starts[s + 1] - starts[s], context = batch.context_lens[s];
        if (queries < 0) return {BAD_QUERY_STARTS, s + 1, starts[s + 1], starts[s]};
        if (context < queries || (int64_t)context > (int64_t)batch.max_blocks * cache.block_size)
            return {BAD_CONTEXT, s, context, batch.max_blocks * cache.block_size};
        const int32_t* blocks = batch.block_table + (int64_t)s * batch.max_blocks;
        int used = (context + cache.block_size - 1) / cache.block_size;
        uint32_t largest = 0;
        for (int i = 0; i < used; i++) largest = std::max(largest, (uint32_t)blocks[i]);
        if (used && largest >= (uint32_t)cache.num_blocks) return {BAD_BLOCK, s, (int32_t)largest, cache.num_blocks};
    }
    int64_t slots = (int64_t)cache.num_blocks * cache.block_size;
    for (int t = 0; t < batch.num_tokens; t++) {
        int slot = batch.slot_mapping[t];
        if (slot < -1 || slot >= slots) return {BAD_SLOT, t, slot, (int32_t)slots};
    }
    return {FINE, 0, 0, 0};
}

static void write_half(const LayerCache& cache, const float* key, const float* value, uint8_t* key_sub, uint8_t* value_sub, int lane) {
    half_t *keys = (half_t*)key_sub + lane, *values = (half_t*)value_sub + lane * cache.value_pitch;
    for (int d = 0; d < cache.key_dim; d += LANES) {
        half_t halves[LANES];
        int n = std::min(LANES, cache.key_dim - d);
        store16_half(halves, n == LANES ? load16(key + d) : load16(key + d, n));
        for (int i = 0; i < n; i++) keys[(d + i) * LANES] = halves[i];
    }
    for (int d = 0; d < cache.value_dim; d += LANES) {  // the row is padded with zeros up to the pitch
        int n = std::min(LANES, cache.value_dim - d);
        store16_half(values + d, n == LANES ? load16(value + d) : load16(value + d, n));
    }
}

// Each token by its own largest value, as activations are.
static void write_int8(const LayerCache& cache, const float* key, const float* value, uint8_t* key_sub, uint8_t* value_sub, int lane) {
    constexpr size_t SCALES = Sub<int8_t>::SCALE_BYTES;
    int32_t surplus;
    int8_t row[MAX_INT8_KEY_DIM];
    quantise_row(key, cache.key_dim, 0, round_up(cache.key_dim, LANES), {row, (float*)key_sub + lane, &surplus, nullptr});
    for (int d = 0; d < cache.key_dim; d++) ((int8_t*)key_sub)[SCALES + d * LANES + lane] = row[d];
    int8_t* values = (int8_t*)value_sub + SCALES + lane * cache.value_pitch;
    quantise_row(value, cache.value_dim, 0, cache.value_pitch, {values, (float*)value_sub + lane, &surplus, nullptr});
}

void write_token(const Call& call, int64_t token) {
    const LayerCache& cache = call.cache;
    int slot = call.batch.slot_mapping[token];
    if (slot < 0) return;
    int block = slot / cache.block_size, sub = slot % cache.block_size / LANES, lane = slot % LANES;
    auto* write = cache.type == KV_INT8 ? write_int8 : write_half;
    for (int head = 0; head < cache.num_kv_heads; head++)
        write(cache, call.in.key.at(head, token), call.in.value.at(head, token), cache.key_sub(block, head, sub),
              cache.value_sub(block, head, sub), lane);
}

void Plan::make(const Call& call) {
    prefill.clear(), decode.clear(), merges.clear();
    num_partials = 0;
    int step = prefill_tokens(call), heads = call.cache.num_kv_heads;
    for (int s = 0; s < call.batch.num_seqs; s++) {
        int queries = call.query_len(s);
        if (queries == 1) {
            int first = first_chunk(call, s), count = last_chunk(call, s) - first + 1;
            for (int h = 0; h < heads; h++) {
                if (count > 1) merges.push_back({s, h, count, num_partials});
                for (int c = 0; c < count; c++) decode.push_back({s, h, first + c, count > 1 ? num_partials++ : -1});
            }
        } else {
            // Later tiles see more keys: the longest work is handed out first.
            for (int t = (queries - 1) / step * step; t >= 0; t -= step)
                for (int h = 0; h < heads; h++) prefill.push_back({s, h, t, std::min(t + step, queries)});
        }
    }
}

size_t Plan::scratch_bytes(const Call& call) const {
    size_t bytes = prefill.empty() ? 0 : prefill_scratch_bytes(call);
    return decode.empty() ? bytes : std::max(bytes, decode_scratch_bytes(call));
}

size_t Plan::partials_bytes(const Call& call) const { return sizeof(float) * num_partials * partial_floats(call); }

void Plan::attend(const Call& call, long unit, char* scratch, float* partials) const {
    long prefills = (long)prefill.size();
    if (unit < prefills) prefill_tile(call, prefill[unit], scratch);
    else decode_chunk(call, decode[unit - prefills], scratch, partials);
}

void Plan::merge(const Call& call, long unit, float* partials) const {
    const DecodeUnit& m = merges[unit];
    merge_chunks(call, m.seq, m.head, m.partial, m.chunk, partials);
}

// Multiply-adds below which a second thread does not pay for its waking.
constexpr int64_t SERIAL_WORK = 1 << 16;
constexpr int64_t SERIAL_WRITE = 4096;   // likewise for values written
constexpr int TOKENS_PER_ITEM = 16;      // written by a thread at a time

extern "C" Plan* mxn_plan_create() { return new (std::nothrow) Plan(); }
extern "C" void mxn_plan_destroy(Plan* plan) { delete plan; }

extern "C" int mxn_paged_attention(Workspace* space, Plan* plan, const LayerCache* cache, const Batch* batch, const Operands* in, Fault* fault) {
    Call call{*cache, *batch, *in};
    *fault = check(*batch, *cache);
    if (fault->kind != FINE) return fault->kind;
    if (batch->num_tokens == 0) return FINE;
    Turn turn(space);
    plan->make(call);

    int64_t written = (int64_t)batch->num_tokens * cache->num_kv_heads * (cache->key_dim + cache->value_dim);
    int64_t work = 0;
    for (int s = 0; s < batch->num_seqs; s++)
        work += (int64_t)call.query_len(s) * call.context(s) * in->num_heads * (cache->key_dim + cache->value_dim);
    bool alone = work < SERIAL_WORK;
    size_t scratch = plan->scratch_bytes(call);
    for (Arena& own : space->own)
        if (!own.reserve(scratch)) return (fault->kind = NO_MEMORY);
    if (!space->shared.reserve(plan->partials_bytes(call))) return (fault->kind = NO_MEMORY);
    float* partials = (float*)space->shared.base;

    // A few tokens are written faster than threads can meet. Either way every write is done before any read.
    long write_items = (batch->num_tokens + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM;
    if (alone || written < SERIAL_WRITE) {
        for (int64_t t = 0; t < batch->num_tokens; t++) write_token(call, t);
        write_items = 0;
    }
    const long items[] = {write_items, plan->num_units(), (long)plan->merges.size()};
    space->team.run(items, 3, alone, [&](int phase, long i, int thread) {
        FlushDenormals guard;
        if (phase == 0) {
            int64_t last = std::min<int64_t>((i + 1) * TOKENS_PER_ITEM, batch->num_tokens);
            for (int64_t t = i * TOKENS_PER_ITEM; t < last; t++) write_token(call, t);
        } else if (phase == 1) plan->attend(call, i, space->own[thread].base, partials);
        else plan->merge(call, i, partials);
    });
    return FINE;
}
