"""How a model's folder says that it makes vectors: sentence-transformers' modules.json and what it names. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mxn.errors import ModelError, UnsupportedModelError
from mxn.store.integrity import read_json, read_json_list

Pooling = Literal["cls", "mean", "max", "lasttoken"]

GRAPH_NAMES = ("model.onnx", "onnx/model.onnx")
"""Where a folder may hold the model as an ONNX graph, in the order they are looked for."""

_POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingRecipe:
    """What makes one vector of a text's token vectors.

    pooling: how they are joined. is_normalised: whether the vector gets length 1.
    max_tokens: the longest text the model was made for, special tokens included; None where nothing says.
    """

    pooling: Pooling
    is_normalised: bool
    max_tokens: int | None

    def __str__(self) -> str:
        return f"pooling {self.pooling}{', length 1' if self.is_normalised else ''}, as the model says"


def read_recipe(folder: Path) -> EmbeddingRecipe | None:
    """The recipe in a model's folder, or None for a model that makes no vectors.

    Raises: ModelError for damaged files; UnsupportedModelError naming a step that mxn does not do.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    pooling: Pooling | None = None
    is_normalised = False
    for module in _modules(path):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder / str(module.get("path") or "1_Pooling") / "config.json", folder)
        elif kind == "Normalize":
            is_normalised = True
        elif kind != "Transformer":
            raise UnsupportedModelError(
                f"{path}: the vectors go through a module of type {kind or 'unknown'}; mxn has Transformer, Pooling "
                "and Normalize"
            )
    if pooling is None:
        raise UnsupportedModelError(f"{path}: expected a Pooling module, which makes one vector per text, found none")
    return EmbeddingRecipe(pooling=pooling, is_normalised=is_normalised, max_tokens=_max_tokens(folder))


def graph_file(folder: Path) -> Path | None:
    """The model's ONNX graph in its folder, or None."""
    return next((path for name in GRAPH_NAMES if (path := folder / name).exists()), None)


def _modules(path: Path) -> list[Mapping[str, Any]]:
    modules = read_json_list(path)
    if not all(isinstance(module, Mapping) for module in modules):
        raise ModelError(f"{path}: expected a list of objects, one for each module")
    return modules


def _pooling(path: Path, folder: Path) -> Pooling:
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ModelError(f"{path}: not found; it says how token vectors become one; fetch the model again")
    config = read_json(path)
    chosen = sorted(name for name, value in config.items() if name.startswith("pooling_mode_") and value is True)
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise UnsupportedModelError(
            f"{path}: expected one of {', '.join(_POOLINGS)}, found {', '.join(chosen) or 'none'}"
        )
    return _POOLINGS[chosen[0]]


def _max_tokens(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    found = read_json(path).get("max_seq_length") if path.is_file() else None
    if found is not None and (type(found) is not int or found < 1):
        raise ModelError(f"{path}: expected max_seq_length as a positive whole number, found {found!r}")
    return found
