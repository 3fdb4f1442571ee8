"""How far a result may be from its float64 reference, and why."""

from __future__ import annotations

import torch

# Relative to the largest magnitude of a row. fp32 sums of a few hundred terms: some 1e-7 each step. fp16 and bf16
# results
# are rounded once at the end (2^-11, 2^-8) and their softmax weights once before the product with the values; the
# interpreter truncates to bf16 instead of rounding, which doubles that.
ATTENTION = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Element-wise ops in fp32, rounded once.
POINTWISE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# `row_error` of attention over thousands of tokens: one rounding of the result and one of each weight.
ROWS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# A logarithm of sums over at most a few hundred tokens, kept in fp32; operands of half precision are exact in fp32.
LSE = {torch.float32: 3e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def row_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest relative error of a row (last dimension), by norms; infinite if one is NaN.

    For long sums, whose results are small.
    """
    found, wanted = found.double(), wanted.double()
    worst = ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)).max()
    return float(worst) if bool(worst.isfinite()) else float("inf")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude wanted (1 at least); infinite if one is NaN."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    if found.shape != wanted.shape or not torch.equal(found.isinf(), wanted.isinf()) or found.isnan().any():
        return float("inf")
    finite = wanted.isfinite()
    if not finite.any():
        return 0.0
    scale = max(1.0, float(wanted[finite].abs().max()))
    return float((found[finite] - wanted[finite]).abs().max()) / scale
