"""The load of a trace: `load: {trace: FILE}` in mxn.yaml becomes the rate and the lengths of the file's requests."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from mxn.config.datasets import Ask, load_dataset
from mxn.config.yaml_file import Document, Plain
from mxn.errors import ConfigError

WINDOW_S = 60.0
"""A plan is made for the busiest so many seconds of a trace."""
_PROMPT_SHARES = (0.5, 0.8, 0.95, 1.0)
"""Prompts are told apart by these quantiles, so that the few long ones are not lost in a mean."""


def expand_traces(document: Document, folder: Path) -> None:
    """Puts rate and lengths beside every `trace` in the deployments' loads; notes a fault where that cannot be done.

    folder: what relative paths are relative to.
    """
    data = document.data
    expanded: set[int] = set()  # an alias in YAML is the same object again
    deployments = data.get("deployments") if isinstance(data, dict) else None
    for index, entry in enumerate(deployments if isinstance(deployments, list) else []):
        load = entry.get("load") if isinstance(entry, dict) else None
        if not isinstance(load, dict) or not isinstance(load.get("trace"), str) or id(load) in expanded:
            continue
        expanded.add(id(load))
        path = ("deployments", index, "load", "trace")
        given = [key for key in ("requests_per_s", "prompt_tokens", "output_tokens", "lengths") if key in load]
        if given:
            document.add_fault(path, f"expected a trace or {', '.join(given)}, got both")
            continue
        scale = load.get("trace_scale", 1.0)
        try:
            dataset = load_dataset(folder / str(load["trace"]))
            rate, lengths = trace_load(dataset.asks)
        except ConfigError as error:
            document.add_fault(path, f"expected a trace with arrival times and lengths: {error}")
            rate, lengths = 1.0, [{"share": 1.0, "prompt_tokens": 1, "output_tokens": 1}]  # one fault is enough
        load["requests_per_s"] = rate * (scale if isinstance(scale, int | float) and scale > 0 else 1.0)
        load["lengths"] = lengths


def trace_load(asks: Sequence[Ask]) -> tuple[float, list[Plain]]:
    """Requests per second in the busiest window, and the lengths of all requests as parts with shares.

    Raises: ConfigError when requests lack times or lengths.
    """
    times, sizes = [], []
    for ask in asks:
        if ask.at_s is None or ask.prompt_tokens is None or ask.output_tokens is None:
            raise ConfigError("its requests have no arrival time, or no number of prompt and output tokens")
        times.append(ask.at_s)
        sizes.append((ask.prompt_tokens, ask.output_tokens))
    times.sort()
    window_s = min(WINDOW_S, times[-1] - times[0])
    if window_s <= 0:
        raise ConfigError("all its requests come at one moment, so it has no rate")
    busiest = max(index + 1 - bisect_left(times, at_s - window_s) for index, at_s in enumerate(times))
    return busiest / window_s, _parts(sorted(sizes))


def _parts(sizes: list[tuple[int, int]]) -> list[Plain]:
    """Means of groups: by quantiles of the prompt, and in each by short and long answers."""
    parts: list[Plain] = []
    begin = 0
    for share in _PROMPT_SHARES:
        end = round(share * len(sizes))
        group = sorted(sizes[begin:end], key=lambda size: size[1])
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            if half:
                parts.append(
                    {
                        "share": len(half) / len(sizes),
                        "prompt_tokens": round(statistics.mean(prompt for prompt, _ in half)),
                        "output_tokens": round(statistics.mean(output for _, output in half)),
                    }
                )
        begin = end
    return parts
