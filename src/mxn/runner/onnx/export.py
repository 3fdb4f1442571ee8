"""Exports a model folder as a decoder graph: `python -m mxn.runner.onnx.export FOLDER OUT --precision int4`.

Runs onnxruntime-genai's model builder, which needs torch, and then writes 4-bit weights of a GGUF file over the ones it
rounded itself. Prints progress as JSON lines {"phase", "fraction"}; on failure one line {"error"} and exit status 1.
OUT may be left half-written by a failure: the caller renames it into place.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from mxn.errors import ModelError, MxnError, UnsupportedModelError
from mxn.store.graphs import FACTS_NAME, GRAPH_NAME

_BUILDER = "onnxruntime_genai.models.builder"
_LAYER = re.compile(r"Reading (?:decoder )?layer (\d+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mxn.runner.onnx.export", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=("int4", "int8", "fp32", "fp16"), default="int4")
    parser.add_argument("--block-size", type=int, default=32, help="weights that share a scale")
    parser.add_argument("--target", choices=("cpu", "cuda", "dml"), default="cpu")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    report = sys.stdout

    def progress(phase: str, fraction: float) -> None:
        print(json.dumps({"phase": phase, "fraction": round(fraction, 4)}), file=report, flush=True)

    try:
        export(
            options.folder,
            options.out,
            precision=options.precision,
            block_size=options.block_size,
            target=options.target,
            progress=progress,
        )
    except MxnError as error:
        print(json.dumps({"error": str(error)}), file=report, flush=True)
        return 1
    except Exception as error:  # the caller reads one line, whatever went wrong
        print(json.dumps({"error": f"{options.folder}: {type(error).__name__}: {error}"}), file=report, flush=True)
        return 1
    return 0


def export(
    folder: Path, out: Path, *, precision: str, block_size: int, target: str, progress: Callable[[str, float], None]
) -> None:
    """Writes model.onnx, its weights and export.json into `out`.

    Raises: UnsupportedModelError when the builder does not know the architecture.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    num_layers = int(config.get("num_hidden_layers") or 1)
    out.mkdir(parents=True, exist_ok=True)
    progress("graph", 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["-m", folder.name, "-i", str(folder), "-o", str(out), "-p", precision, "-e", target, "-c", scratch]
        arguments += ["--extra_options", "hf_token=false", "hf_remote=false"]
        if precision in ("int4", "int8"):
            arguments += [f"block_size={block_size}", *(["accuracy_level=4"] if target == "cpu" else [])]
        _build(arguments, lambda layer: progress("graph", min(1.0, (layer + 1) / num_layers)))
    if not (out / GRAPH_NAME).is_file():
        raise ModelError(f"{folder}: the model builder wrote no {GRAPH_NAME}")
    for file in out.iterdir():
        if not file.name.startswith(GRAPH_NAME):
            file.unlink()  # tokenizer and the builder's own settings: the model folder has them
    progress("graph", 1.0)
    facts: dict[str, object] = {"builder": f"onnxruntime-genai {version('onnxruntime-genai')}"}
    if precision == "int4" and block_size == 32:
        from mxn.runner.gguf_blocks import GgufBlocks
        from mxn.runner.onnx.takeover import take_over

        progress("takeover", 0.0)
        blocks = GgufBlocks.beside(str(folder), config)
        if blocks is not None:
            facts["takeover"] = take_over(blocks, out / GRAPH_NAME)
        progress("takeover", 1.0)
    (out / FACTS_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _build(arguments: Sequence[str], on_layer: Callable[[int], None]) -> None:
    """Runs the builder's command line in this process, its output read for progress and kept for errors."""
    lines = _Lines(on_layer, sys.stderr)
    before = sys.argv, sys.stdout
    sys.argv, sys.stdout = [_BUILDER, *arguments], lines  # type: ignore[assignment]
    try:
        runpy.run_module(_BUILDER, run_name="__main__", alter_sys=True)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"onnxruntime-genai's model builder cannot export this model: {error}") from error
    except SystemExit as error:
        if error.code not in (None, 0):
            raise ModelError(f"the model builder ended with {error.code!r}") from error
    finally:
        sys.argv, sys.stdout = before


class _Lines:
    """A text stream that hands the builder's layer numbers on and sends every line to the log."""

    def __init__(self, on_layer: Callable[[int], None], log: TextIO) -> None:
        self._on_layer = on_layer
        self._log = log

    def write(self, text: str) -> int:
        if (found := _LAYER.search(text)) is not None:
            self._on_layer(int(found[1]))
        return self._log.write(text)

    def flush(self) -> None:
        self._log.flush()

    def isatty(self) -> bool:
        return False


if __name__ == "__main__":
    sys.exit(main())
