"""4-bit weights: from floats, from a file's own blocks, and the check without which they are not served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mxn.core.model import LoadSettings, Model
from mxn.errors import ModelError, UnsupportedModelError
from mxn.runner import cpu
from mxn.runner.convert_gguf import convert
from mxn.runner.gguf_blocks import GgufBlocks
from mxn.runner.gguf_file import GgufFile
from mxn.runner.likelihood import mean_nll, sample_ids
from mxn.runner.loading import load_config, load_model
from mxn.runner.quantise import PackedLinear, quantise_int4
from mxn.store.spec import spec_from_config

from .test_convert_gguf import VOCAB_SIZE, write_gguf

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("kernels")]

KINDS = {kind: getattr(gguf.GGMLQuantizationType, kind.upper()) for kind in ("q4_0", "q4_1", "q8_0")}


@pytest.fixture
def make_folder(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A converted folder with the GGUF file it came from beside it."""

    def make(kind: str = "q4_0", family: str = "llama", architecture: str = "llama") -> Path:
        model, _ = make_model(family, vocab_size=VOCAB_SIZE, max_position_embeddings=4096, tie_word_embeddings=True)
        folder = tmp_path / "converted"
        folder.mkdir()
        source = write_gguf(folder / "model.gguf", model, architecture, kind=KINDS[kind])
        convert(source, folder, dtype=torch.bfloat16, progress=lambda phase, fraction: None)
        return folder

    return make


def loaded(folder: Path) -> Any:
    return load_model(
        str(folder), load_config(str(folder)), dtype=torch.float32, device="cpu", progress=lambda phase, fraction: None
    )


def served(folder: Path, **settings: Any) -> Any:
    spec = spec_from_config(json.loads((folder / "config.json").read_text()))
    model = Model(name="tiny", folder=str(folder), revision="0", spec=spec)
    chosen = LoadSettings(**({"quantisation": "int4", "kv_bytes": 2**22, "threads": 1} | settings))
    return cpu.load_cpu_runner(model, chosen, cores=1, free_bytes=lambda: 2**32, progress=lambda phase, fraction: None)


@pytest.mark.parametrize(
    ("kind", "family", "architecture"),
    [*((kind, "llama", "llama") for kind in KINDS), ("q4_0", "gemma3_text", "gemma3")],
)
def test_blocks_of_the_file_are_taken_without_rounding(
    kind: str, family: str, architecture: str, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(kind, family, architecture)
    model = loaded(folder)
    blocks = GgufBlocks.beside(str(folder), model.config.to_dict())
    report = quantise_int4(model, threads=1, blocks=blocks)
    assert report.from_blocks == report.linears - 1 == 7 * 3
    file = GgufFile(folder / "model.gguf")
    for name, part in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        tensor = file.tensors[f"blk.1.{part}.weight"]
        found = model.get_submodule(f"model.layers.1.{name}")
        assert found.packed.format == kind
        assert np.array_equal(found.packed.dequantise().numpy(), file.read(tensor))
    assert model.lm_head.packed.format == "int8"


def test_rows_that_llama_cpp_reorders_are_put_back(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("q8_0")
    model = loaded(folder)
    weight = model.model.layers[2].self_attn.q_proj.weight.clone()
    blocks = GgufBlocks.beside(str(folder), model.config.to_dict())
    quantise_int4(model, threads=1, blocks=blocks)
    packed = model.model.layers[2].self_attn.q_proj.packed
    assert packed.format == "q8_0"
    # The folder holds the same weights rounded to bfloat16: 2^-9 of each.
    assert torch.allclose(packed.dequantise(), weight, rtol=2**-8, atol=0)


def test_blocks_that_do_not_mean_the_loaded_weights_are_not_used(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("q4_1")
    model = loaded(folder)
    model.model.layers[0].mlp.up_proj.weight[3] *= -1
    blocks = GgufBlocks.beside(str(folder), model.config.to_dict())
    report = quantise_int4(model, threads=1, blocks=blocks)
    assert report.from_blocks == 7 * 3 - 1
    assert "20 of them are the GGUF file's own blocks" in report.lines()[0]


def test_folder_without_blocks_has_its_floats_rounded(make_model: Callable[..., Any]) -> None:
    _, saved = make_model("llama")
    model = loaded(Path(saved.folder))
    assert GgufBlocks.beside(saved.folder, model.config.to_dict()) is None
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    report = quantise_int4(model, threads=1)
    assert (report.from_blocks, report.kept) == (0, [])
    packed = model.model.layers[0].mlp.down_proj
    assert isinstance(packed, PackedLinear)
    # Sixteen steps over a group's range of about four sigma.
    assert 0.03 < float((packed.packed.dequantise() - before).norm() / before.norm()) < 0.1


def test_layer_that_four_bits_would_spoil_gets_eight(make_model: Callable[..., Any]) -> None:
    _, saved = make_model("llama")
    model = loaded(Path(saved.folder))
    weight = model.model.layers[0].mlp.down_proj.weight
    weight[:, ::32] = 20 * weight.std()  # each group's step becomes as large as most of its other weights
    report = quantise_int4(model, threads=1)
    ((name, reason),) = report.kept
    assert name == "model.layers.0.mlp.down_proj"
    assert reason.startswith("4 bits would be off by ")
    assert reason.endswith("more than 10%; kept in 8 bits")
    assert model.get_submodule(name).packed.format == "int8"
    assert model.model.layers[1].mlp.down_proj.packed.format == "q4_1"


def test_int4_is_served_with_what_it_costs(
    make_folder: Callable[..., Path], decode: Callable[..., list[list[int]]]
) -> None:
    folder = make_folder("q4_0")
    runner = served(folder)
    assert (runner.quantisation, runner.attention_name, runner.program) == ("int4", "cpu-cpp", "step program")
    assert any("mean negative log-likelihood of 512 tokens of text is " in note for note in runner.notes)
    prompts = [list(range(3, 20)), list(range(40, 50))]
    together = decode(runner, prompts, 5, budget=64)
    assert together == [decode(runner, [prompt], 5, budget=9)[0] for prompt in prompts]


def test_int4_that_costs_too_much_is_refused_with_the_figures(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "MAX_INT4_CHANGE", -0.9)
    with pytest.raises(UnsupportedModelError, match=r"not offered in int4: its mean .* available: int8, fp32, bf16"):
        served(make_folder("q4_0"))


def test_sample_is_in_the_models_tokens_and_its_likelihood_that_of_transformers(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder("q8_0")
    ids = sample_ids(str(folder), 300)
    assert len(ids) == 300
    assert len(sample_ids(str(folder), 10**6)) == 512
    found = mean_nll(loaded(folder), ids)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]))
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: the sample text cannot be turned into tokens"):
        sample_ids(str(tmp_path), 512)
