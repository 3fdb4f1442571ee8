from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mxn.config.model_card import load_model_cards
from mxn.core.model import ModelSpec
from mxn.fleet.calibration.profile import DecodePoint, Power, PrefillPoint, Profile
from mxn.fleet.work import Costs, Shape

TRUTH = Costs(
    weight_bytes=1e-10,
    kv_bytes=2e-10,
    linear_flops=1e-11,
    attention_flops=3e-11,
    head_flops=1.5e-11,
    sequences=2e-4,
    steps=1e-3,
)
"""Of a made-up chip."""


class Synthetic:
    """Profiles of a chip whose times follow `TRUTH` exactly, or a little off where told."""

    truth = TRUTH

    def spec(self, model: str) -> ModelSpec:
        spec = load_model_cards()[model].architecture.spec()
        assert spec is not None
        return spec

    def profile(
        self,
        model: str = "smollm2-135m-instruct",
        *,
        batches: Sequence[int] = (1, 2, 8, 16),
        contexts: Sequence[int] = (64, 300, 768),
        prompts: Sequence[int] = (16, 64, 256, 768, 1500),
        off: Sequence[float] = (0.0,),
        chip: str = "Made-up Chip",
    ) -> Profile:
        spec = self.spec(model)
        shape = Shape(spec=spec, weight_bytes=float(spec.num_parameters or 0), kv_bytes_per_token=4.0 * 1000)
        prefill = [
            self._point(TRUTH.seconds(shape.prefill(n, step_tokens=512)), off[i % len(off)])
            for i, n in enumerate(prompts)
        ]
        pairs = [(batch, context) for batch in batches for context in contexts]
        decode = [self._point(TRUTH.seconds(shape.decode(b, c)), off[i % len(off)]) for i, (b, c) in enumerate(pairs)]
        return Profile(
            model=model,
            revision="r1",
            spec=spec,
            chip=chip,
            chip_cores=2,
            chip_kind=None,
            backend="cpu",
            versions={"mxn": "1", "torch": "2"},
            quantisation="int8",
            attention="sdpa",
            program="modules",
            threads=2,
            max_step_tokens=512,
            weight_bytes=shape.weight_bytes,
            kv_bytes=4e6,
            kv_bytes_per_token=shape.kv_bytes_per_token,
            memory_bytes=None,
            memory_source="",
            load_s={"load": 2.0},
            power=Power(source="none", kind="none", detail="no meter", idle_w=None, busy_w=None),
            rates=None,
            prefill=tuple(
                PrefillPoint(tokens=n, median_s=s, min_s=s, max_s=s, repetitions=3)
                for n, s in zip(prompts, prefill, strict=True)
            ),
            decode=tuple(
                DecodePoint(batch=b, context=float(c), median_s=s, min_s=s, max_s=s, repetitions=9)
                for (b, c), s in zip(pairs, decode, strict=True)
            ),
            measured_at="2026-11-24T02:00:00+00:00",
        )

    def faster(self, profile: Profile, factor: float, **changes: object) -> Profile:
        """The same cell on a chip so much faster."""
        return replace(
            profile,
            prefill=tuple(replace(point, median_s=point.median_s / factor) for point in profile.prefill),
            decode=tuple(replace(point, median_s=point.median_s / factor) for point in profile.decode),
            **changes,  # type: ignore[arg-type]
        )

    def _point(self, seconds: float, off: float) -> float:
        return seconds * (1 + off)


@pytest.fixture(scope="session")
def synthetic() -> Synthetic:
    return Synthetic()
