"""The state of one sequence inside the engine."""

from __future__ import annotations

from array import array
from enum import StrEnum

from mxn.core.request import FinishReason, SequenceRequest, TokenLogprob


class SequenceStatus(StrEnum):
    """Waiting sequences hold no room in the KV cache; running ones may."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One token stream: what is known, what of it is computed, and where its KV lives.

    tokens:  [ cached | computed | scheduled now | known, not computed ]
             0 ..... num_computed_tokens ......... len(token_ids)

    There is no prefill or decode phase: a step computes the next tokens after `num_computed_tokens`; when it reaches
    the end of `token_ids`, the next token is drawn.
    """

    __slots__ = (
        "arrival",
        "arrived_s",
        "block_chain",
        "block_ids",
        "finish_reason",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "prompt_logprobs",
        "request",
        "root",
        "seed",
        "slot",
        "status",
        "token_ids",
    )

    def __init__(
        self, request: SequenceRequest, *, arrival: int, seed: int, root: bytes, arrived_s: float = 0.0
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.arrived_s: float | None = arrived_s  # until its first step
        self.seed = seed
        self.root = root
        self.token_ids = request.prompt_token_ids + request.output_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_published_blocks = 0
        self.block_ids = array("i")  # packed, because executors copy it into a tensor on every step
        self.block_chain: list[bytes] = []
        self.slot = -1
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def seq_id(self) -> int:
        return self.request.seq_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Known tokens whose KV is still to be computed; 1 means the sequence decodes."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: smaller first; priority, then arrival."""
        return (self.request.priority, self.arrival)

    @property
    def may_reuse_prefix(self) -> bool:
        """False when logits of cached positions would be needed."""
        return self.request.sampling.num_prompt_logprobs is None

    def ends_with_next(self, max_context: int) -> bool:
        """True when its next token is its last, whichever it is."""
        limit = min(self.num_prompt_tokens + self.request.sampling.max_tokens, max_context)
        return len(self.token_ids) + 1 >= limit

    def finish_after(self, token_id: int, max_context: int) -> FinishReason | None:
        """Why the sequence ends with `token_id` as its newest token, or None when it goes on."""
        sampling = self.request.sampling
        if self.num_output_tokens >= sampling.min_tokens and token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_output_tokens >= sampling.max_tokens or len(self.token_ids) >= max_context:
            return FinishReason.LENGTH
        return None
