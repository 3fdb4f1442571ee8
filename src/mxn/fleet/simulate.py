"""Replays a trace through a plan on simulated chips: the product's step scheduler, cache and router, a model of time.

Each replica has a clock of its own. Between two events (a request comes, a sequence ends) nothing changes for sequences
that decode, so those steps are taken together: an hour of a trace takes seconds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxn.backends.base import PagedKV, SlotKV
from mxn.config.datasets import MOONCAKE_BLOCK_TOKENS, Ask
from mxn.config.demand import SloConfig
from mxn.core.request import SamplingParams, SequenceRequest
from mxn.engine.paged import BlockPlacement
from mxn.engine.placement import Placement
from mxn.engine.scheduler import SchedulerLimits, StepScheduler
from mxn.engine.sequence import Sequence as TokenSequence
from mxn.engine.slots import SlotPlacement
from mxn.errors import ConfigError
from mxn.fleet import router
from mxn.fleet.cells import Candidate, planned_context
from mxn.fleet.fit import backend_named
from mxn.fleet.plan import Solved
from mxn.fleet.work import Work

_BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedDeployment:
    """What became of one deployment's requests. Latencies are of those that were served.

    refused: longer than the context. lost: no replica serves the deployment.
    slo_attained: share of all requests that were within the limits; None where it has none.
    """

    name: str
    requests: int
    served: int
    refused: int
    lost: int
    replicas: int
    slo_attained: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    output_tokens: int
    preemptions: int
    utilisation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """A replay. seconds: from the first request to the last token. watts: of all replicas, None when nobody knows them.

    calibration: what the times rest on, as in the plan.
    """

    calibration: str
    seconds: float
    seed: int
    deployments: tuple[SimulatedDeployment, ...]
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    watts: float | None
    joules: float | None
    tokens_per_watt: float | None


@dataclass(slots=True)
class _Request:
    """One request on its way. Times are simulated seconds."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    first_s: float | None = None
    end_s: float | None = None


def simulate(
    solved: Solved,
    traces: Mapping[str, Sequence[Ask]],
    *,
    seed: int = 0,
    limit_s: float = 3600.0,
    rate_scale: float = 1.0,
) -> Simulation:
    """What the plan's replicas make of traces.

    Args: traces: by deployment name; "" is dealt out among the other deployments at random, by their planned load.
        limit_s: of each trace's beginning, after `rate_scale` was applied to its times.
    Raises: ConfigError for a trace without times or lengths, or of a deployment that the plan does not have.
    """
    arrivals = sorted(_arrivals(solved, traces, seed, limit_s, rate_scale), key=lambda item: item[0])
    has_shared = any(ask.block_ids for _, _, ask in arrivals)
    fleet = {name: _replicas(name, solved, prefix_cache=has_shared) for name in solved.posed.deployments}
    slos = {name: deployment.slo for name, deployment in solved.posed.deployments.items()}
    asked: dict[str, list[_Request]] = {name: [] for name in fleet}
    refused = dict.fromkeys(fleet, 0)
    contexts = _contexts(solved)
    for number, (at_s, name, ask) in enumerate(arrivals):
        prompt, output = ask.prompt_tokens or 1, ask.output_tokens or 1
        request = _Request(at_s=at_s, prompt_tokens=prompt, output_tokens=output)
        asked[name].append(request)
        if prompt + output > contexts[name]:
            refused[name] += 1
            continue
        replicas = fleet[name]
        for replica in replicas:
            replica.advance(at_s)
        if replicas:
            _choose(replicas, request, slos[name]).add(number, request, _prompt(number, ask))
    for replicas in fleet.values():
        for replica in replicas:
            replica.advance(float("inf"))
    return _summary(solved, fleet, asked, refused, slos, seed)


class _Replica:
    """One simulated engine: the real scheduler over a real cache, and a clock that steps move."""

    def __init__(self, candidate: Candidate, placement: Placement, limits: SchedulerLimits) -> None:
        self.candidate = candidate
        self.now_s = 0.0
        self.busy_s = 0.0
        self.joules = 0.0
        self.work_tokens = 0
        self.requests: dict[int, _Request] = {}
        self.scheduler = StepScheduler(placement, limits)
        self._placement = placement
        self._wanted: dict[int, int] = {}

    def add(self, number: int, request: _Request, prompt: list[int]) -> None:
        self.now_s = max(self.now_s, request.at_s)
        sampling = SamplingParams(max_tokens=request.output_tokens)
        asked = SequenceRequest(seq_id=number, prompt_token_ids=prompt, sampling=sampling)
        sequence = TokenSequence(asked, arrival=number, seed=0, root=self._placement.root(""))
        self.requests[number] = request
        self.work_tokens += request.prompt_tokens + request.output_tokens
        self.scheduler.add(sequence)

    def advance(self, until_s: float) -> None:
        """Runs steps until the clock is there or nothing is left to do; a step that began before may end after."""
        while self.requests and self.now_s < until_s:
            if not self._decode_together(until_s):
                self._step()
        self.now_s = max(self.now_s, until_s) if until_s < float("inf") else self.now_s

    def _step(self) -> None:
        """One step as the scheduler plans it."""
        plan = self.scheduler.schedule()
        self._placement.take_copies()
        if not plan:
            raise ConfigError("a request needs more KV cache than its replica has")
        shape, chunks, decodes = self.candidate.shape, [], []
        num_first = 0
        for scheduled in plan:
            sequence = scheduled.sequence
            if sequence.num_remaining_tokens == 1 and sequence.num_output_tokens:
                decodes.append((sequence.num_computed_tokens, 1))
            else:
                chunks.append((sequence.num_computed_tokens, scheduled.num_tokens))
                num_first += scheduled.num_tokens == sequence.num_remaining_tokens
        prefill = shape.step(chunks, num_first) if chunks else Work()
        decode = shape.step(decodes, len(decodes)) if decodes else Work()
        self._pass(self.candidate.engine.times.step_s(prefill, decode), is_prefill=bool(chunks))
        for scheduled in plan:
            is_drawn = scheduled.num_tokens == scheduled.sequence.num_remaining_tokens
            self._commit(scheduled.sequence, scheduled.num_tokens)
            if is_drawn:
                self._draw(scheduled.sequence, 1)

    def _decode_together(self, until_s: float) -> bool:
        """Takes as many steps at once as change nothing but lengths; False when even one is not like that."""
        running = self.scheduler.running
        if self.scheduler.waiting or not running or any(s.num_remaining_tokens != 1 for s in running):
            return False
        if any(s.num_output_tokens == 0 for s in running):
            return False
        batch, times, shape = len(running), self.candidate.engine.times, self.candidate.shape
        steps = min(self._num_missing(sequence) for sequence in running)
        context = sum(sequence.num_computed_tokens for sequence in running) / batch
        step_s = times.decode.seconds(shape.decode(batch, context))
        if until_s < float("inf"):
            steps = min(steps, int((until_s - self.now_s) / step_s))
        rooms = sum(max(0, self._placement.num_missing(sequence, steps)) for sequence in running)
        if steps < 2 or rooms > self._placement.num_free:
            return False
        self._pass(steps * times.decode.seconds(shape.decode(batch, context + (steps - 1) / 2)), is_prefill=False)
        for sequence in list(running):
            self._placement.reserve(sequence, steps)
            sequence.token_ids.extend([0] * (steps - 1))
            self._commit(sequence, steps)
            self._draw(sequence, steps)
        return True

    def _commit(self, sequence: TokenSequence, num_tokens: int) -> None:
        sequence.num_computed_tokens += num_tokens
        self.scheduler.commit(sequence)

    def _num_missing(self, sequence: TokenSequence) -> int:
        return sequence.request.sampling.max_tokens - sequence.num_output_tokens

    def _draw(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Adds the newest token; `num_tokens` were drawn since the last time."""
        sequence.token_ids.append(0)
        request = self.requests[sequence.seq_id]
        if request.first_s is None:
            request.first_s = self.now_s
            self.work_tokens -= request.prompt_tokens
        self.work_tokens -= num_tokens
        if self._num_missing(sequence) <= 0:
            request.end_s = self.now_s
            self.scheduler.remove(sequence)
            del self.requests[sequence.seq_id]

    def _pass(self, seconds: float, *, is_prefill: bool) -> None:
        engine = self.candidate.engine
        self.now_s += seconds
        self.busy_s += seconds
        if engine.idle_w is not None and engine.full_w is not None:
            share = engine.prefill_power_share if is_prefill else engine.decode_power_share
            self.joules += engine.num_chips * share * max(0.0, engine.full_w - engine.idle_w) * seconds


def _replicas(name: str, solved: Solved, *, prefix_cache: bool) -> list[_Replica]:
    """The deployment's replicas, each with a cache as large as its fit leaves room for.

    prefix_cache: off where no prompts of the traces begin alike, because hashing them would be for nothing.
    """
    deployment, inventory, found = solved.posed.deployments[name], solved.inventory, []
    context = _contexts(solved)[name]
    for option, count in solved.replicas[name].items():
        candidate = solved.posed.options[name][option]
        backend, chip = candidate.cell.backend, inventory.kinds[candidate.cell.kind].chip
        kv, has_mixed_steps = "paged", True
        if backend not in inventory.declared:
            can = backend_named(backend).capabilities(chip)
            kv, has_mixed_steps = can.kv, can.has_mixed_steps
        limits = SchedulerLimits(
            max_num_seqs=deployment.max_num_seqs,
            max_step_tokens=deployment.max_step_tokens,
            has_mixed_steps=has_mixed_steps,
        )
        chips = max(1.0, candidate.cell.chips)
        tokens = int(candidate.fit.kv_room_bytes * chips / max(1.0, candidate.shape.kv_bytes_per_token))
        tokens = max(context, min(tokens, deployment.max_num_seqs * context))
        for _ in range(count):
            cache = _placement(kv, tokens, context, deployment.max_num_seqs, prefix_cache and deployment.prefix_cache)
            found.append(_Replica(candidate, cache, limits))
    return found


def _placement(kv: str, tokens: int, context: int, max_num_seqs: int, prefix_cache: bool) -> Placement:
    if kv == "slots":
        slots = max(1, min(tokens // context, max_num_seqs))
        return SlotPlacement(SlotKV(num_slots=slots, max_tokens=context), "", prefix_cache=prefix_cache)
    blocks = -(-tokens // _BLOCK_TOKENS)
    return BlockPlacement(PagedKV(num_blocks=blocks, block_size=_BLOCK_TOKENS), "", prefix_cache=prefix_cache)


def _choose(replicas: Sequence[_Replica], request: _Request, slo: SloConfig) -> _Replica:
    """The product's router on what it would know of these replicas."""
    if len(replicas) == 1:
        return replicas[0]
    limit_s = None if slo.ttft_ms is None else slo.ttft_ms / 1e3
    work = router.Work(
        prompt_tokens=request.prompt_tokens, output_tokens=float(request.output_tokens), ttft_slo_s=limit_s
    )
    return replicas[router.choose([_candidate(replica, request) for replica in replicas], work)]


def _candidate(replica: _Replica, request: _Request) -> router.Candidate:
    found = replica.candidate.prediction
    prompt_s = replica.candidate.engine.times.prefill.seconds(replica.candidate.shape.prefill(request.prompt_tokens))
    return router.Candidate(
        work_tokens=float(replica.work_tokens),
        tokens_per_s=found.output_tokens_per_s,
        prompt_token_s=prompt_s / request.prompt_tokens,
        joules_per_token=1 / found.tokens_per_watt if found.tokens_per_watt else None,
    )


def _arrivals(
    solved: Solved, traces: Mapping[str, Sequence[Ask]], seed: int, limit_s: float, rate_scale: float
) -> list[tuple[float, str, Ask]]:
    """(seconds, deployment, request) of all traces."""
    deployments = solved.posed.deployments
    unknown = [name for name in traces if name and name not in deployments]
    if unknown:
        raise ConfigError(f'no deployment is called "{unknown[0]}"; there are: {", ".join(deployments)}')
    others = [name for name in deployments if name not in traces]
    weights = [load.requests_per_s if (load := deployments[name].load) else 0.0 for name in others]
    if "" in traces and not sum(weights):
        raise ConfigError("the trace is for deployments with a load, and none is left that has one")
    dice, found = random.Random(seed), []
    for name, asks in traces.items():
        for ask in asks:
            if ask.at_s is None or ask.prompt_tokens is None or ask.output_tokens is None:
                raise ConfigError("a simulation needs a trace with arrival times, prompt tokens and output tokens")
            at_s = ask.at_s / rate_scale
            if at_s <= limit_s:
                found.append((at_s, name or dice.choices(others, weights)[0], ask))
    if not found:
        raise ConfigError(f"no request of the trace comes within {limit_s:g} s")
    return found


def _contexts(solved: Solved) -> dict[str, int]:
    found = {}
    for name, deployment in solved.posed.deployments.items():
        spec = solved.posed.cards[name].architecture.spec()
        found[name] = planned_context(deployment, spec) if spec else 0
    return found


def _prompt(number: int, ask: Ask) -> list[int]:
    """Token ids of a prompt: those of the blocks it shares with others, then its own. Azure's traces share nothing."""
    length = ask.prompt_tokens or 1
    if not ask.block_ids:
        return [number + 1] * length
    shared = [token for block in ask.block_ids for token in range(block * 1024, block * 1024 + MOONCAKE_BLOCK_TOKENS)]
    return (shared + [-number - 1] * length)[:length]


def _summary(
    solved: Solved,
    fleet: Mapping[str, Sequence[_Replica]],
    asked: Mapping[str, Sequence[_Request]],
    refused: Mapping[str, int],
    slos: Mapping[str, SloConfig],
    seed: int,
) -> Simulation:
    everything = [request for requests in asked.values() for request in requests]
    begin_s = min(request.at_s for request in everything)
    end_s = max((request.end_s or request.at_s) for request in everything)
    seconds = max(1e-9, end_s - begin_s)
    served = [request for request in everything if request.end_s is not None]
    joules: float | None = 0.0
    for replica in (replica for replicas in fleet.values() for replica in replicas):
        engine = replica.candidate.engine
        if engine.idle_w is None or engine.full_w is None or joules is None:
            joules = None
        else:
            joules += replica.joules + engine.num_chips * engine.idle_w * seconds
    output = sum(request.output_tokens for request in served)
    return Simulation(
        calibration=solved.plan.calibration,
        seconds=seconds,
        seed=seed,
        deployments=tuple(_of(name, fleet[name], asked[name], refused[name], slos[name], seconds) for name in fleet),
        output_tokens_per_s=output / seconds,
        prompt_tokens_per_s=sum(request.prompt_tokens for request in served) / seconds,
        watts=None if joules is None else joules / seconds,
        joules=joules,
        tokens_per_watt=output / joules if joules else None,
    )


def _of(
    name: str,
    replicas: Sequence[_Replica],
    requests: Sequence[_Request],
    num_refused: int,
    slo: SloConfig,
    seconds: float,
) -> SimulatedDeployment:
    served = [request for request in requests if request.end_s is not None]
    ttfts = sorted(_ttft_s(request) for request in served)
    tpots = sorted(tpot for request in served if (tpot := _tpot_s(request)) is not None)
    within = sum(_is_within(request, slo) for request in served)
    has_limit = slo.ttft_ms is not None or slo.tpot_ms is not None
    return SimulatedDeployment(
        name=name,
        requests=len(requests),
        served=len(served),
        refused=num_refused,
        lost=len(requests) - len(served) - num_refused,
        replicas=len(replicas),
        slo_attained=within / len(requests) if has_limit and requests else None,
        ttft_p50_s=_quantile(ttfts, 0.5),
        ttft_p95_s=_quantile(ttfts, 0.95),
        ttft_p99_s=_quantile(ttfts, 0.99),
        tpot_p50_s=_quantile(tpots, 0.5),
        tpot_p95_s=_quantile(tpots, 0.95),
        output_tokens=sum(request.output_tokens for request in served),
        preemptions=sum(replica.scheduler.num_preemptions for replica in replicas),
        utilisation=sum(replica.busy_s for replica in replicas) / (seconds * len(replicas)) if replicas else 0.0,
    )


def _ttft_s(request: _Request) -> float:
    return (request.first_s or 0.0) - request.at_s


def _tpot_s(request: _Request) -> float | None:
    if request.output_tokens < 2 or request.end_s is None or request.first_s is None:
        return None
    return (request.end_s - request.first_s) / (request.output_tokens - 1)


def _is_within(request: _Request, slo: SloConfig) -> bool:
    tpot_s = _tpot_s(request)
    if slo.ttft_ms is not None and 1e3 * _ttft_s(request) > slo.ttft_ms:
        return False
    return slo.tpot_ms is None or tpot_s is None or 1e3 * tpot_s <= slo.tpot_ms


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that so large a share does not exceed; None of nothing."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else None
