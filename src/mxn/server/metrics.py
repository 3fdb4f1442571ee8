"""Prometheus metrics of one gateway, in a registry of its own.

Labels take values from fixed sets only (deployments, replicas, chips, routes, statuses), so a client cannot add series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from mxn.server.fleet_metrics import FleetCollector
from mxn.server.vllm_metrics import VllmAliases

if TYPE_CHECKING:
    from mxn.fleet.fleet import Fleet

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)
_E2E_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_ENERGY_J = (0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


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
    """Every metric of one gateway. has_vllm_names: some are told under vLLM's names too, see `vllm_metrics`."""

    def __init__(self, fleet: Fleet, *, has_vllm_names: bool = False) -> None:
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
        registry.register(FleetCollector(fleet))
        ProcessCollector(registry=registry)
        if has_vllm_names:
            histograms = {
                "vllm:time_to_first_token_seconds": self.ttft_s,
                "vllm:inter_token_latency_seconds": self.itl_s,
                "vllm:time_per_output_token_seconds": self.itl_s,
                "vllm:e2e_request_latency_seconds": self.e2e_s,
                "vllm:request_prompt_tokens": self.prompt_length,
                "vllm:request_generation_tokens": self.output_length,
            }
            registry.register(VllmAliases(fleet, self.requests, histograms))

    def count_http(self, route: str, method: str, status: int) -> None:
        """Counts one HTTP request; `route` is a path template of the app or "unknown"."""
        self.http.labels(route, method if method in _METHODS else "other", str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
