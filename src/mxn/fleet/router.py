"""Which replica a sequence goes to: a pure function of what is known about the candidates.

    score = seconds until the first token, as far as they can be foretold
          = work ahead / capacity  +  prompt tokens that are not cached x seconds per prompt token
          + JOULES_S x joules that the sequence would cost there, while its SLO has slack

The least score wins. All three terms are seconds, so a prefix hit is worth just what it saves, a queue costs just what
it takes, and a joule is worth `JOULES_S` seconds of waiting while nobody is late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

JOULES_S = 0.1
"""Seconds of waiting that a saved joule is worth while the SLO has slack."""

SLACK = 0.5
"""The SLO has slack at a replica where the first token is expected within this share of the limit."""

RAMP_S = 5.0
"""A replica that has just become ready is empty, and all would go to it at once. So it counts as if it had `NEW_SHARE`
of the others' mean work too; that part fades within `RAMP_S`. Among replicas that are all new it changes little."""

NEW_SHARE = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is asked for. output_tokens: as many as are to be expected. ttft_slo_s: None without a limit."""

    prompt_tokens: int
    output_tokens: float
    ttft_slo_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A replica that is ready and has room.

    work_tokens: prompt and output tokens that its open sequences still want, about.
    tokens_per_s: what it computes at full load. prompt_token_s: seconds that one more prompt token takes.
    cached_tokens: of the prompt, already in its prefix cache.
    joules_per_token: None when not known.
    ready_s: how long it has been ready.
    """

    work_tokens: float
    tokens_per_s: float
    prompt_token_s: float
    cached_tokens: int = 0
    joules_per_token: float | None = None
    ready_s: float = RAMP_S


def choose(candidates: Sequence[Candidate], work: Work) -> int:
    """Index of the candidate for this work; of equals the first. There is at least one."""
    first_s = first_tokens_s(candidates, work)
    limit_s = None if work.ttft_slo_s is None else SLACK * work.ttft_slo_s
    joules = [candidate.joules_per_token for candidate in candidates]
    if limit_s is None or min(first_s) > limit_s or None in joules:
        return min(range(len(candidates)), key=first_s.__getitem__)

    def score(index: int) -> float:
        return first_s[index] + JOULES_S * (joules[index] or 0.0) * work.output_tokens

    return min((i for i, s in enumerate(first_s) if s <= limit_s), key=score)


def first_tokens_s(candidates: Sequence[Candidate], work: Work) -> list[float]:
    """For each candidate, the seconds until the work's first token if it goes there."""
    ahead_s = [candidate.work_tokens / candidate.tokens_per_s for candidate in candidates]
    total_s, num_others = sum(ahead_s), max(1, len(candidates) - 1)
    return [
        own_s
        + NEW_SHARE * max(0.0, 1 - candidate.ready_s / RAMP_S) * (total_s - own_s) / num_others
        + (work.prompt_tokens - candidate.cached_tokens) * candidate.prompt_token_s
        for own_s, candidate in zip(ahead_s, candidates, strict=True)
    ]
