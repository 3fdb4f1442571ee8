"""Decoder graphs exported from a model: made once, kept in the cache, found again without what made them.

<cache>/graphs/models/<key>-<builder version>/   model.onnx, its weights, export.json, manifest.json
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mxn.config.environment import cache_dir
from mxn.core.model import Model
from mxn.errors import ModelError
from mxn.store.cache import Cache, Manifest, disk_errors, require_space
from mxn.store.convert import run_converter
from mxn.store.integrity import read_json

EXPORTER = (sys.executable, "-m", "mxn.runner.onnx.export")
GRAPH_NAME = "model.onnx"
FACTS_NAME = "export.json"
LAYOUT = 1  # counts up when what an exported folder holds changes
_BUILDER = "onnxruntime-genai"
_BITS = {"int4": 5, "int8": 9, "fp16": 16, "fp32": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphOptions:
    """How a graph is exported. block_size: weights that share a scale. target: the kind of chip it is made for."""

    precision: str
    block_size: int = 32
    target: str = "cpu"

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--precision", self.precision, "--block-size", str(self.block_size), "--target", self.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedGraph:
    """A graph on this disk. facts: sentences on what made it."""

    path: Path
    facts: tuple[str, ...]


def exported_graph(
    model: Model,
    options: GraphOptions,
    *,
    progress: Callable[[str, float], None],
    command: Sequence[str] = EXPORTER,
    cache: Path | None = None,
) -> ExportedGraph:
    """The model as a graph: the one in the cache, or a new one.

    Without the builder in this environment, the newest that any of its versions made is taken.
    Raises: ModelError with the exporter's last words, or what to install.
    """
    store = Cache(root=(cache or cache_dir()) / "graphs")
    stem = _stem(model, options)
    builder = _builder_version()
    key = f"{stem}-{builder}" if builder else _newest(store, stem)
    if key is None:
        raise ModelError(
            f"{model.name} was not exported to {options.precision} yet, and this environment cannot: "
            "install with: pip install 'mxn[onnx]', here or once in another environment with the same cache"
        )
    manifest = _whole(store, key)
    if manifest is None:
        if builder is None:
            raise ModelError(f"the exported graph {store.model_folder(key)} is damaged; delete it and export again")
        with disk_errors(store, key), store.lock(key, lambda: progress("export: waiting for another process", 0.0)):
            manifest = _whole(store, key) or _export(model, options, store, key, command, progress)
    folder = store.model_folder(key)
    facts = read_json(folder / FACTS_NAME)
    return ExportedGraph(path=folder / GRAPH_NAME, facts=tuple(str(value) for value in facts.values()))


def _export(
    model: Model,
    options: GraphOptions,
    store: Cache,
    key: str,
    command: Sequence[str],
    progress: Callable[[str, float], None],
) -> Manifest:
    staging = store.staging_folder(key)
    shutil.rmtree(staging, ignore_errors=True)
    out = staging / "out"
    out.mkdir(parents=True)
    try:
        if model.spec.num_parameters is not None:
            needed = model.spec.num_parameters * _BITS[options.precision] // 8
            require_space(staging, int(1.2 * needed), what=f"the {options.precision} graph of {model.name}")
        run_converter(
            [*command, model.folder, str(out), *options.arguments],
            out,
            f"{model.name} could not be exported to {options.precision}",
            extra="onnx",
            progress=lambda phase, fraction: progress(f"export: {phase}", fraction),
        )
        manifest = Manifest(name=model.name, source=model.revision, origin=" ".join(options.arguments))
        return store.publish(key, out, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _whole(store: Cache, key: str) -> Manifest | None:
    manifest = store.manifest(key)
    return manifest if manifest is not None and store.damage(key, manifest) is None else None


def _stem(model: Model, options: GraphOptions) -> str:
    text = "\n".join([str(LAYOUT), model.revision, *options.arguments])
    return f"{model.name.replace('/', '--')}-{options.precision}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _newest(store: Cache, stem: str) -> str | None:
    keys = [key for key in store.model_keys() if key.startswith(f"{stem}-")]
    created = {key: manifest.created_s for key in keys if (manifest := store.manifest(key)) is not None}
    return max(created, key=lambda key: created[key], default=None)


def _builder_version() -> str | None:
    """The builder's version when it can run here, else None; it needs torch."""
    try:
        version("torch")
        return version(_BUILDER)
    except PackageNotFoundError:
        return None
