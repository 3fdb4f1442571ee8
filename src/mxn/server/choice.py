"""One completion of an answer while it is being made: tokens in, text, logprobs and the finish reason out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, TokenLogprob
from mxn.engine.detokenizer import Detokenizer
from mxn.errors import MxnError, UnavailableError
from mxn.server.errors import fit_to_show

if TYPE_CHECKING:
    from mxn.engine.tokenizer import Tokenizer
    from mxn.fleet.relay import RelayedStream
    from mxn.server.openai import GenerationRequest

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its logprob and where its text begins in the completion; the logprob of a prompt's first is None."""

    entry: TokenLogprob | None
    token_id: int
    text: str
    offset: int


class Choice:
    """The state of one completion. `finish_reason` is None until the last output has been taken."""

    def __init__(
        self,
        index: int,
        stream: RelayedStream,
        request: GenerationRequest,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
    ) -> None:
        self.index = index
        self.stream = stream
        self.finish_reason: str | None = None
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.energy_j: float | None = None
        self.last_token_s = 0.0
        self.scored: list[Scored] = []
        self._tokenizer = tokenizer
        self._wants_logprobs = sampling.num_logprobs is not None
        self._held: list[Scored] = []
        self._offset = 0
        self._num_chars = 0
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._shows_stop = bool(request.include_stop_str_in_output)
        self._detokenizer = Detokenizer(
            tokenizer,
            prompt_ids=prompt_ids,
            stop=request.stop,
            include_stop=self._shows_stop,
            skip_special_tokens=request.skip_special_tokens is not False,
            min_tokens=sampling.min_tokens,
        )

    def start_at(self, num_chars: int) -> None:
        """Text offsets count from here: the length of an echoed prompt."""
        self._offset = self._num_chars = num_chars

    def take(self, output: SequenceOutput) -> str:
        """Adds an output; returns the text that may be sent now and moves its logprobs to `scored`.

        Raises: MxnError when the sequence ended with an error.
        """
        reason = output.finish_reason
        if reason is FinishReason.ERROR:
            raise MxnError(fit_to_show(output.error or "the sequence failed"))
        if reason is FinishReason.ABORT:
            raise UnavailableError("the server ended this request before the answer was complete", retry_after_s=1.0)
        token_ids = output.token_ids
        self.num_output_tokens += output.num_tokens
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        self.energy_j = output.energy_j
        if reason is FinishReason.STOP and not self._shows_stop and token_ids and token_ids[-1] in self._stop_ids:
            token_ids = token_ids[:-1]
        if output.text is None:
            text = self._detokenizer.push(token_ids)
        else:
            text = self._detokenizer.push_text(output.text, output.num_tokens)
        if self._wants_logprobs:
            self._hold(token_ids, output.logprobs)
        if self._detokenizer.stopped:
            self.finish_reason = "stop"
            self.stream.abort()
        elif reason is not None:
            text += self._detokenizer.flush()
            self.finish_reason = "stop" if self._detokenizer.stopped else reason.value
        self._num_chars += len(text)
        if self._held and (text or self.finish_reason is not None):
            self._release_logprobs()
        return text

    async def settle(self) -> None:
        """Waits for the joules of a completion that a stop string cut off: the engine tells them when it has ended."""
        if self.finish_reason == "stop" and self.energy_j is None:
            self.energy_j = await self.stream.aborted_joules()

    def take_scored(self) -> list[Scored]:
        """Logprobs that belong to the text given out since the last call."""
        scored, self.scored = self.scored, []
        return scored

    def _hold(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> None:
        for token_id, entry in zip(token_ids, entries, strict=False):
            text = self._tokenizer.token_text(token_id)
            self._held.append(Scored(entry, token_id, text, self._offset))
            self._offset += len(text)

    def _release_logprobs(self) -> None:
        """Moves held entries to `scored`; those wholly behind a stop string are dropped with its text."""
        held, self._held = self._held, []
        if self._detokenizer.stopped:
            held = [s for s in held if s.offset < self._num_chars]
        self.scored += held


def chat_logprobs(scored: Sequence[Scored], tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """Logprobs as chat completions have them."""
    content = []
    for item in scored:
        entry = _chat_token(tokenizer, item.token_id, item.entry.logprob if item.entry else 0.0)
        top = item.entry.top[:num_top] if item.entry else ()
        entry["top_logprobs"] = [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in top]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(scored: Sequence[Scored], tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    """Logprobs as completions have them."""
    top: list[dict[str, float] | None] = []
    for item in scored:
        if item.entry is None:
            top.append(None)
            continue
        best = {tokenizer.token_text(token_id): finite(logprob) for token_id, logprob in item.entry.top[:num_top]}
        if num_top:
            best.setdefault(item.text, finite(item.entry.logprob))
        top.append(best)
    return {
        "tokens": [item.text for item in scored],
        "token_logprobs": [finite(item.entry.logprob) if item.entry else None for item in scored],
        "top_logprobs": top if num_top else None,
        "text_offset": [item.offset for item in scored],
    }


def score_prompt(
    prompt_ids: Sequence[int], entries: Sequence[TokenLogprob | None], tokenizer: Tokenizer
) -> list[Scored]:
    """An echoed prompt's tokens with their logprobs; the first has none."""
    scored = []
    offset = 0
    for token_id, entry in zip(prompt_ids, entries, strict=False):
        text = tokenizer.token_text(token_id)
        scored.append(Scored(entry, token_id, text, offset))
        offset += len(text)
    return scored


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
