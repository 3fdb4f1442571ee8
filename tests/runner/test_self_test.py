"""What is refused, with which reason, and that the self-test catches wrong attention by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.attention.reference import ReferenceAttention  # noqa: E402
from mxn.errors import UnsupportedModelError  # noqa: E402
from mxn.runner import self_test  # noqa: E402
from mxn.runner.attention_hook import attend  # noqa: E402
from mxn.runner.refusals import refusal, refusal_by_architecture  # noqa: E402
from mxn.runner.self_test import check_architecture  # noqa: E402

pytestmark = pytest.mark.torch


def default_config(family: str, **changes: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**changes).get_text_config()


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "opt", "phi3", "qwen2_moe"]
)
def test_full_sized_configs_pass(family: str) -> None:
    check_architecture(default_config(family))


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe"])
def test_windows_that_are_only_masks_are_derived_from_the_config(family: str) -> None:
    changes = {"sliding_window": 64}
    if family == "qwen2_moe":
        changes |= {"use_sliding_window": True, "max_window_layers": 12}
    check_architecture(default_config(family, **changes))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "layers of kind linear_attention"),
        ("llama4_text", "attend within chunks"),
        ("mamba", "recurrent layers"),
        ("bloom", "never call transformers' attention interface"),
        ("bert", "not a decoder"),
        ("t5", "not a decoder"),
    ],
)
def test_config_is_refused_with_the_reason(family: str, reason: str) -> None:
    assert reason in (refusal(default_config(family).to_dict()) or "")


def test_usual_architectures_are_not_refused() -> None:
    assert refusal_by_architecture("llama") is None
    assert refusal({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}) is None


@pytest.mark.parametrize("family", ["qwen3_next", "mamba", "bloom", "stablelm"])
def test_self_test_alone_refuses_what_the_lists_name(family: str) -> None:
    with pytest.raises(UnsupportedModelError):
        check_architecture(default_config(family))


def test_self_test_catches_a_window_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "layer_windows", lambda config: (None, None))
    with pytest.raises(UnsupportedModelError, match="asks for a window of 4096 tokens, expected None"):
        check_architecture(default_config("mistral", head_dim=128))


def test_self_test_catches_attention_that_mixes_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(ReferenceAttention):
        def forward(self, layer: int, query: Any, *rest: Any, **options: Any) -> Any:
            out = super().forward(layer, query, *rest, **options)
            return out + 0.1 * out.mean(0, keepdim=True)

    monkeypatch.setattr(self_test, "ReferenceAttention", Wrong)
    with pytest.raises(UnsupportedModelError, match="logits of a flat batch differ"):
        check_architecture(default_config("llama"))


def test_attention_without_its_arguments_is_refused() -> None:
    module = torch.nn.Linear(1, 1)
    query = torch.zeros(1, 1, 1, 4)
    with pytest.raises(UnsupportedModelError, match="does not hand the model's arguments on"):
        attend(module, query, query, query, None)


def test_original_config_is_not_changed(make_config: Callable[..., Any]) -> None:
    config = make_config("gemma2")
    before = config.to_dict()
    check_architecture(config)
    assert config.to_dict() == before
