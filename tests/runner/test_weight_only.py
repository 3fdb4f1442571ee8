"""8- and 4-bit weights by torch's kernels, which exist for CPUs too: close to the layer they replace, or refused."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.errors import KernelUnavailableError  # noqa: E402
from mxn.runner.weight_only import Fp8Linear, Int4Linear, quantise_weights  # noqa: E402

pytestmark = pytest.mark.torch
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


@pytest.mark.parametrize(("kind", "layer", "worst"), [("fp8", Fp8Linear, 0.05), ("int4", Int4Linear, 0.15)])
def test_layers_are_replaced_and_close(kind: str, layer: type, worst: float, make_model: Any) -> None:
    model, _ = make_model("llama", **WIDE)
    model = model.to(torch.bfloat16)
    original = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = original(x).float()
        notes = quantise_weights(model, kind)
        found = model.model.layers[0].mlp.down_proj(x).float()
    assert isinstance(model.model.layers[0].mlp.down_proj, layer)
    assert type(model.lm_head) is torch.nn.Linear, "the head keeps its numbers"
    assert f"21 linear layers as {kind}" in notes[0]
    assert float((found - expected).norm() / expected.norm()) < worst


def test_shapes_that_do_not_fit_stay_and_are_counted(make_model: Any) -> None:
    model, _ = make_model("llama", **(WIDE | {"intermediate_size": 200}))
    notes = quantise_weights(model.to(torch.bfloat16), "int4")
    assert "12 linear layers as int4" in notes[0]
    assert any("found 200 x 128" in note for note in notes)


def test_a_model_without_a_fitting_layer_is_refused_with_the_reason(make_model: Any) -> None:
    model, _ = make_model("llama", hidden_size=60, num_attention_heads=3, num_key_value_heads=3, intermediate_size=100)
    with pytest.raises(
        KernelUnavailableError, match="no layer can have them: int4 asks for inputs in multiples of 128"
    ):
        quantise_weights(model.to(torch.bfloat16), "int4")
