"""What the engine is asked for and what it answers: one sequence per wanted completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended. `STOP` also covers stop strings, which the detokenizer finds."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


PROMPT_LOGPROBS = "prompt_logprobs"
"""What a replica that cannot give logprobs of the prompt names among the fields it refuses; the API says echo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token of one sequence is chosen. Validated at the front door; neutral values switch a rule off.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    repetition_penalty: 1 is off, over prompt and output tokens (Keskar et al., 2019).
    presence_penalty, frequency_penalty: 0 is off, over output tokens (OpenAI's definition).
    logit_bias: (token id, bias) pairs, added before temperature.
    seed: None lets the engine draw one; the same seed gives the same tokens whatever else is in the batch.
    num_logprobs: None for none, k for the sampled token and the k most likely.
    num_prompt_logprobs: same for each prompt token; switches prefix reuse off for the sequence.
    stop_token_ids: ids that end the sequence (end-of-text ids included unless ignored); banned before `min_tokens`.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """True when the executor needs the token ids before this step, not only their KV."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.num_prompt_logprobs is not None
        )

    @property
    def is_plain_greedy(self) -> bool:
        """True when the next token is the bare argmax of the logits and nothing else is asked for."""
        return (
            self.temperature == 0.0
            and not self.needs_history
            and not self.logit_bias
            and self.num_logprobs is None
            and self.num_prompt_logprobs is None
            and self.min_tokens == 0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRequest:
    """One token stream that is asked for, or the vector of one text from a model that embeds.

    seq_id: unique within the replica, chosen by the gateway, never by a client.
    sampling: means nothing to a model that embeds.
    cache_salt: which tenant's prefix blocks it may share; derived by the server.
    priority: lower is served first; ties in order of arrival.
    output_token_ids: output that another replica made of this sequence. It goes on behind them as if it had made them
      itself: limits, penalties and the draw's counter include them, and outputs hold only what is new.
    fallback_seed: what tokens are drawn with when `sampling.seed` is None, so that another replica can go on; None
      lets the engine draw one.
    waited_s: seconds that it has stood in line before it came to the replica.
    """

    seq_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    priority: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    fallback_seed: int | None = None
    waited_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Log probability of one token and of the most likely ones at its position, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOutput:
    """What one step added to a sequence.

    token_ids: new output tokens; a token that ended the sequence by `stop_token_ids` is included.
    text: what this output adds, from a server that turns tokens into text itself; None means that `token_ids` say it.
    num_counted_tokens: new output tokens as such a server counts them, since it may not name them all; else None.
    logprobs: one per new token when asked for.
    prompt_logprobs: once, with the first output: one per prompt token, None for the first.
    num_cached_tokens: prompt tokens that came out of the prefix cache.
    finish_reason: set exactly once, on the last output of the sequence. error: text for ERROR.
    energy_j: with the last output: the sequence's share of its chip's joules, when something meters the chip.
    vector: from a model that embeds, with the only output: float32, little endian.
    """

    seq_id: int
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    num_counted_tokens: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    energy_j: float | None = None
    vector: bytes | None = None

    @property
    def num_tokens(self) -> int:
        """New output tokens."""
        return len(self.token_ids) if self.num_counted_tokens is None else self.num_counted_tokens
