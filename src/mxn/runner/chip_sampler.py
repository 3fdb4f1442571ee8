"""Draws tokens on the chip with the `sample` op of `mxn_kernels`, one launch for all rows and one copy back.

The op knows temperature, top-k, top-p, min-p and seeds. Rows that ask for more (those that are not `is_plain`:
penalties, logit bias, a ban of end tokens, log probabilities) go to the torch sampler. Both use the same generator in
the same order, and which of the two draws for a sequence depends on the sequence alone, never on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mxn_kernels import ops

from mxn.core.batch import SequenceStep

RULES: dict[str, torch.dtype] = {
    "temperatures": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "steps": torch.int32,
}
"""What the op takes for each row, in the order of its arguments."""

MAX_VOCABULARY = 1 << 20  # ids and probabilities share a 64-bit key in the op


def fill_rules(arrays: Mapping[str, np.ndarray], steps: Sequence[SequenceStep]) -> None:
    """Writes each sequence's rules into the first rows of the arrays named in `RULES`; rows beyond become greedy."""
    count = len(steps)
    arrays["temperatures"][count:] = 0.0
    for name, values in (
        ("temperatures", (s.sampling.temperature for s in steps)),
        ("top_k", (s.sampling.top_k for s in steps)),
        ("top_p", (s.sampling.top_p for s in steps)),
        ("min_p", (s.sampling.min_p for s in steps)),
        ("seeds", (_signed(s.seed) for s in steps)),
        ("steps", (s.num_output_tokens for s in steps)),
    ):
        array = arrays[name]
        array[:count] = np.fromiter(values, array.dtype, count)


def draw(logits: torch.Tensor, rules: Mapping[str, torch.Tensor], implementation: str | None = None) -> torch.Tensor:
    """Token ids (R) int64 on the chip; -1 where a logit is NaN or the largest is infinite.

    Args: logits (R, vocabulary). rules: tensors (R) named as in `RULES`. implementation: None for the chip's own.
    """
    return ops.sample(logits, *(rules[name] for name in RULES), implementation=implementation)


def _signed(seed: int) -> int:
    """The same 64 bits as int64 has them."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
