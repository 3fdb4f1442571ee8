"""The figures that inference gateways and autoscalers read from a vLLM server, under vLLM's names.

The names, meanings and the label `model_name` are those of vLLM's /metrics and of the model server protocol of the
Gateway API Inference Extension. `gpu_cache_usage_perc` is what older readers know `kv_cache_usage_perc` as. Buckets of
histograms are mxn's own. What mxn does not have (LoRA adapters, swapping) is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mxn.server.fleet_metrics import kv_usage

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

    from mxn.engine.stats import EngineStats
    from mxn.fleet.fleet import Fleet

_LABELS = ["model_name"]

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_requests_running", "Sequences that take part in steps.", lambda stats: stats.num_running),
    ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 is all of it.", kv_usage),
    ("vllm:gpu_cache_usage_perc", "As vllm:kv_cache_usage_perc.", kv_usage),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens.", lambda stats: stats.num_prompt_tokens),
    ("vllm:generation_tokens", "Tokens that were drawn.", lambda stats: stats.num_output_tokens),
    ("vllm:num_preemptions", "Sequences put back into the queue.", lambda stats: stats.num_preemptions),
    ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", lambda stats: stats.num_prompt_tokens),
    ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", lambda stats: stats.num_cached_tokens),
)


class VllmAliases(Collector):
    """One series per deployment and name, all its replicas together.

    requests: mxn's own counter by model and outcome. histograms: mxn's own by vLLM's name.
    """

    def __init__(self, fleet: Fleet, requests: Counter, histograms: Mapping[str, Histogram]) -> None:
        self._fleet = fleet
        self._requests = requests
        self._histograms = histograms

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = [(deployment.name, deployment.stats) for deployment in self._fleet.deployments]
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences in the queue.", labels=_LABELS)
        for deployment in self._fleet.deployments:
            waiting.add_metric([deployment.name], deployment.num_waiting + deployment.stats.num_waiting)
        yield waiting
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for model, values in stats:
                gauge.add_metric([model], value(values))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for model, values in stats:
                counter.add_metric([model], value(values))
            yield counter
        yield self._cache_config()
        for name, histogram in self._histograms.items():
            yield _renamed(histogram, name)
        yield _finished(self._requests)

    def _cache_config(self) -> Metric:
        labels = [*_LABELS, "block_size", "num_gpu_blocks"]
        family = GaugeMetricFamily("vllm:cache_config_info", "Blocks of the KV cache; always 1.", labels=labels)
        for deployment in self._fleet.deployments:
            info = deployment.info
            if info is not None:
                num_blocks = deployment.stats.num_total_blocks
                family.add_metric([deployment.name, str(info.block_size), str(num_blocks)], 1)
        return family


def _renamed(histogram: Histogram, name: str) -> Metric:
    [family] = histogram.collect()
    renamed = Metric(name, family.documentation, "histogram")
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            suffix = sample.name.removeprefix(family.name)
            renamed.add_sample(
                name + suffix, {"model_name": sample.labels["model"], **_le(sample.labels)}, sample.value
            )
    return renamed


def _le(labels: dict[str, str]) -> dict[str, str]:
    return {"le": labels["le"]} if "le" in labels else {}


def _finished(requests: Counter) -> Metric:
    """Requests that were answered to the end, by finish reason."""
    name = "vllm:request_success"
    family = CounterMetricFamily(name, "Requests answered to the end.", labels=[*_LABELS, "finished_reason"])
    for sample in (sample for found in requests.collect() for sample in found.samples):
        if sample.name.endswith("_total") and sample.labels["outcome"] in ("stop", "length"):
            family.add_metric([sample.labels["model"], sample.labels["outcome"]], sample.value)
    return family
