"""Sampling without sorting: one program per row passes over its logits a few dozen times, from the second pass on out
of cache.

Every token has a different key, its mass and then its id, so "the token at which the running mass passes m" is found by
bisection over keys, and so are the ends of top-k and top-p. Source of the idea: FlashInfer's sorting-free sampling,
there by
rejection; bisection over exact integers gives the same token on every chip and in every batch.
"""

import torch
import triton
import triton.language as tl

from mxn_kernels.target import Target
from mxn_kernels.triton.launch import launch

BLOCK = 4096


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    *,
    out: torch.Tensor,
    target: Target,
) -> None:
    num_rows, vocab_size = logits.shape
    launch(
        _sample_kernel,
        (num_rows,),
        options={"num_warps": 1024 // target.warp_size if target.vendor == "amd" else 16},
        logits_ptr=logits,
        temperatures_ptr=temperatures,
        top_k_ptr=top_k,
        top_p_ptr=top_p,
        min_p_ptr=min_p,
        seeds_ptr=seeds,
        steps_ptr=steps,
        out_ptr=out,
        vocab_size=vocab_size,
        stride_row=logits.stride(0),
        BLOCK=min(BLOCK, max(16, triton.next_power_of_2(vocab_size))),
    )


MASS_UNIT = tl.constexpr(2.0**40)
ID_UNIT = tl.constexpr(2**20)
MIN_TEMPERATURE = tl.constexpr(1e-6)


@triton.jit
def _sample_kernel(
    logits_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    out_ptr,
    vocab_size,
    stride_row,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    largest, token, has_nan = _largest(logits_ptr, vocab_size, BLOCK)
    if has_nan | (tl.abs(largest) == float("inf")):
        tl.store(out_ptr + row, tl.full((), -1, tl.int64))
        return
    temperature = tl.load(temperatures_ptr + row)
    if temperature == 0.0:
        tl.store(out_ptr + row, token.to(tl.int64))
        return

    scale = 1.0 / tl.maximum(temperature, MIN_TEMPERATURE)
    # The largest token, of weight 1, always stays.
    least = tl.maximum((tl.minimum(tl.load(min_p_ptr + row), 1.0) * MASS_UNIT).to(tl.int64), 1) * ID_UNIT
    top_k = tl.load(top_k_ptr + row).to(tl.int64)
    top_p = tl.load(top_p_ptr + row)
    bits = _random_bits(tl.load(seeds_ptr + row), tl.load(steps_ptr + row))
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    has_top_p = top_p < 1.0

    if has_top_k | has_top_p:
        floor = tl.full((), 1, tl.int64) * ID_UNIT  # a mass of 1: tokens below have none and are never drawn
        mass, count = _tally(logits_ptr, vocab_size, largest, scale, floor, BLOCK)
        if has_top_k & (top_k < count):
            floor = _find(logits_ptr, vocab_size, largest, scale, floor, count, top_k - 1, True, BLOCK)
            mass, count = _tally(logits_ptr, vocab_size, largest, scale, floor, BLOCK)
        if has_top_p:
            # ceil(top_p * mass), exactly: a fraction of 62 bits times a mass of at most 60
            share = (top_p.to(tl.float64) * 4611686018427387904.0).to(tl.int64).to(tl.uint64)
            four = (mass * 4).to(tl.uint64)
            limit = tl.umulhi(share, four).to(tl.int64) + ((share * four) != 0).to(tl.int64)
            floor = _find(logits_ptr, vocab_size, largest, scale, floor, count, tl.maximum(limit, 1) - 1, False, BLOCK)
        floor = tl.maximum(floor, least)
        mass, count = _tally(logits_ptr, vocab_size, largest, scale, floor, BLOCK)
        target = tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)
        key = _find(logits_ptr, vocab_size, largest, scale, floor, count, target, False, BLOCK)
        tl.store(out_ptr + row, (key % ID_UNIT) * -1 + (ID_UNIT - 1))
    else:
        mass, count = _tally(logits_ptr, vocab_size, largest, scale, least, BLOCK)
        target = tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)
        tl.store(out_ptr + row, _find_by_id(logits_ptr, vocab_size, largest, scale, least, target, BLOCK).to(tl.int64))


@triton.jit
def _random_bits(seed, step):
    gamma = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    state = _mix64(seed.to(tl.uint64, bitcast=True))
    return _mix64(state + step.to(tl.uint64) * gamma) >> 11 << 11


@triton.jit
def _mix64(value):
    value = value + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    value = (value ^ (value >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    value = (value ^ (value >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return value ^ (value >> 31)


@triton.jit
def _largest(logits_ptr, vocab_size, BLOCK: tl.constexpr):
    """The largest logit, its lowest id, and whether a logit is NaN."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    nans = tl.zeros([BLOCK], tl.int32)
    for first in range(0, vocab_size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        nans += (x != x).to(tl.int32)
        best_id = tl.where(x > best, ids, best_id)
        best = tl.where(x > best, x, best)
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, best_id, vocab_size), 0)
    return largest, token, tl.sum(nans, 0) > 0


@triton.jit
def _masses(logits_ptr, ids, vocab_size, largest, scale):
    """Masses of some tokens and their keys: mass first, then lower ids first."""
    x = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    mass = (tl.exp((x - largest) * scale) * MASS_UNIT).to(tl.int64)
    return mass, mass * ID_UNIT + (ID_UNIT - 1) - ids


@triton.jit
def _tally(logits_ptr, vocab_size, largest, scale, floor, BLOCK: tl.constexpr):
    """Mass and number of the tokens whose keys are at least `floor`."""
    mass_sum = tl.zeros([BLOCK], tl.int64)
    count = tl.zeros([BLOCK], tl.int64)
    for first in range(0, vocab_size, BLOCK):
        mass, key = _masses(logits_ptr, first + tl.arange(0, BLOCK), vocab_size, largest, scale)
        mass_sum += tl.where(key >= floor, mass, 0)
        count += (key >= floor).to(tl.int64)
    return tl.sum(mass_sum, 0), tl.sum(count, 0)


@triton.jit
def _find(logits_ptr, vocab_size, largest, scale, floor, count, target, by_count, BLOCK: tl.constexpr):
    """Key of the token at which the running sum, from the largest key down to `floor`, passes `target`.

    Sums masses, or ones if by_count. `count` keys are at least `floor`. Between low and high lies what is searched
    for: keys from
    low up sum to more than the target, keys from high up do not.
    """
    low = floor
    high = tl.full((), 2**61, tl.int64)
    while count > 1:
        middle = low + (high - low) // 2
        sums = tl.zeros([BLOCK], tl.int64)
        counts = tl.zeros([BLOCK], tl.int64)
        for first in range(0, vocab_size, BLOCK):
            mass, key = _masses(logits_ptr, first + tl.arange(0, BLOCK), vocab_size, largest, scale)
            sums += tl.where(key >= middle, tl.where(by_count, 1, mass), 0)
            counts += ((key >= middle) & (key < high)).to(tl.int64)
        upper = tl.sum(counts, 0)
        if tl.sum(sums, 0) > target:
            low = middle
            count = upper
        else:
            high = middle
            count = count - upper
    found = tl.zeros([BLOCK], tl.int64)
    for first in range(0, vocab_size, BLOCK):
        mass, key = _masses(logits_ptr, first + tl.arange(0, BLOCK), vocab_size, largest, scale)
        found = tl.maximum(found, tl.where((key >= low) & (key < high), key, 0))
    return tl.max(found, 0)


@triton.jit
def _find_by_id(logits_ptr, vocab_size, largest, scale, floor, target, BLOCK: tl.constexpr):
    """The token at which the running mass of kept tokens, in order of id, passes `target`."""
    first = tl.minimum(vocab_size, 0)
    before = target * 0
    inside = target * 0
    # Stops at the block in which the sum passes the target.
    while (inside <= target) & (first < vocab_size):
        mass, key = _masses(logits_ptr, first + tl.arange(0, BLOCK), vocab_size, largest, scale)
        before = inside
        inside += tl.sum(tl.where(key >= floor, mass, 0), 0)
        first += BLOCK
    first -= BLOCK
    mass, key = _masses(logits_ptr, first + tl.arange(0, BLOCK), vocab_size, largest, scale)
    ends = before + tl.cumsum(tl.where(key >= floor, mass, 0), 0)
    return first + tl.sum((ends <= target).to(tl.int32), 0)
