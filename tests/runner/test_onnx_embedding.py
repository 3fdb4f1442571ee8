"""Vectors from ONNX graphs: what a graph must be, and that texts never change each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.errors import ConfigError, ModelError, UnsupportedModelError  # noqa: E402
from mxn.runner.onnx.embedding import OnnxEncoderRunner, load_onnx_embedding_runner  # noqa: E402
from mxn.store.spec import spec_from_config  # noqa: E402

SIZE, VOCAB_SIZE = 6, 20
TABLE = np.random.default_rng(3).standard_normal((VOCAB_SIZE, SIZE)).astype(np.float32)
TEXTS = [[1, 2, 3], [4], [5] * 9, [6, 7], [1, 2, 3]]


def save_graph(path: Path, *, inputs: tuple[str, ...] = ("input_ids", "attention_mask"), is_joint: bool = False) -> Any:
    """A graph whose token vectors are rows of a table; joint: rounded to 8 bits on the whole batch's scale."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows" if is_joint else "hidden"])]
    if is_joint:
        nodes.append(helper.make_node("DynamicQuantizeLinear", ["rows"], ["q", "scale", "zero"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["hidden"]))
    given = [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in inputs]
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["texts", "tokens", SIZE])
    graph = helper.make_graph(nodes, "encoder", given, [hidden], [numpy_helper.from_array(TABLE, "table")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, path)
    return proto


def model_in(folder: Path) -> Model:
    config = {
        "model_type": "bert",
        "num_hidden_layers": 1,
        "hidden_size": SIZE,
        "intermediate_size": 8,
        "vocab_size": VOCAB_SIZE,
        "num_attention_heads": 1,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    modules = [{"path": "", "type": f"sentence.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return Model(name="tiny", folder=str(folder), revision="1", spec=spec_from_config(config))


def load(model: Model, **settings: Any) -> OnnxEncoderRunner:
    chosen = LoadSettings(threads=1, **settings)
    return load_onnx_embedding_runner(
        model, chosen, cores=1, free_bytes=lambda: 2**33, progress=lambda phase, done: None
    )


def vectors(runner: OnnxEncoderRunner, texts: list[list[int]]) -> list[np.ndarray]:
    return [np.frombuffer(vector, dtype="<f4") for vector in runner.embed(texts)]


def expected(text: list[int]) -> np.ndarray:
    mean = TABLE[text].mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize(
    "inputs",
    [
        ("input_ids", "attention_mask"),
        ("attention_mask", "token_type_ids", "input_ids"),
        ("input_ids", "attention_mask", "position_ids"),
    ],
)
def test_a_graph_gives_the_mean_of_its_token_vectors(tmp_path: Path, inputs: tuple[str, ...]) -> None:
    save_graph(tmp_path / "model.onnx", inputs=inputs)
    runner = load(model_in(tmp_path))
    for text, vector in zip(TEXTS, vectors(runner, TEXTS), strict=True):
        np.testing.assert_allclose(vector, expected(text), atol=1e-6)
    assert not runner.facts.is_joint
    assert runner.facts.quantisation == "fp32"


def test_texts_do_not_change_each_other_where_a_graph_rounds_whole_batches(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx", is_joint=True)
    runner = load(model_in(tmp_path))
    together = vectors(runner, TEXTS)
    alone = [vectors(runner, [text])[0] for text in TEXTS]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))
    assert runner.facts.is_joint
    assert "one by one" in runner.facts.notes[-1]


def test_the_hubs_folder_for_graphs_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    save_graph(tmp_path / "onnx" / "model.onnx")
    assert len(load(model_in(tmp_path)).embed([[1]])) == 1


def test_a_graph_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    proto = save_graph(tmp_path / "model.onnx")
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../w.bin"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the graph's folder"):
        load(model_in(tmp_path))


def test_weights_beside_the_graph_are_found(tmp_path: Path) -> None:
    proto = save_graph(tmp_path / "model.onnx")
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    np.testing.assert_allclose(vectors(load(model_in(tmp_path)), [[1, 2]])[0], expected([1, 2]), atol=1e-6)


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    model = model_in(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"has no model\.onnx or onnx/model\.onnx"):
        load(model)
    save_graph(tmp_path / "model.onnx", inputs=("input_ids", "attention_mask", "past_key_values"))
    with pytest.raises(UnsupportedModelError, match="the graph takes input_ids, attention_mask, past_key_values"):
        load(model)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="damaged"):
        load(model)


def test_settings_it_does_not_have_are_refused(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx")
    model = model_in(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.onnx of tiny has fp32; available: auto, fp32"):
        load(model, quantisation="int8")
    with pytest.raises(ConfigError, match="options of models that generate"):
        load(model, options=(("block_size", "32"),))
