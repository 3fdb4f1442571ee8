"""Draws one token per row of logits, by that row's own rules and generator: the same draw whatever else is in the
batch.

A token's weight exp((logit - largest) / temperature) becomes an integer, its mass, in units of 2^-40: sums of masses
are exact in any
order, so a draw does not depend on how a kernel divides the row. Tokens are ordered by mass, then by id.

    top-k   keeps the k first
    top-p   keeps tokens while those before hold less than p of what top-k left
    min-p   keeps masses of at least p of the largest, which always stays

The draw is the kept token at which the running mass passes u times the kept mass, u from a generator keyed by (seed,
step): in
the order above where top-k or top-p cut, else in order of id. That is the order and the generator of mxn's CPU sampler.
"""

from __future__ import annotations

import torch

from mxn_kernels.ops.checks import check_rows, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import Target

MASS_BITS = 40
ID_BITS = 20  # ids below 2^20 and masses share a 64-bit key
MIN_TEMPERATURE = 1e-6
_MASK64 = 2**64 - 1


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    *,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor:
    """Args:
      logits (R, vocabulary), rows contiguous. temperatures (R) float32: 0 takes the largest logit, of equals the
      lowest id.
      top_k (R) int32: 0 for no limit. top_p, min_p (R) float32: 1 and 0 for no limit.
      seeds (R) int64: all 64 bits count. steps (R) int32: number of the draw, such as output tokens so far.
    Returns: token ids (R) int64; -1 where a logit is NaN or the largest is infinite, as nothing can be drawn then.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    check_rows("logits", logits, (None, None))
    num_rows, vocab_size = logits.shape
    need(0 < vocab_size <= 1 << ID_BITS, f"the vocabulary must have 1 to {1 << ID_BITS} tokens, found {vocab_size}")
    rows = {
        "temperatures": temperatures,
        "top_p": top_p,
        "min_p": min_p,
        "top_k": top_k,
        "seeds": seeds,
        "steps": steps,
    }
    dtypes = {"top_k": torch.int32, "seeds": torch.int64, "steps": torch.int32}
    for name, tensor in rows.items():
        check_rows(name, tensor, (num_rows,), (dtypes.get(name, torch.float32),))
        need(tensor.device == logits.device, f"{name} must be on {logits.device}, found {tensor.device}")
    target = target_of(logits, target, logits.dtype)
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    select("sample", target, implementation)(
        logits, temperatures, top_k, top_p, min_p, seeds, steps, out=out, target=target
    )
    return out


def sample_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    *,
    out: torch.Tensor,
    target: Target | None = None,
) -> None:
    """The same in torch by sorting, one row at a time."""
    rules = (temperatures.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), seeds.tolist(), steps.tolist())
    for row, (temperature, k, p, least, seed, step) in enumerate(zip(*rules, strict=True)):
        out[row] = _draw(logits[row].float(), temperature, k, p, least, random_bits(seed, step))


def random_bits(seed: int, step: int) -> int:
    """The `step`-th 53 random bits of the generator with this seed, at the top of a 64-bit number.

    Two rounds of splitmix64 (Steele, 2014); divided by 2^64, the u in [0, 1) of mxn's CPU sampler.
    """
    return _mix64(_mix64(seed & _MASK64) + step * 0x9E3779B97F4A7C15) >> 11 << 11


def _draw(logits: torch.Tensor, temperature: float, k: int, p: float, least: float, bits: int) -> int:
    largest = logits.max()
    if not torch.isfinite(largest) or logits.isnan().any():
        return -1
    if temperature == 0:
        return int((logits == largest).nonzero()[0])
    vocab_size = logits.shape[0]
    scale = 1.0 / torch.tensor(max(temperature, MIN_TEMPERATURE), dtype=torch.float32, device=logits.device)
    masses = (torch.exp((logits - largest) * scale) * 2.0**MASS_BITS).long()
    enough = masses >= max(1, int(torch.tensor(min(least, 1.0), dtype=torch.float32) * 2.0**MASS_BITS))
    is_cut = 0 < k < vocab_size or p < 1
    if not is_cut:
        ids = enough.nonzero()[:, 0]
    else:
        ids = torch.sort(masses, descending=True, stable=True).indices
        ids = ids[: k if 0 < k < vocab_size else vocab_size]
        ends = masses[ids].cumsum(0)
        if p < 1:
            limit = -(-int(torch.tensor(p, dtype=torch.float64) * 2.0**62) * int(ends[-1]) // 2**62)
            ids = ids[ends - masses[ids] < max(limit, 1)]
        ids = ids[enough[ids]]
    ends = masses[ids].cumsum(0)
    target = bits * int(ends[-1]) >> 64
    return int(ids[int((ends <= target).sum())])


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
