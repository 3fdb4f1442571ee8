"""Architecture facts out of config.json: head shapes, windows and parameter counts of the families people serve."""

from __future__ import annotations

import pytest

from mxn.errors import ModelError
from mxn.store.spec import layer_windows, spec_from_config

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


def test_llama_facts() -> None:
    spec = spec_from_config(LLAMA_3_8B)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim) == (32, 32, 8, 128, 128)
    assert spec.max_context == 8192
    assert spec.num_parameters == pytest.approx(8.03e9, rel=0.001)
    assert spec.layer_windows == (None,) * 32
    assert spec.kv_bytes_per_token(2) == 131072


def test_latent_attention_is_counted_as_it_is_cached_expanded() -> None:
    spec = spec_from_config(DEEPSEEK_V3)
    assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == (128, 192, 128)
    assert spec.num_parameters == pytest.approx(671e9, rel=0.001)
    assert spec.num_active_parameters == pytest.approx(37.5e9, rel=0.01)


def test_gpt2_names_are_read() -> None:
    spec = spec_from_config(GPT2)
    assert (spec.num_layers, spec.num_kv_heads, spec.key_dim, spec.max_context) == (12, 12, 64, 1024)
    assert spec.num_parameters == pytest.approx(124.4e6, rel=0.002)


def test_mixture_of_experts_counts_all_and_active_parameters() -> None:
    spec = spec_from_config(
        LLAMA_3_8B | {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
    )
    assert spec.num_parameters == pytest.approx(46.7e9, rel=0.001)
    assert spec.num_active_parameters == pytest.approx(12.88e9, rel=0.001)


def test_text_part_of_a_multimodal_config_is_taken() -> None:
    text = {**LLAMA_3_8B, "model_type": "gemma3_text", "head_dim": 256, "sliding_window": 1024}
    spec = spec_from_config({"model_type": "gemma3", "text_config": text})
    assert spec.architecture == "gemma3_text"
    assert spec.key_dim == 256
    assert spec.layer_windows[:6] == (1024, 1024, 1024, 1024, 1024, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mixtral", "sliding_window": 128}, (128,) * 4),
        ({"model_type": "gemma2", "sliding_window": 64}, (64, None, 64, None)),
        ({"model_type": "gpt_oss"}, (128, None, 128, None)),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, (None,) * 4),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 64, 64),
        ),
        (
            {"model_type": "llama", "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
            (None, 8, None, 8),
        ),
    ],
)
def test_windows_per_layer(changes: dict[str, object], expected: tuple[int | None, ...]) -> None:
    assert layer_windows(LLAMA_3_8B | {"num_hidden_layers": 4} | changes) == expected


def test_missing_key_is_named() -> None:
    broken = {key: value for key, value in LLAMA_3_8B.items() if key != "vocab_size"}
    with pytest.raises(ModelError, match="expected vocab_size as a positive whole number, found None"):
        spec_from_config(broken)
