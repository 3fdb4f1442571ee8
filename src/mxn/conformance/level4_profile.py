"""L4: what a model costs on this chip through this backend, measured, for the planner. Nothing is judged here."""

from __future__ import annotations

from typing import Any

from mxn.conformance.subject import Subject
from mxn.core.model import Model
from mxn.fleet.calibration.measure import measure_cell
from mxn.fleet.calibration.profile import profile_json
from mxn.fleet.calibration.rates import measure_rates

BUDGET_S = 60.0


async def measure_profile(subject: Subject, model: Model) -> dict[str, Any]:
    """The profile of one model, in the form that `mxn calibrate` keeps and imports."""
    settings = subject.profile_settings
    rates = measure_rates(subject.chip)
    async with subject.own_replica(model, settings) as replica:
        profile = await measure_cell(
            replica,
            backend=subject.backend,
            chip=subject.chip,
            model=model,
            settings=settings,
            budget_s=BUDGET_S,
            rates=rates,
        )
    return profile_json(profile)
