// A decoder as the step program sees it: plain pointers and numbers, laid out by cpu_step.py field for field.
#pragma once
#include <stdint.h>

#include "attention.h"
#include "gemm.h"

struct Norm {
    const float* weight;  // null: the norm is not there
    int32_t width;        // what one normalisation spans: the hidden size, a head, or all heads
    float eps, offset;
};

struct Rotation {
    const float *cos, *sin;  // [positions][dims / 2]; null: no rotation
    int32_t dims;            // the first dims of each head are rotated, in halves
    int32_t positions;
};

constexpr int MAX_QKV = 3;

struct Layer {
    Norm before_attention, query_norm, key_norm, after_attention, before_mlp, after_mlp;
    const PackedWeight* qkv[MAX_QKV];  // q, k and v, or all in one; the rest null
    const PackedWeight *out, *gate, *up, *down;  // the last three null: the layer ends with its attention
    const LayerCache* cache;
    const float* sinks;  // null: none
    Rotation rotation;
    int32_t num_heads, window;  // window 0: no limit
    float scaling, softcap;     // softcap 0: none
    float residual_factor;
    int32_t activation;         // SILU_TIMES or GELU_TANH_TIMES
};

struct Decoder {
    const Layer* layers;
    const float* embedding;
    const PackedWeight* head;
    Norm final_norm;
    int32_t num_layers, hidden_size, vocab_size;
    float embedding_scale, logit_factor, logit_softcap;  // softcap 0: none
};

// What a step's time is noted under; names in cpu_step.py.
enum StageKind : int32_t { EMBED, QUANTISE, QKV, ROTATE, ATTEND, MERGE, OUT, SETTLE, GATE_UP, DOWN, HEAD, NUM_STAGE_KINDS };

// One call: from token ids (or hidden states, for checks) through layers [first_layer, last_layer) to logits of some rows.
struct StepInput {
    const int64_t* token_ids;  // null: begin with `hidden`
    const float* hidden;
    const int64_t* positions;
    const Batch* batch;
    const int64_t* logit_rows;
    float* logits;         // [num_logit_rows][vocab_size]; not used if `chosen` is
    int64_t* chosen;       // null, or [num_logit_rows]: the likeliest token of each row, of equals the first
    float* chosen_logits;  // [num_logit_rows]: its logit, not finite if the row holds NaN or infinity
    float* hidden_out;     // null, or [tokens][hidden_size] after the last layer
    double* profile;       // null, or seconds by StageKind (of all threads, divided by their number), then of the whole; added to
    int32_t num_logit_rows, first_layer, last_layer;
};
