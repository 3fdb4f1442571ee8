"""What crosses the adapter: token ids in, sampled ids out. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxn.core.request import SamplingParams, TokenLogprob

PENDING = -1
"""In the place of a token id: the one that the step submitted just before draws for this sequence. It stands alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceStep:
    """One sequence's share of a step. An executor keeps no state of its own about sequences beyond the KV cache.

    token_ids: tokens to compute now, at positions `start`, `start + 1`, ...; at least one. `(PENDING,)` only
      where steps are submitted ahead (`Executor.submit`).
    start: tokens before them whose KV is in the cache.
    block_ids: block table over at least `start + len(token_ids)` tokens (paged executors); valid during the call only.
    slot: whole-sequence slot (slot executors), else -1.
    is_sampled: True when `token_ids` reaches the end of what is known, so that a next token is to be drawn.
    num_prompt_tokens, num_output_tokens: so far; the latter is the draw's counter, so (seed, counter) fixes the draw.
    history: all prompt and output tokens when `sampling.needs_history` or prompt logprobs are asked for, else empty.
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    slot: int = -1
    is_sampled: bool
    sampling: SamplingParams
    seed: int
    num_prompt_tokens: int
    num_output_tokens: int
    history: Sequence[int] = ()

    @property
    def is_plain(self) -> bool:
        """True when temperature, top-k, top-p, min-p and the seed decide the draw, and only its token is asked for.

        No step is planned past one with another sequence: what that needs is on the host.
        """
        sampling = self.sampling
        return not (
            sampling.needs_history
            or sampling.logit_bias
            or sampling.num_logprobs is not None
            or self.num_output_tokens < sampling.min_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """All sequences of one step, in the step scheduler's order."""

    step_id: int
    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(len(s.token_ids) for s in self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """The token drawn for one sequence."""

    seq_id: int
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step yielded.

    tokens: one per sequence with `is_sampled` that did not fail, in batch order.
    prompt_logprobs: per sequence that asked: logprobs of `token_ids[i]` given the tokens before it. The entry of the
      chunk's first token is computed by the previous chunk, so a chunk yields entries for positions
      start + 1 .. start + len (the last one only when more prompt tokens are known, see `SequenceStep.history`).
    failed: (seq_id, reason) of sequences that must end with an error; the others are unharmed.
    """

    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprob, ...]], ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
