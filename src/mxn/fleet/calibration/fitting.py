"""Costs of steps fitted to profiles: for the models that were measured, and scaled to others on the same chip.

Prefill and decode are fitted apart: their kernels reach different shares of a chip. What a fit gets wrong on points it
has not seen travels with it as a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mxn.core.chip import Chip
from mxn.core.model import ModelSpec
from mxn.errors import ConfigError
from mxn.fleet.calibration.least_squares import fit_relative, left_out_errors
from mxn.fleet.calibration.profile import Power, Profile
from mxn.fleet.work import PARTS, Costs, Work

Kind = Literal["measured", "scaled", "uncalibrated"]

_ONE_MODEL_MARGIN = 0.5
"""Of costs scaled from one measured model alone: how it depends on the model's size was never seen."""
_OTHER_VERSIONS_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """What work costs on a chip, and how far that may be off.

    prefill_margin, decode_margin: shares of the times; a plan adds them. step_tokens: of a prompt, in one step at most.
    kind: measured with this very model, scaled from others, or out of data sheets. source: for people.
    """

    prefill: Costs
    decode: Costs
    prefill_margin: float = 0.0
    decode_margin: float = 0.0
    step_tokens: float = math.inf
    kind: Kind
    source: str

    def step_s(self, prefill: Work, decode: Work) -> float:
        """One step with prompt chunks and decoding sequences in it; either may be no work. Without margins."""
        if not prefill.steps:
            return self.decode.seconds(decode)
        if not decode.steps:
            return self.prefill.seconds(prefill)
        # Weights are read once, and what a step costs beside is paid once: by the prompt chunks.
        beside = self.decode.weight_bytes * decode.weight_bytes + self.decode.steps * decode.steps
        return self.prefill.seconds(prefill) + self.decode.seconds(decode) - beside


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What is known of a cell from profiles. weight_bytes: of this model, None when only others were measured.

    kv_bytes_per_element: of one number in the KV cache. load_s: of the measured model, None when scaled.
    """

    times: StepTimes
    power: Power
    weight_bytes: float | None
    kv_bytes_per_element: float
    load_s: float | None


class Calibration:
    """Profiles, and the fits to them, made once each."""

    def __init__(self, profiles: Sequence[Profile] = ()) -> None:
        self._profiles = tuple(sorted(profiles, key=lambda p: (p.measured_at, p.key)))
        self._found: dict[tuple[object, ...], Calibrated | None] = {}

    def __bool__(self) -> bool:
        return bool(self._profiles)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """All of them, the newest last."""
        return self._profiles

    def find(
        self,
        spec: ModelSpec,
        *,
        chip: Chip,
        is_here: bool,
        backend: str,
        versions: Mapping[str, str],
        quantisation: str,
    ) -> Calibrated | None:
        """What profiles say of a model on a chip; None when none speaks for it.

        is_here: the chip is on this host, so that it must be the same in name and cores; a chip that only a card
        describes takes profiles of its kind, if it is no CPU, whose cores differ from machine to machine.
        versions: that are installed. Profiles with them count alone when there are any; else the newest, with a margin.
        """
        key = (_identity(spec), chip.name, chip.kind, is_here, backend, tuple(sorted(versions.items())), quantisation)
        if key not in self._found:
            here = [
                profile
                for profile in self._profiles
                if profile.backend == backend
                and profile.quantisation == quantisation
                and (profile.is_of(chip) if is_here else _is_of_kind(profile, chip))
            ]
            self._found[key] = _calibrated(spec, here, versions)
        return self._found[key]


def fitted_costs(profiles: Sequence[Profile]) -> tuple[Costs, Costs]:
    """Costs of prefill and of decode, by all points of the profiles."""
    found = []
    for points in (_prefill_points(profiles), _decode_points(profiles)):
        if not points:
            raise ConfigError(f"the profile of {profiles[0].model} has no points of prefill, or none of decode")
        fitted = fit_relative([work.amounts() for work, _ in points], [seconds for _, seconds in points])
        found.append(Costs(**dict(zip(PARTS, map(float, fitted), strict=True))))
    return found[0], found[1]


def profile_margins(profile: Profile) -> tuple[float, float]:
    """What nine of ten points of prefill and of decode are within, each by a fit to the others."""
    prefill, decode = (_margin(points) for points in _by_group([profile], by_point=True))
    return prefill, decode


def _calibrated(spec: ModelSpec, profiles: Sequence[Profile], versions: Mapping[str, str]) -> Calibrated | None:
    same = [profile for profile in profiles if profile.versions == dict(versions)]
    chosen, widened = (same, 0.0) if same else (list(profiles), _OTHER_VERSIONS_MARGIN)
    newest: dict[object, Profile] = {_identity(profile.spec): profile for profile in chosen}
    mine = newest.get(_identity(spec))
    used = [mine] if mine is not None else list(newest.values())
    if not used:
        return None
    prefill, decode = fitted_costs(used)
    prefill_margin, decode_margin = (_margin(points) + widened for points in _by_group(used, by_point=mine is not None))
    newest_one = used[-1]
    points = sum(len(profile.prefill) + len(profile.decode) for profile in used)
    how = "measured here" if mine else f"scaled from {', '.join(sorted(profile.model for profile in used))}"
    other = " with other versions of the libraries" if widened else ""
    times = StepTimes(
        prefill=prefill,
        decode=decode,
        prefill_margin=prefill_margin,
        decode_margin=decode_margin,
        step_tokens=newest_one.max_step_tokens,
        kind="measured" if mine else "scaled",
        source=f"{how}{other}, {points} points, {newest_one.measured_at[:10]}; left out, a point is within "
        f"{prefill_margin:.0%} for prefill and {decode_margin:.0%} for decode in nine cases of ten",
    )
    elements = newest_one.spec.kv_bytes_per_token(1.0)
    return Calibrated(
        times=times,
        power=newest_one.power,
        weight_bytes=mine.weight_bytes if mine else None,
        kv_bytes_per_element=newest_one.kv_bytes_per_token / elements,
        load_s=sum(mine.load_s.values()) if mine else None,
    )


def _by_group(profiles: Sequence[Profile], *, by_point: bool) -> list[list[tuple[Work, float, object]]]:
    """Points of prefill and of decode with what is left out together: a point, or a whole model."""
    groups: list[list[tuple[Work, float, object]]] = []
    for points_of in (_prefill_points, _decode_points):
        found: list[tuple[Work, float, object]] = []
        for number, profile in enumerate(profiles):
            for index, (work, seconds) in enumerate(points_of([profile])):
                found.append((work, seconds, index if by_point else number))
        groups.append(found)
    return groups


def _margin(points: Sequence[tuple[Work, float, object]]) -> float:
    """What nine of ten left-out points are within."""
    rows = [work.amounts() for work, _, _ in points]
    errors = sorted(left_out_errors(rows, [s for _, s, _ in points], [group for _, _, group in points]))
    if not errors:
        return _ONE_MODEL_MARGIN
    return errors[min(len(errors) - 1, math.ceil(0.9 * len(errors)) - 1)]


def _prefill_points(profiles: Sequence[Profile]) -> list[tuple[Work, float]]:
    return [
        (profile.shape.prefill(point.tokens, step_tokens=profile.max_step_tokens), point.median_s)
        for profile in profiles
        for point in profile.prefill
    ]


def _decode_points(profiles: Sequence[Profile]) -> list[tuple[Work, float]]:
    return [
        (profile.shape.decode(point.batch, point.context), point.median_s)
        for profile in profiles
        for point in profile.decode
    ]


def _identity(spec: ModelSpec) -> tuple[object, ...]:
    """What makes two models cost the same, whatever they are called."""
    return (
        *(spec.architecture, spec.num_layers, spec.hidden_size, spec.vocab_size),
        *(spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim),
    )


def _is_of_kind(profile: Profile, chip: Chip) -> bool:
    return chip.kind is not None and profile.chip_kind == chip.kind and not chip.uid.startswith("cpu")
