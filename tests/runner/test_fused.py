"""Norms and gates as one kernel each: the same numbers, and only where they are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.runner.fused import FusedGate, FusedNorm, fuse  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("family", "norms", "gates"),
    [("llama", 7, 3), ("qwen3", 13, 3), ("gemma3_text", 19, 0), ("gpt2", 0, 0), ("phi3", 7, 0)],
)
def test_fused_models_give_the_same_logits(family: str, norms: int, gates: int, make_model: Any) -> None:
    """Gemma's weights are stored less one and its gate is a gelu, which stays; GPT-2 has neither."""
    model, _ = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    fused = copy.deepcopy(model)
    notes = fuse(fused, implementation="reference")
    assert sum(isinstance(module, FusedNorm) for module in fused.modules()) == norms
    assert sum(isinstance(module, FusedGate) for module in fused.modules()) == gates
    assert bool(notes) == bool(norms)
    ids = torch.tensor([[5, 9, 17, 3, 44]])
    with torch.inference_mode():
        expected, found = model(input_ids=ids).logits, fused(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))


def test_a_gate_of_another_kind_stays_and_is_named(make_model: Any) -> None:
    model, _ = make_model("llama", hidden_act="gelu")
    notes = fuse(model, implementation="reference")
    assert not any(isinstance(module, FusedGate) for module in model.modules())
    assert any(note.startswith("LlamaMLP stays as transformers has it: differs") for note in notes)
