"""Damaged folders are named with what was found and expected; nothing is loaded that could run code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.errors import ConfigError, ModelError, OutOfMemoryError, UnsupportedModelError  # noqa: E402
from mxn.runner.loading import check_weight_files, count_weights, load_config, load_model  # noqa: E402
from mxn.runner.rotation import fix_rotation, fixed_context  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(make_model: Callable[..., Any]) -> Path:
    return Path(make_model("llama")[1].folder)


def load(folder: Path) -> Any:
    return load_model(
        str(folder), load_config(str(folder)), dtype=torch.float32, device="cpu", progress=lambda phase, fraction: None
    )


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_progress_rises_from_zero_to_one(folder: Path) -> None:
    seen: list[float] = []
    load_model(
        str(folder),
        load_config(str(folder)),
        dtype=torch.float32,
        device="cpu",
        progress=lambda phase, fraction: seen.append(fraction),
    )
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_weights_are_counted_from_the_headers(folder: Path) -> None:
    model = load(folder)
    assert count_weights(check_weight_files(str(folder))) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*fetch the model again"):
        load(folder)


def test_damaged_header_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:20] = b"garbage here"
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="header is damaged"):
        load(folder)


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"expected a safetensors file, found none; found pytorch_model\.bin"):
        load(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: expected a safetensors file"):
        load(folder)


def test_index_cannot_point_outside_the_folder(folder: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="expected plain file names"):
        load(folder)


def test_missing_tensor_is_named(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"weights are in none of model\.safetensors.*model\.layers\.3"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        load(folder)


def test_wrong_shape_is_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=32)
    with pytest.raises(ModelError):
        load(folder)


def test_missing_and_broken_config_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: expected a file, found none"):
        load_config(str(tmp_path / "nowhere"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="expected readable JSON"):
        load_config(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object, found list"):
        load_config(str(folder))


def test_unknown_architecture_is_refused(folder: Path) -> None:
    change_config(folder, model_type="not_yet_invented")
    with pytest.raises(UnsupportedModelError, match="not_yet_invented"):
        load_config(str(folder))


def test_code_that_comes_with_weights_never_runs(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('this must not run')")
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert type(load(folder)).__name__ == "LlamaForCausalLM", "transformers' own class serves a type it knows"
    change_config(folder, model_type="not_yet_invented")
    with pytest.raises(UnsupportedModelError, match="mxn never runs code that comes with weights"):
        load_config(str(folder))


def test_two_models_from_one_config_keep_their_own_attention(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = load_config(str(folder))
    ours = load_model(str(folder), config, dtype=torch.float32, device="cpu", progress=lambda phase, fraction: None)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert ours.config._attn_implementation == "mxn"


def test_context_and_memory_limits(make_model: Callable[..., Any], load: Callable[..., Any]) -> None:
    _, saved = make_model("llama")
    with pytest.raises(ConfigError, match="context_length 129 is over the 128 tokens"):
        load(saved, context_length=129)
    with pytest.raises(OutOfMemoryError, match="less than one block"):
        load(saved, kv_bytes=100)
    block_bytes = 3 * 2 * 2 * 16 * 4 * 4
    runner = load(saved, kv_bytes=5 * block_bytes + 7)
    assert runner.num_blocks == 5
    assert runner.max_context == 20
    assert any("context held at 20 tokens" in note for note in runner.notes)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}


def test_length_dependent_rotation_is_held_or_fixed(make_model: Callable[..., Any], load: Callable[..., Any]) -> None:
    model, saved = make_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32)
    assert fixed_context(model.config, None, 128) == (
        32,
        "context held at 32 of 128 tokens: longrope rotary embeddings change beyond it",
    )
    assert load(saved).max_context == 32
    long = load(saved, context_length=100)
    assert long.max_context == 100
    assert any("long rotary factors serve all lengths" in note for note in long.notes)


def test_fixed_rotation_ignores_the_longest_position(make_model: Callable[..., Any]) -> None:
    model, _ = make_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32)

    def first_row(last_position: int) -> Any:
        return model.model.rotary_emb(torch.zeros(1, 2, 64), torch.tensor([[5, last_position]]))[0][0, 0].clone()

    assert not torch.equal(first_row(6), first_row(90)), "transformers changed: the fix may no longer be needed"
    short = first_row(6)
    fix_rotation(model, model.config, 32)
    assert torch.equal(first_row(90), short)
    assert torch.equal(first_row(6), short)


def test_dynamic_rotation_beyond_its_length_is_refused(make_config: Callable[..., Any]) -> None:
    config = make_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert fixed_context(config, 100, 256)[0] == 100
    with pytest.raises(UnsupportedModelError, match="dynamic rotary embeddings, which change as a sequence grows"):
        fixed_context(config, 200, 256)
