"""L3: tokens and log probabilities are the model's, whatever else is in the batch, in the cache, or came before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mxn.conformance.reference import Floats, Reference
from mxn.conformance.result import CheckFailed, NotApplicable
from mxn.conformance.subject import Ask, Generated, Subject, WatchedReplica, info_of, prompt, require_equal
from mxn.core.request import PROMPT_LOGPROBS, TokenLogprob

TOLERANCES = {"none": 0.005, "fp32": 0.005, "fp16": 0.1, "bf16": 0.6, "int8": 1.0}
"""Log probabilities may differ by this much from float64. The CPU backend's largest differences on the tiny models, two
seeds each, were 2e-5 in fp32, 0.39 in bf16 and 0.65 in int8: their logits spread widely, so that errors show. Narrower
weights change random models beyond comparison and are not judged. "none": weights as in the file, float32."""

LENGTHS = (1, 5, 16, 17, 33, 70, 120)
NUM_TOP = 5


async def tokens_and_logprobs_are_the_references(subject: Subject) -> str:
    seen = []
    for model in subject.runnable:
        replica = await subject.replica(model)
        worst = await _compare(subject, replica, subject.reference(model))
        seen.append(f"{model.spec.architecture} {worst:.1e}")
    return f"{info_of(replica).quantisation}, largest differences: {', '.join(seen)}"


async def the_quantisation_it_chooses_itself_is_close_to_the_reference(subject: Subject) -> str:
    model = subject.runnable[0]
    replica = await subject.replica(model, replace(subject.precise, quantisation="auto"))
    worst = await _compare(subject, replica, subject.reference(model))
    return f"{info_of(replica).quantisation}, largest difference {worst:.1e}"


async def log_probabilities_of_the_prompt_are_the_references(subject: Subject) -> str:
    model = subject.runnable[0]
    replica = await subject.replica(model)
    if PROMPT_LOGPROBS in info_of(replica).refused:
        raise NotApplicable("its server gives no log probabilities of the prompt")
    tolerance = _tolerance(subject, replica)
    asks = [Ask(prompt(length, salt=60 + length), max_tokens=2, num_prompt_logprobs=NUM_TOP) for length in (1, 16, 120)]
    worst = 0.0
    for ask, one in zip(asks, await subject.run(replica, asks), strict=True):
        entries = one.prompt_logprobs[1:]
        if len(one.prompt_logprobs) != len(ask.prompt) or None in entries:
            raise CheckFailed(
                f"a prompt of {len(ask.prompt)} tokens got {len([e for e in entries if e])} log probabilities; "
                f"expected {len(ask.prompt) - 1}, of every token after the first (SamplingParams.num_prompt_logprobs)"
            )
        rows = subject.reference(model).logprobs(ask.prompt)
        for i, (row, entry, token_id) in enumerate(zip(rows, entries, ask.prompt[1:], strict=False), start=1):
            if entry is None or entry.token_id != token_id:
                raise CheckFailed(f"the log probability of prompt token {i} is that of another token")
            worst = max(worst, _apart(row, entry, f"prompt token {i} of {len(ask.prompt)}", tolerance))
    return f"largest difference {worst:.1e}"


async def the_prefix_cache_changes_no_token(subject: Subject) -> str:
    model, settings = subject.runnable[0], subject.precise
    asks = [Ask(prompt(96)[:length], max_tokens=10) for length in (96, 64, 49, 96)]
    replica = await subject.replica(model)
    first = await subject.run(replica, asks[:1])
    cached = first + await subject.run(replica, asks[1:])
    async with subject.own_replica(model, replace(settings, prefix_cache=False)) as plain:
        fresh = [(await subject.run(plain, [ask]))[0] for ask in asks]
    require_equal(cached, fresh, "with the prefix cache", "without it")
    num_cached = [one.num_cached_tokens for one in cached[1:]]
    if any(one.num_cached_tokens for one in fresh):
        raise CheckFailed("it reuses prefixes although it was told not to")
    if subject.capabilities.has_prefix_sharing and not num_cached[-1]:
        raise CheckFailed("it declares prefix sharing and reused nothing of a prompt that it had just computed")
    if not any(num_cached):
        raise NotApplicable("it shares no prefixes")
    return f"{num_cached} prompt tokens of {[len(ask.prompt) for ask in asks[1:]]} came from the cache"


async def nothing_leaks_between_requests(subject: Subject) -> str:
    model = subject.runnable[0]
    asks = [Ask(prompt(length, salt=10 + i), max_tokens=14) for i, length in enumerate((3, 20, 31, 47))]
    fresh = []
    async with subject.own_replica(model) as replica:
        for ask in asks:
            fresh += await subject.run(replica, [ask])
            replica.reset_prefix_cache()
        noise = [Ask(prompt(150, salt=50 + i), max_tokens=30) for i in range(12)]
        await subject.run(replica, noise)
        together = await subject.run(replica, [*noise[:3], *asks, *noise[3:6]])
    require_equal(together[3:-3], fresh, "beside and after other requests", "alone")
    return f"{len(asks)} sequences beside 6 others, after 12 others"


async def nothing_leaks_between_tenants(subject: Subject) -> str:
    ask = Ask(prompt(80, salt=20), tenant="one")
    async with subject.own_replica() as replica:
        (first,) = await subject.run(replica, [ask])
        (other,) = await subject.run(replica, [replace(ask, tenant="two")])
    if other.num_cached_tokens:
        raise CheckFailed(
            f"a second tenant was served {other.num_cached_tokens} prompt tokens from the first one's cache"
        )
    require_equal([other], [first], "the second tenant", "the first")
    return ""


async def a_seed_draws_the_same_whatever_the_batch(subject: Subject) -> str:
    ask = Ask(prompt(21, salt=30), max_tokens=16, temperature=1.0, seed=7)
    others = [Ask(prompt(9 + 8 * i, salt=31 + i), max_tokens=24, temperature=1.0, seed=100 + i) for i in range(5)]
    replica = await subject.replica()
    (alone,) = await subject.run(replica, [ask])
    first, *_ = await subject.run(replica, [ask, *others])
    *_, last = await subject.run(replica, [*others, ask])
    require_equal([first, last], [alone, alone], "in a batch", "alone")
    drawn = await subject.run(replica, [replace(ask, seed=seed) for seed in range(8)])
    if len({str(one.answer) for one in drawn}) == 1:
        raise CheckFailed("eight different seeds at temperature 1 draw the same tokens")
    return ""


CHECKS = (
    tokens_and_logprobs_are_the_references,
    the_quantisation_it_chooses_itself_is_close_to_the_reference,
    log_probabilities_of_the_prompt_are_the_references,
    the_prefix_cache_changes_no_token,
    nothing_leaks_between_requests,
    nothing_leaks_between_tenants,
    a_seed_draws_the_same_whatever_the_batch,
)


async def _compare(subject: Subject, replica: WatchedReplica, reference: Reference) -> float:
    """Largest difference of a log probability from the reference's, given the tokens that the backend itself drew."""
    tolerance = _tolerance(subject, replica)
    asks = [Ask(prompt(length, salt=i), num_logprobs=NUM_TOP) for i, length in enumerate(LENGTHS)]
    found = await subject.run(replica, asks)
    return max(_difference(ask, one, reference, tolerance) for ask, one in zip(asks, found, strict=True))


def _tolerance(subject: Subject, replica: WatchedReplica) -> float:
    """How far log probabilities may be off. Raises: NotApplicable where they cannot be judged."""
    if subject.capabilities.is_scripted:
        raise NotApplicable("its tokens are scripted and not computed from weights: it has no numerics to judge")
    quantisation = info_of(replica).quantisation
    tolerance = TOLERANCES.get(quantisation)
    if tolerance is None:
        known = ", ".join(TOLERANCES)
        raise NotApplicable(f'"{quantisation}" is too narrow to compare on a tiny random model; judged are {known}')
    return tolerance


def _difference(ask: Ask, found: Generated, reference: Reference, tolerance: float) -> float:
    if not found.token_ids:
        raise NotApplicable("it answers in text and does not name its tokens")
    rows = reference.logprobs([*ask.prompt, *found.token_ids[:-1]])[len(ask.prompt) - 1 :]
    where = f"after a prompt of {len(ask.prompt)} tokens, output token"
    worst = 0.0
    for i, (row, token_id) in enumerate(zip(rows, found.token_ids, strict=True)):
        behind = float(row.max() - row[token_id])
        if behind > tolerance:
            raise CheckFailed(
                f"{where} {i} is {token_id}; the reference's is {int(row.argmax())}, ahead by {behind:.3f} in log "
                f"probability (at most {tolerance:g} is rounding)"
            )
        worst = max(worst, behind)
    if len(found.logprobs) != len(found.token_ids):
        raise CheckFailed(f"{len(found.logprobs)} log probabilities for {len(found.token_ids)} tokens")
    for i, (row, entry) in enumerate(zip(rows, found.logprobs, strict=True)):
        worst = max(worst, _apart(row, entry, f"{where} {i}", tolerance))
    return worst


def _apart(row: Floats, entry: TokenLogprob, where: str, tolerance: float) -> float:
    """How far log probabilities are from the reference's. Raises: CheckFailed when it is more than rounding."""
    pairs = [(entry.token_id, entry.logprob), *entry.top]
    apart = max(abs(float(row[token_id]) - logprob) for token_id, logprob in pairs)
    if not np.isfinite(apart) or apart > tolerance:
        raise CheckFailed(f"{where}: a log probability is {apart:.3f} off (at most {tolerance:g} is rounding)")
    return apart
