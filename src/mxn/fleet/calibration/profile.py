"""A profile: what one model took on one chip through one backend, measured. One form for every tool that measures.

Profiles are JSON outside and dataclasses inside; what comes from a file is checked field by field.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec

from mxn.core.chip import Chip
from mxn.core.model import ModelSpec
from mxn.errors import ConfigError
from mxn.fleet.work import Shape

FORMAT = 1

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillPoint:
    """Seconds from submission to the first token of one prompt that no cache knows, alone."""

    tokens: Count
    median_s: Positive
    min_s: Positive
    max_s: Positive
    repetitions: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePoint:
    """Seconds between tokens while `batch` sequences decode. context: mean tokens of each meanwhile.

    repetitions: gaps that were timed. watts: of the chip meanwhile; None when nobody can say.
    """

    batch: Count
    context: Positive
    median_s: Positive
    min_s: Positive
    max_s: Positive
    repetitions: Count
    watts: Amount | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChipRates:
    """What the chip does without a model: bytes copied (read plus written) and float32 products of matrices."""

    copy_bytes_per_s: Positive
    matmul_flops: Positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """Watts of the chip. source: the reader's name; detail: what it reads. idle_w, busy_w: None when nobody can say."""

    source: str
    kind: str
    detail: str
    idle_w: Amount | None
    busy_w: Amount | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All that was measured of one cell.

    chip_kind: id of its chip card, None when no card matches. versions: of mxn and of the backend's libraries.
    memory_bytes: that the loaded model took, by the backend's own meter; None where there is none.
    load_s: by phase.
    """

    model: str
    revision: str
    spec: ModelSpec
    num_experts: Count | None = None
    num_experts_per_token: Count | None = None
    chip: str
    chip_cores: Count
    chip_kind: str | None
    backend: str
    versions: dict[str, str]
    quantisation: str
    attention: str
    program: str
    threads: int | None
    max_step_tokens: Count
    weight_bytes: Amount
    kv_bytes: Amount
    kv_bytes_per_token: Positive
    memory_bytes: Amount | None
    memory_source: str
    load_s: dict[str, Amount]
    power: Power
    rates: ChipRates | None
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    measured_at: str
    format: int = FORMAT

    @property
    def shape(self) -> Shape:
        """The model's shape as it was measured."""
        return Shape(
            spec=self.spec,
            weight_bytes=self.weight_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
        )

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer profile replaces an older one of."""
        versions = ",".join(f"{name}={version}" for name, version in sorted(self.versions.items()))
        return self.chip, str(self.chip_cores), self.backend, versions, self.model, self.revision, self.quantisation

    def is_of(self, chip: Chip) -> bool:
        """Whether it was measured on a chip like this one."""
        return self.chip == chip.name and self.chip_cores == chip.cores


def profile_json(profile: Profile) -> dict[str, Any]:
    """Plain values, as they are written to files."""
    return asdict(profile)


def read_profiles(text: str, name: str) -> tuple[Profile, ...]:
    """The profiles of a file: one, or a list of them.

    Raises: ConfigError that names the field at fault by its path, such as `profiles.json: $[1].decode[0].median_s`.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: expected JSON written by `mxn calibrate`: {error}") from error
    entries = data if isinstance(data, list) else [data]
    found = []
    for index, entry in enumerate(entries):
        at = f"$[{index}]" if isinstance(data, list) else "$"
        _refuse_unusual(entry, at, name)
        if isinstance(entry, dict) and entry.get("format") != FORMAT:
            written = entry.get("format")
            raise ConfigError(f"{name}: {at}.format: expected {FORMAT}, got {written!r}: measure again with this mxn")
        try:
            profile = msgspec.convert(entry, Profile)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name}: {_placed(str(error), at)}") from error
        if not profile.decode and not profile.prefill:
            raise ConfigError(f"{name}: {at}: expected points of prefill or decode, got none")
        found.append(profile)
    return tuple(found)


def _refuse_unusual(value: object, at: str, name: str) -> None:
    """JSON as Python reads it knows NaN and infinity; a profile does not."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: {at}: expected a finite number, got {value}")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        _refuse_unusual(part, f"{at}[{key}]" if isinstance(key, int) else f"{at}.{key}", name)


def _placed(message: str, at: str) -> str:
    """msgspec's message with its path put behind the entry's own."""
    text, _, path = message.partition(" - at `$")
    return f"{at}{path.rstrip('`')}: {text[0].lower()}{text[1:]}"
