"""How far the calibrated cost model is off on points that it was not shown: decode, prefill, and which cell is faster.

Measures one cell at a time; points of the calibration and held-out points take turns on the same replica, so that both
meet the same machine. The report is made of all cells that a folder holds.

Run: python benchmarks/cost_model.py measure MODEL --backend cpu --quantisation int8 --out FOLDER
     python benchmarks/cost_model.py report FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mxn.backends.registry import load_backend
from mxn.engine.messages import Load
from mxn.fleet.calibration.fitting import fitted_costs, profile_margins
from mxn.fleet.calibration.measure import BATCHES, DECODE_CONTEXTS, PREFILL_TOKENS, Measurement, profile_of
from mxn.fleet.calibration.profile import Profile, profile_json, read_profiles
from mxn.fleet.calibration.session import calibration_settings
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.work import Shape, Work
from mxn.store.fetch import fetch

HELD_BATCHES = (16, 4, 1)
HELD_CONTEXTS = (128, 1024)


@dataclass(frozen=True)
class Point:
    """A held-out point: median and quartiles of what was timed. context: mean tokens of each sequence meanwhile."""

    kind: str
    batch: int
    aimed_context: int
    context: float
    median_s: float
    low_s: float
    high_s: float
    repetitions: int


async def measure(model_name: str, backend_name: str, quantisation: str, budget_s: float) -> dict[str, object]:
    """The profile of a cell and its held-out points."""
    model, backend = fetch(model_name), load_backend(backend_name)
    chip = backend.chips()[0]
    settings = calibration_settings(model, chip, quantisation)
    load = Load(backend=backend_name, model=model, settings=settings, chips=[chip], max_waiting=64)
    replica = await LocalLauncher().start(load, lambda phase, fraction: None, {})
    reader = backend.power(chip)
    try:
        info = replica.info
        assert info is not None
        shown, held = Measurement(replica, info, reader), Measurement(replica, info, reader)
        await shown.prompt_alone(64)
        shown.prefill.clear()
        begin_s, rounds = time.monotonic(), 0
        while rounds == 0 or (time.monotonic() - begin_s) * (rounds + 1) / rounds < budget_s:
            for tokens in sorted({*PREFILL_TOKENS, *HELD_CONTEXTS}):
                await (held if tokens in HELD_CONTEXTS else shown).prompt_alone(tokens)
            for context in sorted({*DECODE_CONTEXTS, *HELD_CONTEXTS}):
                if context in HELD_CONTEXTS:
                    await held.visit((), (context,), HELD_BATCHES)
                    await held.decode_together(context, (4,))
                else:
                    await shown.visit((), (context,), BATCHES)
            rounds += 1
        profile = profile_of(shown, info, backend, chip, model, settings, reader, None, None)
    finally:
        reader.close()
        await replica.kill()
    points = [
        _point("decode", batch, context, statistics.mean(samples.contexts), samples.seconds)
        for (batch, context), samples in held.decode.items()
    ]
    points += [_point("prefill", 1, tokens, tokens, seconds) for tokens, seconds in held.prefill.items()]
    points += [
        _point("prefill", batch, context, context, seconds) for (batch, context), seconds in held.together.items()
    ]
    return {"profile": profile_json(profile), "held_out": [asdict(point) for point in points], "rounds": rounds}


def _point(kind: str, batch: int, aimed: int, context: float, seconds: Sequence[float]) -> Point:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return Point(
        kind, batch, aimed, context, statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], len(ordered)
    )


def prefill_work(shape: Shape, batch: int, tokens: int, step_tokens: int) -> Work:
    """Several prompts of one length together, in full steps."""
    one = shape.prefill(tokens)
    steps = -(-batch * tokens // step_tokens)
    amounts = {name: batch * value for name, value in zip(asdict(one), one.amounts(), strict=True)}
    return Work(**(amounts | {"weight_bytes": steps * shape.weight_bytes, "steps": float(steps)}))


def predicted_s(profile: Profile, point: Point) -> float:
    """What the fit to the profile says of a held-out point."""
    prefill, decode = fitted_costs([profile])
    if point.kind == "decode":
        return decode.seconds(profile.shape.decode(point.batch, point.context))
    return prefill.seconds(prefill_work(profile.shape, point.batch, point.aimed_context, profile.max_step_tokens))


def report(folder: Path) -> None:
    """Prints a table of all held-out points, and the three figures."""
    cells: dict[str, tuple[Profile, list[Point]]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        profile = read_profiles(json.dumps(data["profile"]), path.name)[0]
        points = [Point(**point) for point in data["held_out"]]
        cells[f"{profile.model} {profile.backend} {profile.quantisation}"] = (profile, points)
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    print(
        "| cell | phase | batch x context | measured ms (quartiles) | predicted ms | error |\n|---|---|---|---|---|---|"
    )
    for name, (profile, points) in cells.items():
        for point in points:
            predicted = predicted_s(profile, point)
            error = predicted / point.median_s - 1
            errors[point.kind].append(abs(error))
            spread = f"{1e3 * point.median_s:.1f} ({1e3 * point.low_s:.1f} to {1e3 * point.high_s:.1f})"
            where = f"{point.batch} x {point.aimed_context}"
            print(f"| {name} | {point.kind} | {where} | {spread} | {1e3 * predicted:.1f} | {error:+.1%} |")
    print()
    for name, (profile, points) in cells.items():
        margins = profile_margins(profile)
        per_kind = {
            kind: statistics.mean(abs(predicted_s(profile, p) / p.median_s - 1) for p in points if p.kind == kind)
            for kind in errors
        }
        print(
            f"{name}: mean error decode {per_kind['decode']:.1%}, prefill {per_kind['prefill']:.1%}; "
            f"margins of its own decode {margins[1]:.1%}, prefill {margins[0]:.1%}"
        )
    for kind, found in errors.items():
        print(f"{kind}: {len(found)} points, mean error {statistics.mean(found):.1%}, worst {max(found):.1%}")
    right, total = _ranking(cells)
    print(f"ranking: {right} of {total} pairs right")


def _ranking(cells: dict[str, tuple[Profile, list[Point]]]) -> tuple[int, int]:
    """Pairs of cells of one model at the same point: whether the one predicted to be faster is."""
    right = total = 0
    for (one, mine), (other, theirs) in itertools.combinations(cells.values(), 2):
        if one.model != other.model:
            continue
        known = {(point.kind, point.batch, point.aimed_context): point for point in theirs}
        for point in mine:
            twin = known.get((point.kind, point.batch, point.aimed_context))
            if twin is None:
                continue
            # Both at the same length, whatever each was timed at.
            same = replace(twin, context=point.context)
            total += 1
            right += (predicted_s(one, point) < predicted_s(other, same)) == (point.median_s < twin.median_s)
    return right, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("measure")
    one.add_argument("model")
    one.add_argument("--backend", required=True)
    one.add_argument("--quantisation", default="auto")
    one.add_argument("--budget-s", type=float, default=180.0)
    one.add_argument("--out", type=Path, required=True)
    commands.add_parser("report").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(arguments.folder)
        return
    found = asyncio.run(measure(arguments.model, arguments.backend, arguments.quantisation, arguments.budget_s))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{Path(arguments.model).name}-{arguments.backend}-{arguments.quantisation}.json"
    (arguments.out / name).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}: {found['rounds']} rounds")


if __name__ == "__main__":
    main()
