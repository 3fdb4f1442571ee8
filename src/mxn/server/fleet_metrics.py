"""Gauges and counters of deployments, replicas and chips, read from the fleet when Prometheus asks.

Labels: model, replica (a placement's id, the same across restarts), chip, state, phase of a start. A fleet of D
deployments and R replicas makes at most 12 D + 33 R series here, whatever clients send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mxn import __version__
from mxn.engine.messages import ReplicaState

if TYPE_CHECKING:
    from mxn.engine.messages import ReplicaInfo
    from mxn.engine.stats import EngineStats
    from mxn.fleet.deployment import Deployment
    from mxn.fleet.fleet import Fleet
    from mxn.fleet.keeper import Keeper

_GAUGES = (
    ("num_running", "mxn_sequences_running", "Sequences that take part in steps."),
    ("num_waiting", "mxn_sequences_waiting", "Sequences in a replica's queue."),
    ("num_free_blocks", "mxn_kv_blocks_free", "KV blocks that hold nothing or only reusable prefixes."),
    ("num_total_blocks", "mxn_kv_blocks", "KV blocks of the cache."),
)
_COUNTERS = (
    ("num_steps", "mxn_engine_steps", "Steps of the engine."),
    ("num_started", "mxn_engine_sequences_started", "Sequences that left the queue."),
    ("queue_s", "mxn_engine_queue_seconds", "Time that these had spent in the queue."),
    ("num_preemptions", "mxn_engine_preemptions", "Sequences put back into the queue for lack of KV blocks."),
    ("num_prompt_tokens", "mxn_engine_prompt_tokens", "Prompt tokens of sequences that were started."),
    ("num_cached_tokens", "mxn_engine_cached_tokens", "Prompt tokens that came out of the prefix cache."),
    ("num_computed_tokens", "mxn_engine_computed_tokens", "Tokens whose KV was computed."),
    ("num_output_tokens", "mxn_engine_output_tokens", "Tokens that were drawn."),
    ("num_finished", "mxn_engine_sequences_finished", "Sequences that ended by themselves."),
    ("num_aborted", "mxn_engine_sequences_aborted", "Sequences ended from outside: disconnects and stop strings."),
    ("num_failed", "mxn_engine_sequences_failed", "Sequences that ended with an error."),
    ("busy_s", "mxn_engine_busy_seconds", "Time spent in steps."),
)


class FleetCollector(Collector):
    """Everything that is told about a fleet apart from requests."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        deployments = self._fleet.deployments
        build = GaugeMetricFamily("mxn_build_info", "Version of mxn; always 1.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield from _deployments(deployments)
        keepers = [(deployment.name, keeper) for deployment in deployments for keeper in deployment.keepers]
        yield from _replicas(keepers)
        running = [
            (model, keeper, keeper.replica.info, keeper.replica.stats)
            for model, keeper in keepers
            if keeper.replica is not None and keeper.replica.info is not None
        ]
        yield _infos(running)
        yield _starts(running)
        yield from _engines((model, keeper.id, stats) for model, keeper, _, stats in running)
        yield _energy(running)


_Running = list[tuple[str, "Keeper", "ReplicaInfo", "EngineStats"]]


def _deployments(deployments: list[Deployment]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("mxn_deployment_ready", "1 when requests are served.", labels=["model"])
    stalled = GaugeMetricFamily("mxn_deployment_stalled", "1 when work is held without a step.", labels=["model"])
    waiting = GaugeMetricFamily(
        "mxn_deployment_waiting", "Sequences in the deployment's line, which no replica has yet.", labels=["model"]
    )
    restarts = CounterMetricFamily("mxn_deployment_restarts", "Starts of replicas beyond the first.", labels=["model"])
    moves = CounterMetricFamily(
        "mxn_deployment_moves", "Sequences that lost their replica on the way.", labels=["model"]
    )
    replicas = GaugeMetricFamily("mxn_replicas", "Replicas in each state.", labels=["model", "state"])
    for deployment in deployments:
        name = deployment.name
        ready.add_metric([name], float(deployment.is_ready))
        stalled.add_metric([name], float(deployment.is_stalled))
        waiting.add_metric([name], deployment.num_waiting)
        restarts.add_metric([name], deployment.num_restarts)
        moves.add_metric([name], deployment.num_moves)
        states = Counter(keeper.state for keeper in deployment.keepers)
        for state in get_args(ReplicaState):
            replicas.add_metric([name, state], states[state])
    yield from (ready, stalled, waiting, restarts, moves, replicas)


def _replicas(keepers: list[tuple[str, Keeper]]) -> Iterator[Metric]:
    labels = ["model", "replica"]
    ready = GaugeMetricFamily("mxn_replica_ready", "1 when the replica takes sequences.", labels=labels)
    for model, keeper in keepers:
        ready.add_metric([model, keeper.id], float(keeper.is_ready))
    yield ready


def _infos(running: _Running) -> Metric:
    facts = ["backend", "attention", "quantisation", "program", "device", "block_size", "max_context"]
    family = GaugeMetricFamily(
        "mxn_replica_info", "How a replica runs; always 1.", labels=["model", "replica", "chips", *facts]
    )
    for model, keeper, info, _ in running:
        chips = "+".join(chip.uid for chip in keeper.placement.chips)
        family.add_metric([model, keeper.id, chips, *(str(getattr(info, fact)) for fact in facts)], 1)
    return family


def _starts(running: _Running) -> Metric:
    family = GaugeMetricFamily(
        "mxn_replica_start_seconds",
        "What the newest start took, phase by phase; together the time from launch to ready.",
        labels=["model", "replica", "phase"],
    )
    for model, keeper, info, _ in running:
        for phase, seconds in info.load_s.items():
            family.add_metric([model, keeper.id, phase], seconds)
    return family


def _engines(engines: Iterable[tuple[str, str, EngineStats]]) -> Iterator[Metric]:
    labels, engines = ["model", "replica"], list(engines)
    for field, name, text in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for model, replica, stats in engines:
            gauge.add_metric([model, replica], getattr(stats, field))
        yield gauge
    usage = GaugeMetricFamily("mxn_kv_cache_usage_ratio", "Share of KV blocks that sequences hold.", labels=labels)
    for model, replica, stats in engines:
        usage.add_metric([model, replica], kv_usage(stats))
    yield usage
    for field, name, text in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=labels)
        for model, replica, stats in engines:
            counter.add_metric([model, replica], getattr(stats, field))
        yield counter


def kv_usage(stats: EngineStats) -> float:
    """Share of the KV blocks that sequences hold; 0 where mxn divides no cache."""
    return 1 - stats.num_free_blocks / stats.num_total_blocks if stats.num_total_blocks else 0.0


def _energy(running: _Running) -> Metric:
    """Each replica's joules since it started, by who they went to; chips that nothing meters are left out.

    The replicas on a shared chip each answer for a share of it, so the sum over all labels is the chip's.
    """
    family = CounterMetricFamily(
        "mxn_chip_energy_joules",
        "Energy of chips, charged to requests or idle; undivided where a server hides its steps.",
        labels=["chip", "model", "replica", "source", "provenance", "use"],
    )
    for model, keeper, info, stats in running:
        if stats.chip_energy_j is None:
            continue
        chip = "+".join(chip.uid for chip in keeper.placement.chips)
        labels = [chip, model, keeper.id, info.power_source, info.power_provenance]
        if stats.request_energy_j is None:
            family.add_metric([*labels, "undivided"], stats.chip_energy_j)
        else:
            family.add_metric([*labels, "requests"], stats.request_energy_j)
            family.add_metric([*labels, "idle"], stats.idle_energy_j or 0.0)
    return family
