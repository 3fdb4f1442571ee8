"""Vectors of tiny random models, held against transformers called text by text and pooled by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.errors import ConfigError, ModelError, OutOfMemoryError  # noqa: E402
from mxn.runner.embedding import TorchEncoderRunner, load_embedding_runner  # noqa: E402
from mxn.runner.encoder import CALL_TOKENS, padded_batches, pool  # noqa: E402
from mxn.store.embedding import EmbeddingRecipe  # noqa: E402
from mxn.store.fetch import fetch  # noqa: E402

pytestmark = pytest.mark.torch

VOCAB_SIZE, MAX_TOKENS = 97, 40
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 66},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": 66},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}
TEXTS = [[5, 6, 7], [9], list(range(2, 40)), [5, 6, 7], [11] * 17, [3, 4], list(range(50, 20, -1))]


def save_model(folder: Path, family: str, pooling: str, *, normalise: bool = True) -> Model:
    """A folder as sentence-transformers writes it, with random weights."""
    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": f"sentence.{name}"} for name in modules]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_TOKENS}))
    (folder / "tokenizer.json").write_text("{}")
    return fetch(str(folder), cache=folder.parent / "cache")


def load(model: Model, **settings: Any) -> TorchEncoderRunner:
    chosen = LoadSettings(threads=1, **settings)
    return load_embedding_runner(model, chosen, cores=1, free_bytes=lambda: 2**33, progress=lambda phase, done: None)


def by_hand(folder: str, text: list[int], pooling: str, *, normalise: bool) -> np.ndarray:
    """sentence-transformers' formula for one text without padding."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([text])).last_hidden_state[0].numpy()
    joined = {
        "mean_tokens": lambda: hidden.mean(0),
        "cls_token": lambda: hidden[0],
        "max_tokens": lambda: hidden.max(0),
        "lasttoken": lambda: hidden[-1],
    }[pooling]()
    return joined / np.linalg.norm(joined) if normalise else joined


@pytest.mark.parametrize(
    ("family", "pooling", "normalise"),
    [
        ("bert", "mean_tokens", True),
        ("bert", "mean_tokens", False),
        ("bert", "cls_token", True),
        ("bert", "max_tokens", True),
        ("roberta", "mean_tokens", True),
        ("mpnet", "mean_tokens", True),
        ("distilbert", "cls_token", True),
        ("qwen3", "lasttoken", True),
    ],
)
def test_vectors_are_those_of_transformers_whatever_else_is_in_the_batch(
    tmp_path: Path, family: str, pooling: str, normalise: bool
) -> None:
    model = save_model(tmp_path / "model", family, pooling, normalise=normalise)
    assert (model.spec.task, model.spec.max_context) == ("embed", MAX_TOKENS)
    runner = load(model)
    together = [np.frombuffer(vector, dtype="<f4") for vector in runner.embed(TEXTS)]
    for text, vector in zip(TEXTS, together, strict=True):
        alone = np.frombuffer(runner.embed([text])[0], dtype="<f4")
        expected = by_hand(model.folder, text, pooling, normalise=normalise)
        assert vector.shape == (32,)
        np.testing.assert_allclose(vector, alone, atol=1e-5)
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert np.array_equal(together[0], together[3])
    assert np.abs(together[0] - together[5]).max() > 1e-3


def test_batches_hold_every_text_once_with_little_padding() -> None:
    texts = [[1] * length for length in (1, 200, 3, 190, 2, 200, 90, 1)]
    batches = padded_batches(texts, pad_id=7, max_texts=len(texts))
    assert sorted(i for group, _, _ in batches for i in group) == list(range(8))
    for group, ids, mask in batches:
        assert [int(row.sum()) for row in mask] == [len(texts[i]) for i in group]
        assert (ids[mask == 0] == 7).all()
        assert (ids[mask == 1] == 1).all()
        assert int((mask == 0).sum()) <= CALL_TOKENS
    assert [len(group) for group, _, _ in padded_batches(texts, pad_id=0, max_texts=1)] == [1] * 8


@pytest.mark.parametrize("family", ["roberta", "mpnet", "bert"])
def test_the_longest_text_that_positions_allow_is_embedded(tmp_path: Path, family: str) -> None:
    folder = Path(save_model(tmp_path / "model", family, "mean_tokens").folder)
    (folder / "sentence_bert_config.json").unlink()
    model = fetch(str(folder), cache=tmp_path / "cache")
    assert model.spec.max_context == 64
    assert len(load(model).embed([[5] * 64])) == 1


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_padding_is_never_read(pooling: Any) -> None:
    recipe = EmbeddingRecipe(pooling=pooling, is_normalised=False, max_tokens=None)
    hidden = np.array([[[1.0, 2.0], [3.0, 5.0], [np.nan, np.nan]]], dtype=np.float32)
    expected = {"mean": [2, 3.5], "cls": [1, 2], "max": [3, 5], "lasttoken": [3, 5]}[pooling]
    assert pool(hidden, np.array([[1, 1, 0]]), recipe).tolist() == [expected]


def test_a_missing_weight_is_named_and_a_missing_pooler_is_not_needed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model(tmp_path / "model", "bert", "mean_tokens")
    file = Path(model.folder) / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if not n.startswith("pooler.")}, file, metadata={"format": "pt"})
    assert load(model).embed([[1, 2]])
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the first is encoder\.layer\.0\.output\.dense\.weight"):
        load(model)


def test_settings_it_does_not_have_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert", "mean_tokens")
    with pytest.raises(ConfigError, match="available: auto, fp32"):
        load(model, quantisation="int8")
    with pytest.raises(ConfigError, match='no option "kv"'):
        load(model, options=(("kv", "fp16"),))
    with pytest.raises(OutOfMemoryError, match="is free"):
        load_embedding_runner(model, LoadSettings(), cores=1, free_bytes=lambda: 10, progress=lambda phase, done: None)
