"""What the attention kernels share: one tile of an online softmax over the paged cache, its start and its end.

Shapes in comments: M query rows (tokens times the heads of one KV head), N tokens of the sequence, K and V head sizes.
Scores are kept in base 2: exp2 is one instruction. bf16 is widened to fp32 under the interpreter, which would do
integer arithmetic on its bits.
"""

from typing import Any

import triton
import triton.language as tl

from mxn_kernels.kv_cache import KVCache

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SCALE_MODES = {"none": 0, "tensor": 1, "token_head": 2}


def cache_arguments(cache: KVCache) -> dict[str, Any]:
    """The cache as kernel arguments: pointers, strides, sizes."""
    keys, values, scale = cache.keys, cache.values, cache.key_scale
    per_token = cache.scaling == "token_head"
    return {
        "keys_ptr": keys,
        "values_ptr": values,
        "key_scale_ptr": scale,
        "value_scale_ptr": cache.value_scale,
        **dict(zip(("stride_kb", "stride_kh", "stride_kt"), keys.stride(), strict=False)),
        **dict(zip(("stride_vb", "stride_vh", "stride_vt"), values.stride(), strict=False)),
        **dict(zip(("stride_sb", "stride_sh", "stride_st"), scale.stride() if per_token else (0, 0, 0), strict=True)),
        "BLOCK_SIZE": cache.block_size,
        "DK": cache.key_dim,
        "DV": cache.value_dim,
        "BLOCK_DK": padded_dim(cache.key_dim),
        "BLOCK_DV": padded_dim(cache.value_dim),
        "SCALE_MODE": SCALE_MODES[cache.scaling],
    }


def padded_dim(dim: int) -> int:
    """Tiles are powers of two; matrix units want at least 16."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def find_block(starts_ptr, num_ranges, block, BLOCK_Q: tl.constexpr):
    """Range, its first row, its number of rows, and where in it block number `block` begins (past its end for spare
    blocks).

    Range r owns blocks starts[r] // BLOCK_Q + r onwards, enough for its rows, so the last that begins at or before is
    searched.
    """
    low = tl.minimum(block, 0)  # 0 as a tensor
    high = num_ranges
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    first = tl.load(starts_ptr + low)
    num_rows = tl.load(starts_ptr + low + 1) - first
    return low, first, num_rows, (block - first // BLOCK_Q - low) * BLOCK_Q


@triton.jit
def start_rows(sinks_ptr, heads, row_mask, part, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Maximum and sum of rows that have seen nothing yet, or in part 0 only their sink: a logit without a value."""
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + heads, mask=row_mask & (heads * 0 + part == 0), other=float("-inf")).to(tl.float32)
        maximum = sinks * LOG2_E
        total = tl.where(maximum > float("-inf"), 1.0, 0.0)
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    return maximum, total


@triton.jit
def attend_tile(
    query,  # [M, K]
    acc,  # [M, V]: values so far, not yet divided by `total`
    maximum,  # [M]: largest score so far, base 2
    total,  # [M]: sum of 2^(score - maximum)
    tokens,  # [N]
    positions,  # [M]: where each query stands; a query sees tokens up to its own
    limit,  # tokens from here on are not read
    table_ptr,  # of this sequence
    keys_ptr,  # of this KV head, as the next three
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    scale,
    softcap,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    stride_sb,
    stride_st,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHECK_LIMIT: tl.constexpr,
    CHECK_POSITIONS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Takes one tile of tokens in: returns acc, maximum, total."""
    key_dims = tl.arange(0, BLOCK_DK)
    value_dims = tl.arange(0, BLOCK_DV)
    offsets = tokens % BLOCK_SIZE
    # 64 bits: a cache passes 2^31 elements long before it fills a chip.
    if CHECK_LIMIT:
        is_read = tokens < limit
        blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
    else:
        blocks = tl.load(table_ptr + tokens // BLOCK_SIZE).to(tl.int64)

    key_ptrs = keys_ptr + (blocks * stride_kb + offsets * stride_kt)[None, :] + key_dims[:, None]
    if CHECK_LIMIT:
        keys = tl.load(key_ptrs, mask=is_read[None, :] & (key_dims[:, None] < DK), other=0.0)
    elif DK != BLOCK_DK:
        keys = tl.load(key_ptrs, mask=key_dims[:, None] < DK, other=0.0)
    else:
        keys = tl.load(key_ptrs)
    keys = keys.to(tl.float32) if INTERPRET else keys.to(query.dtype)

    scores = tl.dot(query, keys, input_precision="ieee") * scale
    if SCALE_MODE == 2:
        scale_offsets = blocks * stride_sb + offsets * stride_st
        if CHECK_LIMIT:
            scores *= tl.load(key_scale_ptr + scale_offsets, mask=is_read, other=0.0)[None, :]
        else:
            scores *= tl.load(key_scale_ptr + scale_offsets)[None, :]
    if HAS_SOFTCAP:
        # tanh by exp, which every backend and the interpreter have
        scores = softcap * LOG2_E * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E) / softcap) + 1.0))
    if CHECK_LIMIT:
        scores = tl.where(is_read[None, :], scores, float("-inf"))
    if CHECK_POSITIONS:
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        if WINDOW > 0:
            scores = tl.where(tokens[None, :] > positions[:, None] - WINDOW, scores, float("-inf"))

    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # Rows that have seen nothing yet: keeps -inf - -inf out.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    shrink = tl.exp2(maximum - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]

    value_ptrs = values_ptr + (blocks * stride_vb + offsets * stride_vt)[:, None] + value_dims[None, :]
    if CHECK_LIMIT:
        # What was never written may be NaN, and 0 * NaN is NaN: so values past the limit are not read either.
        values = tl.load(value_ptrs, mask=is_read[:, None] & (value_dims[None, :] < DV), other=0.0)
    elif DV != BLOCK_DV:
        values = tl.load(value_ptrs, mask=value_dims[None, :] < DV, other=0.0)
    else:
        values = tl.load(value_ptrs)
    values = values.to(tl.float32) if INTERPRET else values.to(query.dtype)
    if SCALE_MODE == 2:
        if CHECK_LIMIT:
            weights *= tl.load(value_scale_ptr + scale_offsets, mask=is_read, other=0.0)[None, :]
        else:
            weights *= tl.load(value_scale_ptr + scale_offsets)[None, :]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, new_maximum, total


@triton.jit
def attend_range(
    query,
    acc,
    maximum,
    total,
    start,
    end,
    positions,
    table_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    scale,
    softcap,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    stride_sb,
    stride_st,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Takes in the tokens from start to end, all of which every row sees: whole tiles unmasked, then what is left."""
    columns = tl.arange(0, BLOCK_N)
    whole_end = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    for token in tl.range(start, whole_end, BLOCK_N):
        acc, maximum, total = attend_tile(
            query, acc, maximum, total, token + columns, positions, end,
            table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
            BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, 0, False, False, INTERPRET,
        )  # fmt: skip
    if whole_end < end:
        acc, maximum, total = attend_tile(
            query, acc, maximum, total, whole_end + columns, positions, end,
            table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
            BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, 0, True, False, INTERPRET,
        )  # fmt: skip
    return acc, maximum, total


@triton.jit
def finish_rows(acc, maximum, total, value_scale_ptr, SCALE_MODE: tl.constexpr):
    """Attention and its natural log-sum-exp; zeros and -inf for rows that have seen nothing."""
    divisor = tl.where(total > 0.0, total, 1.0)
    out = acc / divisor[:, None]
    if SCALE_MODE == 1:
        out = out * tl.load(value_scale_ptr)
    return out, (maximum + tl.log2(divisor)) * LN_2


@triton.jit
def score_scale(scaling, key_scale_ptr, SCALE_MODE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """What a dot product is multiplied by: into base 2 at once, unless a softcap comes between."""
    scale = scaling if HAS_SOFTCAP else scaling * LOG2_E
    if SCALE_MODE == 1:
        scale = scale * tl.load(key_scale_ptr)
    return scale
