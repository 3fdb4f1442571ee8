"""One `mxn calibrate run`: every cell that can be measured, one after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from mxn.backends.registry import load_backend
from mxn.backends.survey import physical_chips, survey
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, QuantisationName
from mxn.engine.messages import Load
from mxn.errors import BackendError, MxnError
from mxn.fleet.calibration.measure import CALIBRATION, measure_cell
from mxn.fleet.calibration.profile import ChipRates, Profile
from mxn.fleet.calibration.rates import measure_rates
from mxn.fleet.calibration.store import remember_load
from mxn.fleet.launchers.local import LocalLauncher

_CACHE_TOKENS = 2048


def calibrate_cells(
    models: Sequence[Model],
    *,
    backends: Sequence[str] = (),
    quantisations: Sequence[str] = ("auto",),
    budget_s: float = 120.0,
    on_line: Callable[[str], None] = lambda line: None,
) -> list[Profile]:
    """Profiles of every model through every backend in every format, on the first chip of each kind.

    backends: every active one whose tokens are real, when left out. What cannot be loaded is told to `on_line` and left
    out. Raises: BackendError for a backend that was named and is not active.
    """
    surveys = survey(list(backends) or None)
    for name in backends:
        if surveys[name].probe.state != "active":
            raise BackendError(f'backend "{name}" is {surveys[name].probe.state}: {surveys[name].probe.reason}')
    found: list[Profile] = []
    for seen in physical_chips(surveys):
        rates = measure_rates(seen.chip)
        if rates is not None:
            on_line(
                f"{seen.chip.name}: copies {rates.copy_bytes_per_s / 1e9:.1f} GB/s, "
                f"multiplies float32 matrices at {rates.matmul_flops / 1e9:.0f} GFLOP/s"
            )
        for name in seen.backends:
            if surveys[name].is_scripted and name not in backends:
                continue
            chip = next(one.chip for one in surveys[name].chips if one.chip.uid == seen.chip.uid)
            for model in models:
                for quantisation in quantisations:
                    cell = f"{model.name} through {name} as {quantisation}"
                    settings = calibration_settings(model, chip, quantisation)
                    try:
                        found.append(asyncio.run(_measure(name, chip, model, settings, rates, budget_s, cell, on_line)))
                    except MxnError as error:
                        on_line(f"{cell}: left out: {error}")
    return found


def calibration_settings(model: Model, chip: Chip, quantisation: str) -> LoadSettings:
    """How a cell is loaded to be measured: with a cache for all sequences at every context, if a quarter of the memory
    holds it."""
    wanted = CALIBRATION.max_num_seqs * _CACHE_TOKENS * model.spec.kv_bytes_per_token(4.0)
    kv_bytes = int(min(wanted, chip.memory_bytes / 4))
    return replace(CALIBRATION, quantisation=cast(QuantisationName, quantisation), kv_bytes=kv_bytes)


async def _measure(
    name: str,
    chip: Chip,
    model: Model,
    settings: LoadSettings,
    rates: ChipRates | None,
    budget_s: float,
    cell: str,
    on_line: Callable[[str], None],
) -> Profile:
    backend = load_backend(name)
    support = backend.supports(model.spec, chip)
    if support.verdict == "no":
        raise BackendError("; ".join(support.reasons))
    start_s = time.monotonic()
    load = Load(backend=name, model=model, settings=settings, chips=[chip], max_waiting=64)
    replica = await LocalLauncher().start(load, lambda phase, fraction: None, {})
    try:
        remember_load(load, replica.info)
        profile = await measure_cell(
            replica,
            backend=backend,
            chip=chip,
            model=model,
            settings=settings,
            budget_s=budget_s,
            rates=rates,
        )
    finally:
        await replica.kill()
    points = len(profile.prefill) + len(profile.decode)
    on_line(f"{cell}: {points} points in {time.monotonic() - start_s:.0f} s")
    return profile
