"""How to ask a server for one sequence, and how to read what it streams: OpenAI's completions, and llama-server's own.

What a server cannot do as asked is refused by the name of the API's field, never left out in silence. Stop strings are
no server's business: the gateway finds them in the text and ends the sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from mxn.backends.base import ServerSpec
from mxn.core.request import PROMPT_LOGPROBS, FinishReason, SamplingParams, SequenceRequest, TokenLogprob
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import RequestError

_encode = msgspec.json.encode
_RULES = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
)
_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(slots=True)
class Delta:
    """What one event of a stream says. Counts are totals so far, None when the event does not tell.

    text: None when token ids stand for it. finish_reason: as the server spells it, "" while the sequence goes on.
    """

    token_ids: list[int]
    text: str | None
    logprobs: list[TokenLogprob]
    finish_reason: str = ""
    num_output_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def reason(self) -> FinishReason | None:
        """The finish reason as mxn knows it; None while the sequence goes on, ERROR for one that it does not know."""
        return _REASONS.get(self.finish_reason, FinishReason.ERROR) if self.finish_reason else None


class Dialect(ABC):
    """One way of speaking to a server.

    path: where requests go. has_token_ids: answers come as token ids, not as text.
    """

    path: ClassVar[str]
    has_token_ids = False

    def __init__(self, spec: ServerSpec, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(tokenizer.eos_token_ids)

    @abstractmethod
    def refused(self) -> set[str]:
        """Fields of the API that this server cannot serve."""

    @abstractmethod
    def body(self, request: SequenceRequest) -> bytes:
        """The request as JSON. Raises: RequestError naming the field that this server cannot serve as asked."""

    @abstractmethod
    def read(self, event: bytes) -> Delta:
        """One event. Raises: msgspec.DecodeError when it is none."""

    def check(self, sampling: SamplingParams) -> None:
        """Raises: RequestError for the first sampling rule in use that this server has not."""
        refused = self.refused()
        neutral = SamplingParams()
        for field in _RULES:
            if field in refused and getattr(sampling, field) != getattr(neutral, field):
                raise self.refusal(field)
        if sampling.num_logprobs is not None and "logprobs" in refused:
            raise self.refusal("logprobs")
        if sampling.num_prompt_logprobs is not None:
            raise self.refusal("echo", "with logprobs")

    def count_tokens(self, text: str) -> int:
        """Tokens of a text that the server has not counted."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def refusal(self, field: str, how: str = "") -> RequestError:
        """The error that names the field."""
        text = f"{field}{f' {how}' if how else ''} is not supported by the server behind this model ({self.spec.model})"
        return RequestError(text, param=field, code="unsupported_parameter")


# ---------------------------------------------------------------- OpenAI's completions


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_read_chunk = msgspec.json.Decoder(_Chunk).decode


class Completions(Dialect):
    """POST /v1/completions, with the extensions that the server declares."""

    path = "/v1/completions"

    def __init__(self, spec: ServerSpec, tokenizer: Tokenizer) -> None:
        super().__init__(spec, tokenizer)
        self._extensions = frozenset(spec.extensions)
        self.has_token_ids = "return_token_ids" in self._extensions

    def refused(self) -> set[str]:
        missing = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"} - self._extensions
        missing |= {PROMPT_LOGPROBS, *self.spec.refused}
        if "return_tokens_as_token_ids" not in self._extensions:
            missing |= {"logprobs", "top_logprobs"}
        if not self.has_token_ids:
            missing |= {"skip_special_tokens"} | ({"stop_token_ids"} - self._extensions)
        return missing

    def body(self, request: SequenceRequest) -> bytes:
        sampling = request.sampling
        self.check(sampling)
        fields: dict[str, Any] = {
            "model": self.spec.model,
            "prompt": request.prompt_token_ids if self.spec.takes_token_ids else self._text(request.prompt_token_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._ends(sampling),
        }
        for name in ("top_k", "min_p", "repetition_penalty", "min_tokens"):
            if name in self._extensions:  # always sent, for a server may take its defaults from the model's files
                fields[name] = getattr(sampling, name)
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(sampling, name):
                fields[name] = getattr(sampling, name)
        if sampling.logit_bias:
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias}
        if sampling.seed is not None:
            fields["seed"] = sampling.seed
        if sampling.num_logprobs is not None:
            fields |= {"logprobs": sampling.num_logprobs, "return_tokens_as_token_ids": True}
        if self.has_token_ids:
            fields["return_token_ids"] = True
        if "cache_salt" in self._extensions and request.cache_salt:
            fields["cache_salt"] = request.cache_salt
        return _encode(fields)

    def read(self, event: bytes) -> Delta:
        chunk = _read_chunk(event)
        choice = chunk.choices[0] if chunk.choices else _NO_CHOICE
        delta = Delta(
            token_ids=choice.token_ids or [],
            text=None if self.has_token_ids else choice.text,
            logprobs=_logprobs(choice.logprobs) if choice.logprobs is not None else [],
            finish_reason=choice.finish_reason or "",
        )
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            delta.num_output_tokens = chunk.usage.completion_tokens
            delta.num_prompt_tokens = chunk.usage.prompt_tokens
            delta.num_cached_tokens = (details.cached_tokens or 0) if details is not None else 0
        if chunk.error is not None:
            delta.error = error_text(chunk.error)
        return delta

    def _ends(self, sampling: SamplingParams) -> dict[str, Any]:
        """Fields that make the server stop where mxn's engine would."""
        stops = frozenset(sampling.stop_token_ids)
        if {"ignore_eos", "stop_token_ids"} <= self._extensions:
            return {"ignore_eos": True, "stop_token_ids": sorted(stops)}
        fields: dict[str, Any] = {}
        if self.eos_ids and not stops & self.eos_ids:
            if "ignore_eos" not in self._extensions:
                raise self.refusal("ignore_eos")
            fields["ignore_eos"] = True
        if others := stops - self.eos_ids:
            if "stop_token_ids" in self._extensions:
                fields["stop_token_ids"] = sorted(others)
            elif not self.has_token_ids:  # with token ids at hand, the proxy ends the sequence itself
                raise self.refusal("stop_token_ids")
        return fields

    def _text(self, token_ids: list[int]) -> str:
        """The prompt as text, without the token that the server's tokenizer puts before it again."""
        start = self.tokenizer.encode("", add_special_tokens=True)
        ids = token_ids[len(start) :] if start and token_ids[: len(start)] == start else token_ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)


_NO_CHOICE = _Choice()


def _logprobs(given: _Logprobs) -> list[TokenLogprob]:
    """Logprobs whose tokens are spelled "token_id:N"."""
    tops = given.top_logprobs or [None] * len(given.tokens)
    return [
        TokenLogprob(
            token_id=_token_id(token),
            logprob=float("-inf") if logprob is None else logprob,
            top=tuple(sorted(((_token_id(t), p) for t, p in (top or {}).items()), key=lambda one: -one[1])),
        )
        for token, logprob, top in zip(given.tokens, given.token_logprobs, tops, strict=False)
    ]


def _token_id(token: str) -> int:
    try:
        return int(token.removeprefix("token_id:"))
    except ValueError as error:
        raise msgspec.DecodeError(f'a token is spelled "{token[:40]}", expected "token_id:N"') from error


# ---------------------------------------------------------------- llama-server's own


class _Probability(msgspec.Struct):
    id: int
    logprob: float
    top_logprobs: list[_Probability] = []


class _Timings(msgspec.Struct):
    cache_n: int | None = None


class _LlamaEvent(msgspec.Struct):
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str = "none"
    tokens_predicted: int | None = None
    tokens_evaluated: int | None = None
    completion_probabilities: list[_Probability] = []
    timings: _Timings | None = None
    error: Any = None


_read_llama = msgspec.json.Decoder(_LlamaEvent).decode
_LLAMA_REASONS = {"eos": "stop", "word": "stop", "limit": "length"}
_LLAMA_RULES = ["penalties", "temperature", "top_k", "top_p", "min_p"]
"""Its samplers in the order of mxn's rules; others are off."""
_LLAMA_SEEDS = 2**32 - 1
"""Its seeds are 32-bit numbers, of which the last means "draw one"."""
_WHOLE_HISTORY = 2**31 - 1


class LlamaCpp(Dialect):
    """POST /completion. It names no token that ends inside a character, so its text counts and not its token ids.

    Its presence and frequency penalties count the prompt's tokens too, unlike OpenAI's, and it knows no minimum length:
    both are refused. Its cache knows no tenants, so prefixes are reused only until a second one is seen.
    """

    path = "/completion"

    def __init__(self, spec: ServerSpec, tokenizer: Tokenizer) -> None:
        super().__init__(spec, tokenizer)
        self._salts: set[str] = set()

    def refused(self) -> set[str]:
        own = {"min_tokens", "presence_penalty", "frequency_penalty", "skip_special_tokens", PROMPT_LOGPROBS}
        return own | set(self.spec.refused)

    def body(self, request: SequenceRequest) -> bytes:
        sampling = request.sampling
        self.check(sampling)
        self._salts.add(request.cache_salt)
        fields: dict[str, Any] = {
            "prompt": request.prompt_token_ids,
            "n_predict": sampling.max_tokens,
            "stream": True,
            "return_tokens": True,
            "samplers": _LLAMA_RULES,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": _WHOLE_HISTORY if sampling.repetition_penalty != 1.0 else 0,
            "logit_bias": sampling.logit_bias,
            "ignore_eos": not self.eos_ids & frozenset(sampling.stop_token_ids),
        }
        if len(self._salts) > 1:
            fields["cache_prompt"] = False
        if sampling.seed is not None:
            fields["seed"] = sampling.seed % _LLAMA_SEEDS
        if sampling.num_logprobs is not None:
            fields["n_probs"] = max(1, sampling.num_logprobs)
        return _encode(fields)

    def read(self, event: bytes) -> Delta:
        given = _read_llama(event)
        return Delta(
            token_ids=given.tokens,
            text=given.content,
            logprobs=[
                TokenLogprob(token_id=p.id, logprob=p.logprob, top=tuple((t.id, t.logprob) for t in p.top_logprobs))
                for p in given.completion_probabilities
            ],
            finish_reason=_LLAMA_REASONS.get(given.stop_type, given.stop_type) if given.stop else "",
            num_output_tokens=given.tokens_predicted,
            num_prompt_tokens=given.tokens_evaluated,
            num_cached_tokens=(given.timings.cache_n or 0) if given.timings is not None else 0,
            error=None if given.error is None else error_text(given.error),
        )


DIALECTS: dict[str, type[Dialect]] = {"completions": Completions, "llama.cpp": LlamaCpp}


def error_text(error: Any) -> str:
    """The message of an error object, whatever its shape."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:1000]


def body_error(body: bytes) -> str:
    """The message of an answer that is no stream."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body[:300].decode(errors="replace").strip() or "it gave no reason"
    return error_text(value.get("error", value) if isinstance(value, dict) else value)
