"""What a folder says about vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mxn.errors import ModelError, UnsupportedModelError
from mxn.store.embedding import EmbeddingRecipe, read_recipe

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MEAN = {"word_embedding_dimension": 384, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def folder_with(path: Path, modules: Any, pooling: Any = MEAN, sentence: Any = None) -> Path:
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if sentence is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps(sentence))
    return path


def test_a_folder_without_modules_makes_no_vectors(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) is None


def test_a_recipe_is_read(tmp_path: Path) -> None:
    found = read_recipe(folder_with(tmp_path, MODULES, sentence={"max_seq_length": 256}))
    assert found == EmbeddingRecipe(pooling="mean", is_normalised=True, max_tokens=256)


def test_without_a_normalize_module_lengths_stay(tmp_path: Path) -> None:
    found = read_recipe(folder_with(tmp_path, MODULES[:2], {"pooling_mode_cls_token": True}))
    assert found == EmbeddingRecipe(pooling="cls", is_normalised=False, max_tokens=None)


@pytest.mark.parametrize(
    ("modules", "pooling", "sentence", "kind", "words"),
    [
        ([*MODULES, {"type": "x.Dense", "path": "3_Dense"}], MEAN, None, UnsupportedModelError, "of type Dense"),
        (MODULES[:1], MEAN, None, UnsupportedModelError, "expected a Pooling module"),
        (MODULES, {"pooling_mode_weightedmean_tokens": True}, None, UnsupportedModelError, "weightedmean"),
        (MODULES, {**MEAN, "pooling_mode_cls_token": True}, None, UnsupportedModelError, "found pooling_mode_cls"),
        (MODULES, {}, None, UnsupportedModelError, "found none"),
        ([{"type": "x.Pooling", "path": "../1_Pooling"}], MEAN, None, ModelError, "not found"),
        ({}, MEAN, None, ModelError, "expected a list"),
        (["Pooling"], MEAN, None, ModelError, "expected a list of objects"),
        (MODULES, MEAN, {"max_seq_length": "256"}, ModelError, "max_seq_length as a positive whole number"),
    ],
)
def test_what_cannot_be_followed_is_named(
    tmp_path: Path, modules: Any, pooling: Any, sentence: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        read_recipe(folder_with(tmp_path, modules, pooling, sentence))
