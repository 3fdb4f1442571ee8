"""Records made by hand, for tests of what is done with them."""

from dataclasses import replace

from mxn.bench.metrics import Spread
from mxn.bench.records import Manifest, Record, Report, Run, Subject
from mxn.bench.workloads import WORKLOADS, Workload
from mxn.core.quantity import Provenance, Quantity

MANIFEST = Manifest(
    started="2026-01-01T00:00:00+00:00",
    command="mxn bench",
    commit="abc",
    chip="Test CPU",
    num_cores=2,
    chip_features=("avx2",),
    memory_gib=8.0,
    platform="Linux",
    versions={"python": "3.12"},
    load_average=0.1,
    seed=0,
)


def subject(label: str = "mxn", *, quantisation: str = "int8", model: str = "tiny") -> Subject:
    return Subject(label=label, model=model, interface="HTTP", backend="cpu", quantisation=quantisation)


def record(
    speeds: tuple[float, ...] = (100.0, 110.0, 90.0),
    *,
    of: Subject | None = None,
    workload: Workload = WORKLOADS["W2c8"],
    watts: float | None = 20.0,
    provenance: Provenance = Provenance.MEASURED,
    **fields: object,
) -> Record:
    """A record of known speeds at constant watts over one second per run."""
    tokens = round(sum(speeds))
    joules = None if watts is None else watts * len(speeds)

    def quantity(value: float | None, unit: str) -> Quantity:
        if value is None:
            return Quantity.unavailable(unit, "no counter here")
        return Quantity(value=value, unit=unit, provenance=provenance, source="rapl (device)", relative_error=0.01)

    runs = tuple(
        Run(
            figures={"output_tokens_per_s": speed, "ttft_ms": 1e4 / speed, "tpot_ms": 1e3 / speed},
            energy_j=watts,
            tokens_per_watt=speed / watts if watts else None,
        )
        for speed in speeds
    )
    made = Record(
        subject=of or subject(),
        workload=workload,
        metrics={
            name: Spread.of([run.figures[name] for run in runs])
            for name in ("output_tokens_per_s", "ttft_ms", "tpot_ms")
        },
        values=speeds,
        num_output_tokens=tokens,
        num_prompt_tokens=2 * tokens,
        num_cached_tokens=0,
        energy_j=quantity(joules, "J"),
        mean_watts=quantity(watts, "W"),
        tokens_per_watt=quantity(tokens / joules if joules else None, "tokens/J"),
        total_tokens_per_watt=quantity(3 * tokens / joules if joules else None, "tokens/J"),
        scope="device" if watts else "none",
        runs=runs,
        power=((0.5, watts), (1.0, watts), (1.5, None), (2.0, watts), (2.5, watts)),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def report(*records: Record, **fields: object) -> Report:
    return Report(manifest=replace(MANIFEST, **fields), records=records)  # type: ignore[arg-type]
