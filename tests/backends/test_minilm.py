"""A real model that embeds, by two backends: the same vectors, and sentences of one meaning nearer than others."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from mxn.backends.base import Backend, Embedder
from mxn.backends.cpu import CpuBackend
from mxn.backends.onnx import OnnxBackend
from mxn.core.model import LoadSettings, Model
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import DownloadError
from mxn.store.fetch import fetch

pytestmark = [pytest.mark.torch, pytest.mark.model]

PAIRS = (
    ("A man is playing a guitar.", "Someone plays a string instrument."),
    ("How do I reset my password?", "I forgot my login and want a new one."),
    ("The stock market fell sharply on Monday.", "Share prices dropped at the start of the week."),
    ("Water boils at one hundred degrees.", "At sea level, the boiling point of water is 100 °C."),
)
TEXTS = (
    *(text for pair in PAIRS for text in pair),
    "x",
    "def f(a): return a + 1",
    "Wo ist der Bahnhof? " * 12,
    "é" * 40,
)


@pytest.fixture(scope="module")
def minilm() -> Model:
    try:
        return fetch("minilm-l6-v2")
    except DownloadError as error:
        pytest.skip(f"the weights cannot be fetched here: {error}")


def vectors(backend: Backend, model: Model) -> np.ndarray:
    tokenizer = Tokenizer.load(model.folder)
    texts = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    embedder = backend.load(model, LoadSettings(), backend.chips(), lambda phase, fraction: None)
    assert isinstance(embedder, Embedder)
    try:
        together = [np.frombuffer(vector, dtype="<f4") for vector in embedder.embed(texts)]
        for text, vector in zip(texts, together, strict=True):
            alone = np.frombuffer(embedder.embed([text])[0], dtype="<f4")
            np.testing.assert_allclose(vector, alone, atol=1e-5)
        return np.stack(together)
    finally:
        embedder.close()


def test_both_backends_give_the_same_vectors(minilm: Model) -> None:
    torch_vectors, onnx_vectors = vectors(CpuBackend(), minilm), vectors(OnnxBackend(), minilm)
    assert torch_vectors.shape == onnx_vectors.shape == (len(TEXTS), 384)
    for found in (torch_vectors, onnx_vectors):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        likeness = found[: 2 * len(PAIRS) : 2] @ found[1 : 2 * len(PAIRS) : 2].T
        assert likeness.argmax(1).tolist() == list(range(len(PAIRS)))
    cosines = (torch_vectors * onnx_vectors).sum(1)
    assert cosines.min() > 0.99, cosines
