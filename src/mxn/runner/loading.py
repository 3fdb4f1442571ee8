"""Loads a model's config and weights from a Hugging Face folder: safetensors only, no code, no pickles."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from mxn.errors import ModelError, UnsupportedModelError
from mxn.runner.attention_hook import ATTENTION_NAME, register
from mxn.runner.refusals import refusal

LoadProgress = Callable[[str, float], None]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_POOLER = "pooler."
"""Layers of BERT's classifier over its first token, which no vector goes through and some files lack."""
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format's own limit


def load_config(folder: str) -> PreTrainedConfig:
    """The model's own config with every default filled in, language part only.

    Raises: ModelError for a damaged file; UnsupportedModelError with the reason for what mxn refuses.
    """
    raw = _read_json(Path(folder) / "config.json")
    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{_model_type(raw)} asks for model code of its own (auto_map) and transformers {transformers.__version__} "
            "has none for it; mxn never runs code that comes with weights"
        )
    reason = refusal(raw)
    if reason:
        raise UnsupportedModelError(f"{_model_type(raw)} cannot be served: {reason}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} cannot read the config of {_model_type(raw)}: {error}"
        ) from error
    config = config.get_text_config(decoder=True)
    reason = refusal(config.to_dict())
    if reason:
        raise UnsupportedModelError(f"{config.model_type} cannot be served: {reason}")
    return config


def load_model(
    folder: str, config: PreTrainedConfig, *, dtype: torch.dtype | None, device: str, progress: LoadProgress
) -> PreTrainedModel:
    """The model in evaluation mode with mxn's attention function. The config is copied: transformers writes to it.

    Args: dtype: None for that of the files.
    Raises: ModelError that names a missing, truncated or incomplete file, or a weight that holds NaN or infinity.
    """
    register()
    model = _load(
        AutoModelForCausalLM,
        folder,
        progress,
        config=copy.deepcopy(config),
        dtype=dtype or "auto",
        attn_implementation=ATTENTION_NAME,
    )
    return model.to(device).eval().requires_grad_(False)


def load_encoder(folder: str, *, progress: LoadProgress) -> PreTrainedModel:
    """The model without a head, in float32 and evaluation mode, with transformers' own attention.

    Raises: ModelError as `load_model`; UnsupportedModelError when transformers has no such architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} cannot read the config: {error}"
        ) from error
    model = _load(AutoModel, folder, progress, unused=_POOLER, config=config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _load(auto: type, folder: str, progress: LoadProgress, *, unused: str | None = None, **settings: Any) -> Any:
    """A model by one of transformers' auto classes, from safetensors alone, every weight there and finite.

    Args: unused: weights whose names begin so may be missing.
    """
    files = check_weight_files(folder)
    with _reported(progress):
        try:
            model, report = auto.from_pretrained(  # type: ignore[attr-defined]
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder}: transformers could not load the weights: {error}") from error
    if unused is not None:
        report["missing_keys"] = [key for key in report.get("missing_keys") or () if not key.startswith(unused)]
    _check_report(folder, files, report)
    _check_finite(folder, model)
    return model


def check_weight_files(folder: str) -> list[Path]:
    """The safetensors files of a folder, each found whole.

    Raises: ModelError naming the file, what was found and what was expected.
    """
    root = Path(folder)
    if (root / _INDEX).exists():
        weight_map = _read_json(root / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{root / _INDEX}: expected a weight_map of tensor names to files, found none")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{root / _INDEX}: expected plain file names, found {outside[0]!r}")
        files = [root / name for name in names]
    else:
        files = [root / _SINGLE]
    for file in files:
        if not file.exists():
            others = sorted(path.name for path in root.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
            hint = f"; found {', '.join(others)}, which mxn does not load from here" if others else ""
            raise ModelError(f"{file}: expected a safetensors file, found none{hint}; fetch the model again")
        _check_safetensors(file)
    return files


def count_weights(files: Sequence[Path]) -> int:
    """Elements of all tensors in the files."""
    shapes = (entry["shape"] for file in files for entry in _check_safetensors(file).values())
    return sum(math.prod(shape) for shape in shapes)


def _check_safetensors(file: Path) -> dict[str, Any]:
    """The header of a file whose size is what that header promises, without its metadata."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(
                f"{file}: expected a safetensors header of {header_bytes} bytes, found a file of {size} bytes; "
                "it is cut off or of another kind: fetch the model again"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{file}: the safetensors header is damaged ({error}); fetch the model again") from error
    expected = 8 + header_bytes + end
    if size != expected:
        raise ModelError(f"{file}: expected {expected} bytes, found {size}; it is cut off: fetch the model again")
    return header


def _check_report(folder: str, files: list[Path], report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    mismatched = report.get("mismatched_keys") or ()
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are in none of {', '.join(file.name for file in files)}, "
            f"expected all; the first is {missing[0]}"
        )
    if mismatched:
        raise ModelError(f"{folder}: weights have other shapes than the config says: {next(iter(mismatched))}")


def _check_finite(folder: str, model: PreTrainedModel) -> None:
    """A sum tells of any NaN or infinity in one reading; only one that overflowed needs a second."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().sum()) and not torch.isfinite(weight).all():
            raise ModelError(f"{folder}: {name} holds NaN or infinity; the weights are damaged: fetch the model again")


@contextmanager
def _reported(progress: LoadProgress) -> Iterator[None]:
    """Turns transformers' progress bar over weights into calls of `progress`, and keeps its log quiet."""

    class Bar:
        def __init__(self, iterable: Any = (), *_: Any, total: int | None = None, **__: Any) -> None:
            self._iterable = iterable
            self._total = total or (len(iterable) if hasattr(iterable, "__len__") else 0)

        def __iter__(self) -> Iterator[Any]:
            for index, item in enumerate(self._iterable):
                yield item
                if self._total and index % 16 == 0:
                    progress("weights", (index + 1) / self._total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_args, **_kwargs: None

    progress("weights", 0.0)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    previous = transformers_logging.set_tqdm_hook(lambda _factory, args, kwargs: Bar(*args, **kwargs))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
        transformers_logging.set_verbosity(verbosity)
    progress("weights", 1.0)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        available = ", ".join(sorted(os.listdir(file.parent))[:8]) if file.parent.is_dir() else "no such folder"
        raise ModelError(f"{file}: expected a file, found none; the folder holds {available}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: expected readable JSON: {error}; fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _model_type(raw: dict[str, Any]) -> str:
    return str(raw.get("model_type") or "a model without model_type")
