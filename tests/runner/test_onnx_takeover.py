"""4-bit weights of a GGUF file in an exported graph: the same values, bit for bit, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")

from mxn.runner.convert_gguf import convert  # noqa: E402
from mxn.runner.gguf_architectures import ARCHITECTURES  # noqa: E402
from mxn.runner.gguf_file import GgufFile  # noqa: E402
from mxn.runner.onnx.export import main  # noqa: E402
from mxn.runner.onnx.graph import check_graph_file  # noqa: E402
from mxn.runner.onnx.takeover import dequantise  # noqa: E402

from .test_convert_gguf import VOCAB_SIZE, write_gguf  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def exported(make_model: Callable[..., Any], tmp_path: Path) -> Callable[[str], tuple[Path, GgufFile]]:
    """A tiny model from a GGUF file of one kind as an int4 graph, and the file."""

    def make(kind: str) -> tuple[Path, GgufFile]:
        model, _ = make_model("llama", vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
        folder, out = tmp_path / "converted", tmp_path / "out"
        folder.mkdir()
        source = write_gguf(folder / "model.gguf", model, "llama", kind=gguf.GGMLQuantizationType[kind])
        convert(source, folder, dtype=torch.bfloat16, progress=lambda phase, fraction: None)
        assert main([str(folder), str(out), "--precision", "int4"]) == 0
        return out, GgufFile(source)

    return make


def test_q4_0_weights_are_the_files_own(exported: Callable[[str], tuple[Path, GgufFile]]) -> None:
    out, file = exported("Q4_0")
    path = out / "model.onnx"
    graph = check_graph_file(path)
    llama = ARCHITECTURES["llama"]
    config = llama.config(file)
    assert config is not None
    for layer in range(3):
        for name, parts in (
            ("attn.qkv_proj", ("attn_q", "attn_k", "attn_v")),
            ("attn.o_proj", ("attn_output",)),
            ("mlp.gate_proj", ("ffn_gate",)),
            ("mlp.down_proj", ("ffn_down",)),
        ):
            tensors = [file.tensors[f"blk.{layer}.{part}.weight"] for part in parts]
            want = np.concatenate([llama.restore(tensor.name, file.read(tensor), config) for tensor in tensors])
            found = dequantise(graph, path, f"model.layers.{layer}.{name}.MatMul.weight")
            np.testing.assert_array_equal(found, want)
    facts = json.loads((out / "export.json").read_text())
    assert facts["takeover"].startswith("15 of 15 4-bit weights taken from model.gguf bit for bit")


def test_q4_1_weights_stay_as_the_builder_rounded_them(exported: Callable[[str], tuple[Path, GgufFile]]) -> None:
    out, _ = exported("Q4_1")
    facts = json.loads((out / "export.json").read_text())
    assert facts["takeover"].startswith("0 of 15 4-bit weights")
    assert "15 in q4_1" in facts["takeover"]
