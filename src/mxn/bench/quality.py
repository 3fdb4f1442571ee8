"""The quality gate: a subject's answers against those of the reference path, so that a faster wrong answer fails.

The reference continues a few texts greedily. Both sides then score the same whole texts, and all of them as one long
text, in one pass each: agreement is the share of positions at which their most likely tokens are the same, and the mean
log-likelihood is that of the texts' tokens. A server that cannot score texts is compared by how far its own greedy
continuation follows the reference's.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from mxn.bench.records import Quality
from mxn.engine.http_stream import ConnectionPool, TransportError
from mxn.errors import MxnError

MIN_AGREEMENT = 0.88
MAX_LOGLIK_LOSS = 0.055
"""Nats per token that a subject may lose against the reference.

Both limits lie between what right and what deliberately wrong weights of SmolLM2-135M were measured at; see
docs/benchmarking.md.
"""

MIN_FOLLOWED = 0.2
"""For servers that cannot score: the share of the reference's text to follow before the first difference."""

CONTINUED_TOKENS = 48
_TIMEOUT_S = 600.0

TEXTS = (
    "The three states of matter that people meet every day are",
    "To boil an egg, first fill a small pot with water and",
    "In the year 1969, two astronauts landed on the Moon while a third",
    "A list of the planets of our solar system, from the one nearest to the Sun:",
    "def add(a, b):\n    return a + b\n\ndef multiply(a, b):",
    "Dear Ms Novak,\n\nthank you for your letter of last week. I am writing to tell you that",
    "Rain falls when water vapour in the air cools, turns into small drops, and",
    "Question: What is the capital of France?\nAnswer:",
    "The old lighthouse keeper climbed the stairs as he had done every evening for thirty years.",
    "Energy is measured in joules, power in watts. One watt is",
    "1, 2, 4, 8, 16, 32,",
    "Bread is made of flour, water, salt and yeast. The dough",
)


class ScoringError(MxnError):
    """A server does not give what the quality gate needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Per token of a text after the first: its log-likelihood, and the most likely token there."""

    logliks: tuple[float, ...]
    tops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What the reference path says: `TEXTS` with their continuations and all of those as one text, and its scores."""

    name: str
    texts: tuple[str, ...]
    scores: tuple[Scored, ...]


class Answerer(Protocol):
    """Whatever can be judged. Its methods raise ScoringError when it does not give what the gate needs."""

    async def continue_text(self, text: str) -> str:
        """What follows the text, greedily, in `CONTINUED_TOKENS` tokens."""

    async def score(self, text: str) -> Scored:
        """Log-likelihoods of a text's tokens."""

    def close(self) -> None:
        """Gives back what it holds. Safe to call twice."""


class Asker:
    """Whole (not streamed) completions of one server. `base_url` ends in /v1."""

    def __init__(self, base_url: str, *, model: str, api_key: str | None = None) -> None:
        self._pool = ConnectionPool(base_url.rstrip("/"))
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = model

    async def continue_text(self, text: str) -> str:
        """What the server says next, greedily. Raises: ScoringError, TransportError."""
        choice = await self._ask(prompt=text, max_tokens=CONTINUED_TOKENS, temperature=0, ignore_eos=True)
        return str(choice.get("text", ""))

    async def score(self, text: str) -> Scored:
        """Log-likelihoods of a text's tokens. Raises: ScoringError when the server cannot; TransportError."""
        choice = await self._ask(prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1)
        found = choice.get("logprobs")
        if not isinstance(found, dict) or not str(choice.get("text", "")).startswith(text[:8]):
            raise ScoringError("the server does not echo prompts with their log-likelihoods")
        logliks, tops = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        # The first token has nothing before it, the last is the one that had to be generated.
        pairs = list(zip(logliks, tops, strict=False))[1:-1]
        if not pairs or any(loglik is None or not top for loglik, top in pairs):
            raise ScoringError("the server leaves out log-likelihoods of prompt tokens")
        return Scored(
            logliks=tuple(float(loglik) for loglik, _ in pairs),
            tops=tuple(max(top, key=top.__getitem__) for _, top in pairs),
        )

    async def _ask(self, **fields: object) -> dict[str, Any]:
        body, parts = msgspec.json.encode({"model": self._model, **fields}), bytearray()
        status = await self._pool.exchange(
            "POST",
            "/completions",
            headers=self._headers,
            body=body,
            sink=lambda data, _: parts.extend(data),
            timeout_s=_TIMEOUT_S,
        )
        try:
            answer = msgspec.json.decode(bytes(parts))
            if status != 200:
                raise ScoringError(f"HTTP {status}: {bytes(parts[:200]).decode(errors='replace')}")
            choice: dict[str, Any] = answer["choices"][0]
        except (msgspec.DecodeError, KeyError, IndexError, TypeError) as err:
            raise ScoringError(f"the answer is not a completion: {bytes(parts[:200])!r}") from err
        return choice

    def close(self) -> None:
        """Closes the connections."""
        self._pool.close()


async def take_reference(asker: Answerer, name: str) -> Reference:
    """Continues and scores the texts. Raises: ScoringError, TransportError when the reference cannot."""
    said = await asyncio.gather(*(asker.continue_text(text) for text in TEXTS))
    texts = tuple(text + more for text, more in zip(TEXTS, said, strict=True))
    texts += ("\n\n".join(texts),)
    return Reference(name=name, texts=texts, scores=tuple(await asyncio.gather(*map(asker.score, texts))))


async def judge(asker: Answerer, reference: Reference) -> Quality:
    """A subject against the reference. What cannot be compared does not pass, and the note says why."""
    try:
        return _judge_scores(reference, await asyncio.gather(*map(asker.score, reference.texts)))
    except ScoringError as why:
        try:
            said = await asyncio.gather(*map(asker.continue_text, TEXTS))
            followed = [
                _followed(text[len(start) :], own)
                for start, text, own in zip(TEXTS, reference.texts, said, strict=False)
            ]
        except (ScoringError, TransportError) as err:
            return _failed(reference, str(err))
        share = statistics.fmean(followed)
        return Quality(
            reference=reference.name,
            num_positions=len(followed),
            agreement=None,
            mean_loglik=None,
            reference_loglik=_mean_loglik(reference.scores),
            is_passed=share >= MIN_FOLLOWED,
            note=f"follows {share:.0%} of the reference's text before the first difference (limit {MIN_FOLLOWED:.0%}); "
            f"not scored: {why}",
        )
    except TransportError as err:
        return _failed(reference, str(err))


def _judge_scores(reference: Reference, scores: Sequence[Scored]) -> Quality:
    lengths = [(len(a.tops), len(b.tops)) for a, b in zip(reference.scores, scores, strict=True)]
    if any(a != b for a, b in lengths):
        raise ScoringError("the server splits the texts into other tokens than the reference")
    same = [x == y for a, b in zip(reference.scores, scores, strict=True) for x, y in zip(a.tops, b.tops, strict=True)]
    agreement = statistics.fmean(same)
    own, expected = _mean_loglik(scores), _mean_loglik(reference.scores)
    is_passed = agreement >= MIN_AGREEMENT and own >= expected - MAX_LOGLIK_LOSS
    return Quality(
        reference=reference.name,
        num_positions=len(same),
        agreement=agreement,
        mean_loglik=own,
        reference_loglik=expected,
        is_passed=is_passed,
        note=f"{agreement:.1%} of {len(same)} greedy tokens agree (limit {MIN_AGREEMENT:.0%}), "
        f"log-likelihood {own:.3f} against {expected:.3f} nats per token (limit {expected - MAX_LOGLIK_LOSS:.3f})",
    )


def _failed(reference: Reference, why: str) -> Quality:
    return Quality(
        reference=reference.name,
        num_positions=0,
        agreement=None,
        mean_loglik=None,
        reference_loglik=None,
        is_passed=False,
        note=f"could not be compared: {why}",
    )


def _mean_loglik(scores: Sequence[Scored]) -> float:
    return statistics.fmean(loglik for score in scores for loglik in score.logliks)


def _followed(expected: str, said: str) -> float:
    """The share of a text that another begins with."""
    count = next(
        (i for i, (a, b) in enumerate(zip(expected, said, strict=False)) if a != b), min(len(expected), len(said))
    )
    return count / len(expected) if expected else 1.0
