"""The load-time comparison of an attention backend with the reference."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.attention.reference import ReferenceAttention  # noqa: E402
from mxn.core.model import ModelSpec  # noqa: E402
from mxn.runner.attention_check import disagreement  # noqa: E402

pytestmark = pytest.mark.torch

SPEC = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=64,
    vocab_size=99,
    num_heads=4,
    num_kv_heads=2,
    key_dim=16,
    value_dim=16,
    max_context=128,
    num_parameters=None,
    layer_windows=(None, 64),
)


def test_the_reference_agrees_with_itself() -> None:
    assert disagreement(ReferenceAttention, SPEC) is None


class NoWindow(ReferenceAttention):
    def forward(self, *arguments: Any, window: int | None, **options: Any) -> Any:
        return super().forward(*arguments, window=None, **options)


class OneTokenShort(ReferenceAttention):
    def forward(self, layer: int, query: Any, *rest: Any, **options: Any) -> Any:
        out = super().forward(layer, query, *rest, **options)
        out[-1] = 0
        return out


class NotANumber(ReferenceAttention):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options) * float("nan")


@pytest.mark.parametrize(
    ("broken", "found"), [(NoWindow, "a window of 9"), (OneTokenShort, "full attention"), (NotANumber, "nan")]
)
def test_a_broken_backend_is_found(broken: Any, found: str) -> None:
    assert found in (disagreement(broken, SPEC) or "")
