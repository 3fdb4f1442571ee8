"""Two reports side by side: ratios with intervals, and why two figures may not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxn.bench.records import Manifest, Record, Report
from mxn.bench.statistics import Interval, ratio_interval, verdict

COMPARED = (
    "output_tokens_per_s",
    "total_tokens_per_s",
    "prompt_tokens_per_s",
    "decode_tokens_per_s",
    "goodput_per_s",
    "ttft_ms",
    "ttft_p99_ms",
    "tpot_ms",
    "request_ms",
)
LOWER_IS_BETTER = frozenset(name for name in COMPARED if name.endswith("_ms"))
GAIN_ERROR = 0.05
"""By how much two meters of different chips may disagree in gain, absent anything better: NVIDIA's own statement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One figure of two records. `better`: how many times better the second is; None where it is not known in both."""

    workload: str
    first: str
    second: str
    metric: str
    better: Interval | None

    @property
    def words(self) -> str:
        """The verdict, in words."""
        return "not known in both" if self.better is None else verdict(self.better)


def compare(first: Report, second: Report) -> tuple[list[Comparison], list[str]]:
    """Every figure of the records that ran the same workload, and what forbids to compare them.

    Records are matched by workload and by subject label where both have it, else in order.
    """
    found: list[Comparison] = []
    warnings: list[str] = []
    for a, b in _pairs(first.records, second.records):
        warnings += [f"{a.workload.name}: {text}" for text in mismatches(a, b)]
        warnings += [
            f"{_name(record)}: {fault}" for record in (a, b) for fault in (*record.faults, *_quality_fault(record))
        ]
        if not (a.is_result and b.is_result):
            warnings.append(f"{a.workload.name}: not compared, because one of the two is no result")
            continue
        is_same_chip = first.manifest.chip == second.manifest.chip
        for metric in (*COMPARED, "tokens_per_watt"):
            better = _better(a, b, metric, is_same_chip=is_same_chip)
            if better is not None or metric == "tokens_per_watt":
                found.append(
                    Comparison(workload=a.workload.name, first=_name(a), second=_name(b), metric=metric, better=better)
                )
    if not found and not warnings:
        names = [", ".join(dict.fromkeys(r.workload.name for r in report.records)) for report in (first, second)]
        warnings.append(f"the two reports have no workload in common: {names[0]}, and {names[1]}")
    return found, list(dict.fromkeys([*machine_differences(first.manifest, second.manifest), *warnings]))


def mismatches(a: Record, b: Record) -> list[str]:
    """Why figures of two records are not like for like; empty when they are."""
    found = []
    if a.scope != b.scope:
        found.append(f"energy has the scope {a.scope} in {_name(a)} and {b.scope} in {_name(b)}")
    if a.mean_watts.provenance != b.mean_watts.provenance:
        found.append(f"power is {a.mean_watts.provenance} in {_name(a)} and {b.mean_watts.provenance} in {_name(b)}")
    if a.subject.quantisation != b.subject.quantisation:
        found.append(f"precision is {a.subject.quantisation} in {_name(a)} and {b.subject.quantisation} in {_name(b)}")
    if a.subject.model.split("/")[-1].lower() != b.subject.model.split("/")[-1].lower():
        found.append(f"the models differ: {a.subject.model} and {b.subject.model}")
    lengths = [(r.workload.prompt_tokens, r.workload.output_tokens, r.workload.length_spread) for r in (a, b)]
    if lengths[0] != lengths[1] or a.workload.dataset_sha256 != b.workload.dataset_sha256:
        found.append(f"prompt and output lengths differ: {_lengths(a)} and {_lengths(b)}")
    if (a.workload.concurrency, a.workload.arrival, a.workload.rate_per_s) != (
        b.workload.concurrency,
        b.workload.arrival,
        b.workload.rate_per_s,
    ):
        found.append(f"the load differs: {a.workload.title} and {b.workload.title}")
    if a.workload.api != b.workload.api:
        found.append(f"one was asked over {a.workload.api}, the other {b.workload.api}")
    if a.subject.interface != b.subject.interface:
        found.append(f"one was reached over {a.subject.interface}, the other {b.subject.interface}")
    return found


def machine_differences(a: Manifest, b: Manifest) -> list[str]:
    """What of the machine and its state differs between two runs."""
    found = []
    for what, x, y in (
        ("chip", f"{a.chip}, {a.num_cores} cores", f"{b.chip}, {b.num_cores} cores"),
        ("power limit", str(a.power_limits_w), str(b.power_limits_w)),
        ("drivers", _listed(a.drivers), _listed(b.drivers)),
    ):
        if x != y:
            found.append(f"{what} differs: {x} and {y}")
    if a.started != b.started:
        found.append("the runs were made at different times, not in turns: what changed in between is in the ratios")
    return found


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "not told"


def _pairs(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    pairs = []
    for name in dict.fromkeys(record.workload.name for record in first):
        ours = [r for r in first if r.workload.name == name]
        theirs = [r for r in second if r.workload.name == name]
        by_label = {r.subject.label: r for r in theirs}
        if any(r.subject.label in by_label for r in ours):
            pairs += [(r, by_label[r.subject.label]) for r in ours if r.subject.label in by_label]
        else:
            pairs += list(zip(ours, theirs, strict=False))
    return pairs


def _better(a: Record, b: Record, metric: str, *, is_same_chip: bool) -> Interval | None:
    base, other = _values(a, metric), _values(b, metric)
    if not base or not other:
        return None
    if metric in LOWER_IS_BETTER:
        base, other = other, base
    ratio = ratio_interval(base, other, is_paired=False)
    if metric == "tokens_per_watt" and not is_same_chip and ratio.low is not None and ratio.high is not None:
        return Interval(
            value=ratio.value, low=ratio.low / (1 + GAIN_ERROR), high=ratio.high * (1 + GAIN_ERROR), n=ratio.n
        )
    return ratio


def _values(record: Record, metric: str) -> list[float]:
    if metric == "tokens_per_watt":
        found = [run.tokens_per_watt for run in record.runs]
        return [value for value in found if value] if all(found) else []
    if not record.runs:  # version 1 kept the headline only
        return list(record.values) if metric == record.workload.headline else []
    return [run.figures[metric] for run in record.runs if run.figures.get(metric, 0.0) > 0]


def _quality_fault(record: Record) -> tuple[str, ...]:
    quality = record.quality
    return () if quality is None or quality.is_passed else (f"fails the quality gate: {quality.note}",)


def _lengths(record: Record) -> str:
    workload = record.workload
    return f"{workload.prompt_tokens} in + {workload.output_tokens} out ({workload.dataset})"


def _name(record: Record) -> str:
    return f"{record.subject.label} ({record.subject.quantisation})"
