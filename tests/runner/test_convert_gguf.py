"""GGUF files become folders with the same weights, tokens and end tokens; damaged ones become one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from mxn.errors import ModelError  # noqa: E402
from mxn.runner.convert_gguf import convert, main  # noqa: E402
from mxn.runner.gguf_file import GgufFile  # noqa: E402

pytestmark = pytest.mark.torch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL) + 1
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA_NAMES = {"post_attention_layernorm": "ffn_norm"}
GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key weights of Llama."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Any, architecture: str, *, kind: Any = None, extra: dict[str, np.ndarray] | None = None
) -> Path:
    """A tiny model as llama.cpp's converter would write it, with a byte-level tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    from tokenizers.pre_tokenizers import ByteLevel

    writer.add_token_list([*sorted(ByteLevel.alphabet()), *SPECIAL, "ab"])
    writer.add_token_types([1] * 256 + [3] * len(SPECIAL) + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    writer.add_chat_template(TEMPLATE)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = parameter.float().numpy()
        target = gguf_name(name, GEMMA3_NAMES if architecture == "gemma3" else LLAMA_NAMES)
        if architecture == "llama" and (".attn_q." in target or ".attn_k." in target):
            heads = config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads
            data = interleave(data, heads)
        if architecture == "gemma3" and target.endswith("norm.weight"):
            data = data + 1
        if kind is not None and data.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(data))
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str, differing: dict[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{(LAYER_NAMES | differing)[part]}.{leaf}"


@pytest.fixture
def make_file(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    def make(family: str = "llama", architecture: str = "llama", **options: Any) -> tuple[Any, Path]:
        model, _ = make_model(family, vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96)
        return model, write_gguf(tmp_path / "model.gguf", model, architecture, **options)

    return make


def converted(source: Path, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    convert(source, folder, dtype=torch.float32, progress=lambda phase, fraction: None)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(("family", "architecture"), [("llama", "llama"), ("gemma3_text", "gemma3")])
def test_weights_survive_to_the_same_logits(
    family: str, architecture: str, make_file: Callable[..., Any], tmp_path: Path
) -> None:
    model, source = make_file(family, architecture)
    ours = converted(source, tmp_path / "out")
    assert type(ours) is type(model)
    ids = torch.arange(20)[None] * 7 % VOCAB_SIZE
    if architecture == "gemma3":  # a file names no pattern of layers: every sixth is a full one, as in all Gemma 3
        assert ours.config.layer_types == ["sliding_attention"] * 3
        ours.config.layer_types = model.config.layer_types
        for mine, theirs in zip(ours.model.layers, model.model.layers, strict=True):
            mine.self_attn.sliding_window = theirs.self_attn.sliding_window
        for name, parameter in model.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], parameter, atol=1e-6), name
        return
    with torch.inference_mode():
        assert torch.allclose(ours(ids).logits, model(ids).logits, atol=1e-5)


def test_quantised_weights_are_dequantised(make_file: Callable[..., Any], tmp_path: Path) -> None:
    model, source = make_file(kind=gguf.GGMLQuantizationType.Q8_0)
    ours = converted(source, tmp_path / "out")
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    found = ours.model.layers[1].mlp.down_proj.weight.detach()
    assert not torch.equal(found, weight)
    assert torch.allclose(found, weight, atol=float(weight.abs().max()) / 100)


def test_tokenizer_template_and_end_tokens_are_kept(make_file: Callable[..., Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    _, source = make_file()
    convert(source, tmp_path / "out", dtype=torch.bfloat16, progress=lambda phase, fraction: None)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = tokenizer.encode("naïve 你好 ab<|im_end|>").ids
    assert ids[-2:] == [259, 258]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "naïve 你好 ab<|im_end|>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [256, 258]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True


def llama3_factors(half_dim: int, factor: float) -> np.ndarray:
    lengths = 2 * np.pi * 10000.0 ** (np.arange(half_dim) / half_dim)
    smooth = (8192 / lengths - 1) / 3
    middle = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < 2048, 1.0, np.where(lengths > 8192, factor, middle)).astype(np.float32)


def test_llama3_rotary_scaling_is_recognised(make_file: Callable[..., Any], tmp_path: Path) -> None:
    _, source = make_file(extra={"rope_freqs.weight": llama3_factors(8, 8.0)})
    ours = converted(source, tmp_path / "out")
    assert ours.config.rope_parameters["rope_type"] == "llama3"
    assert ours.config.rope_parameters["factor"] == 8.0


def test_unknown_rotary_factors_are_refused(make_file: Callable[..., Any], tmp_path: Path) -> None:
    _, source = make_file(extra={"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)})
    with pytest.raises(ModelError, match="not those of Llama 3"):
        convert(source, tmp_path / "out", dtype=torch.float32, progress=lambda phase, fraction: None)


def test_command_line_reports_progress_as_json_lines(
    make_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = make_file()
    assert main([str(source), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["phase"] for line in lines} == {"header", "weights", "tokenizer"}
    assert lines[-1] == {"phase": "tokenizer", "fraction": 1.0}


@pytest.mark.parametrize("keep", [0, 3, 4, 30, 2000, -1])
def test_cut_off_files_end_in_one_line_of_json(
    keep: int, make_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = make_file()
    source.write_bytes(source.read_bytes()[:keep])
    assert main([str(source), str(tmp_path / "out")]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == ["error"]
    assert "model.gguf" in last["error"]


def test_missing_file_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a GGUF file, found none"):
        GgufFile(tmp_path / "nothing.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="found one that starts with"):
        GgufFile(tmp_path / "zip.gguf")


def test_unknown_architecture_is_refused_with_what_is_available(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "not-yet-invented")
    writer.add_token_list(["a"])
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="neither mxn nor transformers can read GGUF architecture 'not-yet-invented'"):
        convert(tmp_path / "odd.gguf", tmp_path / "out", dtype=torch.float32, progress=lambda phase, fraction: None)
