"""Prometheus metrics of one gateway, in a registry of its own.

Labels take values from fixed sets only (deployments, routes, statuses), so a client cannot add series.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from mxn import __version__
from mxn.engine.stats import EngineStats

if TYPE_CHECKING:
    from mxn.fleet.deployment import Deployment
    from mxn.fleet.fleet import Fleet

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)
_E2E_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_ENERGY_J = (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_GAUGES = (
    ("num_running", "mxn_sequences_running", "Sequences that take part in steps."),
    ("num_waiting", "mxn_sequences_waiting", "Sequences in the queue."),
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


class ModelMetrics:
    """One deployment's request metrics, labels already bound."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.ttft_s = metrics.ttft_s.labels(model)
        self.itl_s = metrics.itl_s.labels(model)
        self.e2e_s = metrics.e2e_s.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.output_tokens = metrics.output_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.prompt_length = metrics.prompt_length.labels(model)
        self.output_length = metrics.output_length.labels(model)
        self.energy_j = metrics.energy_j.labels(model)
        self._requests = metrics.requests
        self._model = model

    def count(self, outcome: str) -> None:
        """Counts one request that ended as `outcome`: stop, length, client_gone, slow_client, refused or failed."""
        self._requests.labels(self._model, outcome).inc()


class Metrics:
    """Every metric of one gateway."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        of_model = ("model",)
        registry = self.registry
        self.ttft_s = Histogram(
            "mxn_time_to_first_token_seconds", "Arrival to first token.", of_model, registry=registry, buckets=_TTFT_S
        )
        self.itl_s = Histogram(
            "mxn_inter_token_latency_seconds", "Gap between tokens.", of_model, registry=registry, buckets=_ITL_S
        )
        self.e2e_s = Histogram(
            "mxn_request_duration_seconds", "Arrival to last token.", of_model, registry=registry, buckets=_E2E_S
        )
        self.prompt_length = Histogram(
            "mxn_request_prompt_tokens", "Prompt tokens per request.", of_model, registry=registry, buckets=_TOKENS
        )
        self.output_length = Histogram(
            "mxn_request_output_tokens", "Output tokens per request.", of_model, registry=registry, buckets=_TOKENS
        )
        self.energy_j = Histogram(
            "mxn_request_energy_joules",
            "Energy per request, as charged to it by the engine.",
            of_model,
            registry=registry,
            buckets=_ENERGY_J,
        )
        self.prompt_tokens = Counter(
            "mxn_prompt_tokens", "Prompt tokens of answered requests.", of_model, registry=registry
        )
        self.output_tokens = Counter("mxn_output_tokens", "Tokens given to clients.", of_model, registry=registry)
        self.cached_tokens = Counter(
            "mxn_cached_tokens",
            "Prompt tokens of answered requests found in the prefix cache.",
            of_model,
            registry=registry,
        )
        self.requests = Counter(
            "mxn_requests", "Generation requests by outcome.", ("model", "outcome"), registry=registry
        )
        self.http = Counter("mxn_http_requests", "HTTP requests.", ("route", "method", "status"), registry=registry)
        self.active = Gauge("mxn_http_requests_active", "HTTP requests in work.", registry=registry)
        registry.register(_FleetCollector(fleet))
        ProcessCollector(registry=registry)

    def count_http(self, route: str, method: str, status: int) -> None:
        """Counts one HTTP request; `route` is a path template of the app or "unknown"."""
        self.http.labels(route, method if method in _METHODS else "other", str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _FleetCollector(Collector):
    """Reads the deployments' own gauges and counters when asked."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        deployments = self._fleet.deployments
        build = GaugeMetricFamily("mxn_build_info", "Version of mxn; always 1.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield _info(deployments)
        ready = GaugeMetricFamily("mxn_deployment_ready", "1 when requests are served.", labels=["model"])
        stalled = GaugeMetricFamily("mxn_deployment_stalled", "1 when work is held without a step.", labels=["model"])
        for deployment in deployments:
            ready.add_metric([deployment.name], float(deployment.is_ready))
            stalled.add_metric([deployment.name], float(deployment.is_stalled))
        yield ready
        yield stalled
        stats = [(deployment.name, deployment.stats) for deployment in deployments]
        yield from _stats(stats)
        yield _chip_energy(deployments)


def _info(deployments: list[Deployment]) -> Metric:
    labels = ["model", "backend", "attention", "quantisation", "device", "block_size", "max_context"]
    family = GaugeMetricFamily("mxn_deployment_info", "How a deployment runs; always 1.", labels=labels)
    for deployment in deployments:
        info = deployment.info
        if info is not None:
            facts = (info.backend, info.attention, info.quantisation, info.device, info.block_size, info.max_context)
            family.add_metric([deployment.name, *map(str, facts)], 1)
    return family


def _chip_energy(deployments: list[Deployment]) -> Metric:
    """Each chip's joules since its replicas started, by who they went to; chips that nothing meters are left out.

    The deployments of a shared chip each answer for an equal share of it, so the sum over all labels is the chip's.
    """
    family = CounterMetricFamily(
        "mxn_chip_energy_joules",
        "Energy of chips, charged to requests or idle; undivided where a server hides its steps.",
        labels=["chip", "model", "source", "provenance", "use"],
    )
    for deployment in deployments:
        info, stats = deployment.info, deployment.stats
        if info is None or stats.chip_energy_j is None:
            continue
        chip = "+".join(chip.uid for chip in deployment.chips)
        labels = [chip, deployment.name, info.power_source, info.power_provenance]
        if stats.request_energy_j is None:
            family.add_metric([*labels, "undivided"], stats.chip_energy_j)
        else:
            family.add_metric([*labels, "requests"], stats.request_energy_j)
            family.add_metric([*labels, "idle"], stats.idle_energy_j or 0.0)
    return family


def _stats(stats: list[tuple[str, EngineStats]]) -> Iterator[Metric]:
    for field, name, text in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=["model"])
        for model, values in stats:
            gauge.add_metric([model], getattr(values, field))
        yield gauge
    usage = GaugeMetricFamily("mxn_kv_cache_usage_ratio", "Share of KV blocks that sequences hold.", labels=["model"])
    for model, values in stats:
        total = values.num_total_blocks
        usage.add_metric([model], 1 - values.num_free_blocks / total if total else 0.0)
    yield usage
    for field, name, text in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=["model"])
        for model, values in stats:
            counter.add_metric([model], getattr(values, field))
        yield counter
