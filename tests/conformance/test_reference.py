"""The kit's oracle is itself compared with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mxn.conformance.reference import Reference
from mxn.conformance.tiny_models import ARCHITECTURES, write_tiny_model
from mxn.errors import UnsupportedModelError

PROMPT = [256, 3, 99, 3, 200, 17, *range(40, 80), 5]


@pytest.mark.torch
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reference_gives_what_transformers_gives(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write_tiny_model(architecture, tmp_path)
    ours = Reference(tmp_path).logprobs(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4, "transformers rotates and normalises in float32"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_tell_right_from_wrong(architecture: str, tmp_path: Path) -> None:
    """Tokens far apart, and a changed token early in the prompt changes what follows."""
    write_tiny_model(architecture, tmp_path)
    reference = Reference(tmp_path)
    rows = reference.logprobs(PROMPT[:20])
    top = np.sort(rows, -1)
    assert np.median(top[:, -1] - top[:, -2]) > 0.2
    changed = reference.logprobs([PROMPT[0], 4, *PROMPT[2:20]])
    assert np.abs(rows[-1] - changed[-1]).max() > 0.05


def test_an_architecture_it_does_not_cover_is_refused(tmp_path: Path) -> None:
    write_tiny_model("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "mamba"'))
    with pytest.raises(UnsupportedModelError, match="covers llama, mistral, qwen2, qwen3"):
        Reference(tmp_path)
