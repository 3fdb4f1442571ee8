"""Turns a GGUF file into a Hugging Face folder: `python -m mxn.runner.convert_gguf SRC.gguf OUT [--dtype bf16|fp32]`.

Prints progress as JSON lines {"phase", "fraction"}; on failure one line {"error"} and exit status 1. Llama and Gemma 3
files take seconds; other architectures go through transformers' own reader, which takes half a minute and more. The
folder may be left half-written by a failure: the caller renames it into place.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mxn.errors import ModelError, MxnError
from mxn.runner.gguf_architectures import ARCHITECTURES, Architecture
from mxn.runner.gguf_file import GgufFile

Progress = Callable[[str, float], None]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SHARD_BYTES = 4 * 2**30
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<EOT>", "<|return|>")
"""Control tokens that end an answer in the chat formats in use; llama.cpp goes by the same names."""
_CONTROL = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mxn.runner.convert_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC.gguf")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        convert(options.source, options.folder, dtype=_DTYPES[options.dtype], progress=_print_progress)
    except MxnError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    except Exception as error:  # the caller reads one line, whatever went wrong
        print(json.dumps({"error": f"{options.source}: {type(error).__name__}: {error}"}), flush=True)
        return 1
    return 0


def convert(source: Path, folder: Path, *, dtype: torch.dtype, progress: Progress) -> None:
    """Writes config, tokenizer, generation config and weights of a GGUF file into `folder`.

    Raises: ModelError with found, expected and what to do; OSError when the disk is full.
    """
    progress("header", 0.0)
    file = GgufFile(source)
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError(f"{source}: expected general.architecture in its metadata, found {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    progress("header", 1.0)

    architecture = ARCHITECTURES.get(name)
    config = architecture.config(file) if architecture is not None else None
    is_known = architecture is not None and all(architecture.weight_name(tensor) is not None for tensor in file.tensors)
    if config is not None and is_known:
        config["dtype"] = str(dtype).removeprefix("torch.")
        _write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})
        _write_weights(file, architecture, config, folder, dtype, progress)
    else:
        _convert_by_transformers(file, folder, dtype, progress)
    progress("tokenizer", 0.0)
    _write_tokenizer(file, name, folder)
    progress("tokenizer", 1.0)


def _print_progress(phase: str, fraction: float) -> None:
    print(json.dumps({"phase": phase, "fraction": round(fraction, 4)}), flush=True)


def _write_weights(
    file: GgufFile,
    architecture: Architecture,
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Weights in shards of a few GiB, so that memory holds one shard at a time."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    for index, tensor in enumerate(file.tensors.values()):
        progress("weights", index / len(file.tensors))
        name = architecture.weight_name(tensor.name)
        if not name:
            continue
        weight = architecture.restore(tensor.name, file.read(tensor), config)
        pending[name] = torch.from_numpy(weight.copy() if not weight.flags.writeable else weight).to(dtype).contiguous()
        if sum(t.nbytes for t in pending.values()) > _SHARD_BYTES:
            shards.append(_write_shard(pending, folder, len(shards)))
            pending = {}
    shards.append(_write_shard(pending, folder, len(shards)))
    _name_shards(shards, folder)
    progress("weights", 1.0)


def _write_shard(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> list[str]:
    save_file(tensors, folder / f"shard-{number}", metadata={"format": "pt"})
    return list(tensors)


def _name_shards(shards: Sequence[Sequence[str]], folder: Path) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _convert_by_transformers(file: GgufFile, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    """Config and weights through transformers' own GGUF reader."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    progress("weights", 0.0)
    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # transformers before 5.22 always dequantises
        pass
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, dtype=dtype, trust_remote_code=False, **options
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{file.path}: neither mxn nor transformers can read GGUF architecture "
            f"{file.metadata['general.architecture']!r}: {error}; available: safetensors of the same model"
        ) from error
    for owner, attribute in ((model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    progress("weights", 1.0)


def _write_tokenizer(file: GgufFile, architecture: str, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json with the end tokens."""
    from transformers import PreTrainedTokenizerFast

    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:
        from transformers.integrations.ggml import convert_gguf_tokenizer

    meta = file.metadata
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"{file.path}: expected tokenizer.ggml.tokens in its metadata, found none")
    try:
        backend, extra = convert_gguf_tokenizer(architecture, _tokenizer_facts(meta))
    except (ValueError, KeyError) as error:
        raise ModelError(f"{file.path}: its tokenizer cannot be rebuilt: {error}") from error
    special = {
        kind: tokens[meta[f"tokenizer.ggml.{key}"]]
        for kind, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
        if meta.get(f"tokenizer.ggml.{key}") is not None
    }
    _set_prefix(backend, meta, special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(extra | special))
    template = meta.get("tokenizer.chat_template")
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    _write_json(folder / "generation_config.json", _generation_config(meta))


def _set_prefix(backend: Tokenizer, meta: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Puts the begin-of-text token before each text where the file wants it; old sentencepiece files do so silently."""
    is_wanted = meta.get("tokenizer.ggml.add_bos_token", meta.get("tokenizer.ggml.model") == "llama")
    bos = special.get("bos_token")
    if is_wanted and bos is not None:
        backend.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, meta["tokenizer.ggml.bos_token_id"])]
        )


def _tokenizer_facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
        "precompiled_charsmap": "precompiled_charsmap",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "unknown_token_id": "unk_token_id",
        "padding_token_id": "pad_token_id",
        "add_space_prefix": "add_prefix_space",
    }
    return {ours: meta[f"tokenizer.ggml.{key}"] for key, ours in names.items() if f"tokenizer.ggml.{key}" in meta}


def _generation_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """End-of-text ids: the one the file names, its end of turn, and control tokens known to end an answer."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type") or []
    ends = [meta.get("tokenizer.ggml.eos_token_id"), meta.get("tokenizer.ggml.eot_token_id")]
    ends += [
        index
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and text in _END_OF_TURN
    ]
    unique = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    config = {"eos_token_id": unique, "bos_token_id": meta.get("tokenizer.ggml.bos_token_id")}
    return {key: value for key, value in config.items() if value not in (None, [])}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
