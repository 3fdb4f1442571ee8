"""How far `mxn fit` is off, and whether what it accepts fits: cells loaded, filled to their full context, and metered.

Cells come in an order drawn from a seed. Each is predicted by formula alone, and corrected by what the loads before it
took, as replicas that serve are remembered. Compared with the peak of the replica's resident memory, loading included.
A false accept is a cell whose peak is above the least memory that it is said to fit in.

Run: python benchmarks/fit_grid.py load --out FILE [--model M --backend B --quantisation Q] ...  adds cells to the file
     python benchmarks/fit_grid.py report FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from mxn.backends.registry import load_backend
from mxn.config.model_card import Architecture
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.request import FinishReason, SamplingParams, SequenceRequest
from mxn.engine.messages import Load
from mxn.fleet.calibration.memory import MemoryObservation, observe, read_observation
from mxn.fleet.fit import RESERVE_SHARE, fit_model
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.stream import SequenceStream
from mxn.store.fetch import fetch

CONTEXTS = (128, 512, 1024)
SEQUENCES = (1, 2, 4, 8, 16)
OUTPUT_TOKENS = 8
PLENTY_BYTES = float(1 << 50)


def predicted(cell: dict[str, Any], seen: list[MemoryObservation]) -> dict[str, float]:
    """What a cell is said to take, and the least memory it is said to fit in; the reserve is a share of that memory."""
    fit = fit_model(
        Architecture(source="loaded"),
        msgspec.convert(cell["spec"], ModelSpec),
        cell["backend"],
        load_backend(cell["backend"]).chips()[0],
        quantisation=cell["quantisation"],
        context=cell["context"],
        sequences=cell["sequences"],
        memory_bytes=PLENTY_BYTES,
        max_num_seqs=cell["sequences"],
        seen=seen,
    )
    reserve = fit.reserve.value or 0.0
    needed, most = (fit.needed_bytes or math.nan) - reserve, (fit.most_bytes or math.nan) - reserve
    return {"needed": needed, "accepted_from": most / (1 - RESERVE_SHARE), "kv": fit.kv_cache.value or 0.0}


def settings_of(cell: dict[str, Any]) -> LoadSettings:
    """How a cell is loaded: with a cache for its sequences and no more."""
    return LoadSettings(
        quantisation=cell["quantisation"],
        context_length=cell["context"],
        kv_bytes=int(predicted(cell, [])["kv"]),
        max_num_seqs=cell["sequences"],
        prefix_cache=False,
    )


def seen_in(cell: dict[str, Any]) -> MemoryObservation:
    """What the load of a cell showed, beside what this version of the backend would have expected."""
    backend = load_backend(cell["backend"])
    estimate = backend.estimate(msgspec.convert(cell["spec"], ModelSpec), settings_of(cell), backend.chips()[0])
    return replace(
        read_observation(json.dumps(cell["observation"]), "observation"),
        kv_bytes=float(cell["kv"]),
        estimated_weight_bytes=estimate.weights.value or 0.0,
        estimated_other_bytes=(estimate.activations.value or 0.0) + (estimate.overhead.value or 0.0),
        estimated_peak_bytes=estimate.loading.value if estimate.loading else None,
    )


async def load_cell(model: Model, backend_name: str, quantisation: str, context: int, sequences: int) -> dict[str, Any]:
    """Loads one cell, fills it, and says what it took."""
    cell: dict[str, Any] = {
        "model": model.name,
        "spec": asdict(model.spec),
        "backend": backend_name,
        "quantisation": quantisation,
        "context": context,
        "sequences": sequences,
    }
    backend = load_backend(backend_name)
    chip = backend.chips()[0]
    settings = settings_of(cell)
    load = Load(backend=backend_name, model=model, settings=settings, chips=[chip], max_waiting=64)
    replica = await LocalLauncher().start(load, lambda phase, fraction: None, {})
    try:
        info = replica.info
        assert info is not None
        loaded_peak = _peak(info.pid)
        dice = random.Random(context * 100 + sequences)
        streams = [
            replica.submit(
                SequenceRequest(
                    seq_id=number,
                    prompt_token_ids=[dice.randrange(1000, 30_000) for _ in range(context - OUTPUT_TOKENS)],
                    sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0),
                )
            )
            for number in range(1, sequences + 1)
        ]
        ends = await asyncio.gather(*(_end(stream) for stream in streams))
        observation = observe(load, info)
        assert observation is not None
        return cell | {
            "serves": all(end is FinishReason.LENGTH for end in ends),
            "kv": info.kv_bytes,
            "loaded_peak": loaded_peak,
            "peak": _peak(info.pid),
            "observation": json.loads(observation.json()),
        }
    finally:
        await replica.kill()


async def _end(stream: SequenceStream) -> FinishReason | None:
    reason = None
    async for output in stream:
        reason = output.finish_reason
    return reason


def _peak(pid: int) -> float:
    """The largest resident set that the process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    raise RuntimeError("the system does not tell a process's largest resident set")


def report(path: Path) -> None:
    """Prints every cell, and the errors and false accepts of both predictions."""
    data = json.loads(path.read_text())
    seen: list[MemoryObservation] = []
    for cell in data:
        cell["formula"], cell["corrected"] = predicted(cell, []), predicted(cell, seen)
        seen.append(seen_in(cell))
    print("| cell | context x sequences | peak GiB | by formula | corrected | fits from |\n|---|---|---|---|---|---|")
    for cell in data:
        peak = cell["peak"]
        errors = [f"{cell[how]['needed'] / peak - 1:+.1%}" for how in ("formula", "corrected")]
        print(
            f"| {cell['model']} {cell['backend']} {cell['quantisation']} | {cell['context']} x {cell['sequences']} "
            f"| {peak / 2**30:.3f} | {errors[0]} | {errors[1]} | {cell['corrected']['accepted_from'] / 2**30:.3f} |"
        )
    print(f"\n{len(data)} cells; {sum(cell['serves'] for cell in data)} served every sequence at full context")
    for how in ("formula", "corrected"):
        off = sorted(abs(cell[how]["needed"] / cell["peak"] - 1) for cell in data)
        false = sum(cell["peak"] > cell[how]["accepted_from"] or not cell["serves"] for cell in data)
        p90 = off[math.ceil(0.9 * len(off)) - 1]
        print(f"{how}: median error {statistics.median(off):.1%}, P90 {p90:.1%}, false accepts {false}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("load")
    one.add_argument("--model", required=True)
    one.add_argument("--backend", required=True)
    one.add_argument("--quantisation", required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--limit", type=int, default=len(CONTEXTS) * len(SEQUENCES))
    one.add_argument("--out", type=Path, required=True)
    commands.add_parser("report").add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(arguments.file)
        return
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    model = fetch(arguments.model)
    grid = [(context, sequences) for context in CONTEXTS for sequences in SEQUENCES]
    random.Random(arguments.seed).shuffle(grid)
    for context, sequences in grid[: arguments.limit]:
        cell = asyncio.run(load_cell(model, arguments.backend, arguments.quantisation, context, sequences))
        data.append(cell)
        arguments.out.write_text(json.dumps(data, indent=1) + "\n")
        print(f"{context} x {sequences}: {cell['peak'] / 2**30:.3f} GiB", flush=True)


if __name__ == "__main__":
    main()
