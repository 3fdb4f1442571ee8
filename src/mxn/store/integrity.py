"""Checks on files that came from elsewhere: hashes, safetensors headers, and what mxn refuses to load."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mxn.errors import DownloadError, ModelError

BUFFER_BYTES = 4 << 20
MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""Everything but weights that a model folder may bring; nothing else is fetched, code least of all."""

_SHARD = re.compile(r"model-\d{1,5}-of-\d{1,5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
_DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16}
_DTYPE_BITS |= {"BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4}
_DTYPE_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """A promised hash. git-sha1 is what git gives a file of known size: small files on the hub have nothing else."""

    algorithm: Literal["sha256", "git-sha1"]
    value: str

    def start(self, size: int) -> hashlib._Hash:
        """A running hash for a file of `size` bytes."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def sha256_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file; `report` is told the bytes read so far."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(BUFFER_BYTES):
            digest.update(part)
            if report is not None:
                report(file.tell())
    return digest.hexdigest()


def select_files(names: Collection[str], *, where: str) -> list[str]:
    """The files of a model folder or repository that mxn needs.

    Raises: ModelError with the reason when there are no safetensors weights, no config.json or no tokenizer.json.
    """
    if INDEX_NAME in names:
        weights = [INDEX_NAME, *sorted(name for name in names if _SHARD.fullmatch(name))]
    elif SINGLE_NAME in names:
        weights = [SINGLE_NAME]
    else:
        raise ModelError(f"{where} has no weights mxn loads: {_no_weights_reason(names)}")
    for needed, why in (
        ("config.json", "it says what the model is"),
        ("tokenizer.json", "mxn reads no other tokenizer format"),
    ):
        if needed not in names:
            raise ModelError(f"{where} has no {needed}; {why}. Found: {', '.join(sorted(names)[:12]) or 'nothing'}")
    return [name for name in TEXT_FILES if name in names] + weights


def check_folder(folder: Path, *, allow_remote_code: bool = False) -> dict[str, Any]:
    """Checks a model folder before anything loads it and gives its config.json.

    allow_remote_code: a config may name code of its repository, because transformers has the architecture itself.
    Raises: ModelError with the reason: code, pickles, damaged JSON, damaged or missing safetensors.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    select_files(names, where=str(folder))
    config = check_config(folder / "config.json", allow_remote_code=allow_remote_code)
    for path in _weight_files(folder, names):
        check_safetensors(path)
    return config


def check_config(path: Path, *, allow_remote_code: bool = False) -> dict[str, Any]:
    """A config.json that mxn can go by. Raises: ModelError with the reason."""
    config = read_json(path)
    if "auto_map" in config and not allow_remote_code:
        raise ModelError(
            f"{path} names code to run (auto_map), and mxn runs no code from a model's repository; "
            "take a model whose architecture transformers has itself"
        )
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type, so nobody can tell what the model is")
    return config


def check_safetensors(path: Path) -> None:
    """Checks that a safetensors file is whole. Raises: ModelError: header, tensor sizes and file length disagree."""
    length = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if length < 8 or header_bytes > min(MAX_HEADER_BYTES, length - 8):
            raise ModelError(
                f"{path} is not a whole safetensors file: {length} bytes, header of {header_bytes} promised"
            )
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is damaged: its safetensors header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged: its safetensors header is not a mapping")
    tensors = sorted(_extent(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for begin, stop, name in tensors:
        if begin != end:
            raise ModelError(f"{path} is damaged: tensor {name!r} begins at byte {begin}, the one before ends at {end}")
        end = stop
    if 8 + header_bytes + end != length:
        raise ModelError(
            f"{path} is not whole: its header promises {8 + header_bytes + end} bytes, the file has {length}; "
            "fetch it again"
        )


def check_gguf(path: Path) -> None:
    """Checks that a file begins as GGUF does and is not one part of several. Raises: ModelError."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f'{path} is not a GGUF file: it begins with {magic!r}, expected b"GGUF"')
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ModelError(f"{path} is one part of a split GGUF; join the parts with gguf-split --merge first")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises: ModelError."""
    value: dict[str, Any] = _read_json(path, dict, "an object")
    return value


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file of bounded size. Raises: ModelError."""
    value: list[Any] = _read_json(path, list, "a list")
    return value


def _read_json(path: Path, kind: type, expected: str) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path} has {path.stat().st_size} bytes; a JSON file this large is refused")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, expected {expected}")
    return value


def wrong_file(what: str, *, found: str, expected: str, do: str) -> DownloadError:
    """The error for a file that is not what was promised."""
    return DownloadError(f"{what}: found {found}, expected {expected}; {do}")


def _weight_files(folder: Path, names: Collection[str]) -> list[Path]:
    if INDEX_NAME not in names:
        return [folder / SINGLE_NAME]
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX_NAME} has no weight_map")
    wanted = {str(name) for name in weight_map.values()}
    if unsafe := sorted(name for name in wanted if not _SHARD.fullmatch(name)):
        raise ModelError(
            f"{folder / INDEX_NAME} names {unsafe[0]!r}; expected names like model-00001-of-00002.safetensors"
        )
    if missing := sorted(wanted - set(names)):
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing[:4])}; fetch it again"
        )
    return [folder / name for name in sorted(wanted)]


def _extent(path: Path, name: str, entry: object) -> tuple[int, int, str]:
    """(begin, end, name) of a tensor, checked against its shape and type."""
    if isinstance(entry, dict):
        bits = _DTYPE_BITS.get(str(entry.get("dtype")))
        if bits is None:
            raise ModelError(f"{path}: tensor {name!r} has the unknown type {entry.get('dtype')!r}")
        shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
        if (
            shape is not None
            and offsets is not None
            and len(offsets) == 2
            and offsets[1] - offsets[0] == math.prod(shape) * bits // 8
        ):
            return offsets[0], offsets[1], name
    raise ModelError(f"{path} is damaged: the header of tensor {name!r} contradicts itself")


def _counts(value: object) -> list[int] | None:
    """A list of at most 64 sizes, or None for anything else."""
    if (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    ):
        return value
    return None


def _no_weights_reason(names: Collection[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if ggufs:
        return f"only GGUF files; name one of them: {', '.join(ggufs[:8])}"
    if others:
        return f"expected {SINGLE_NAME} or {INDEX_NAME}, got {', '.join(others[:4])}"
    if pickles:
        return f"{', '.join(pickles[:4])} would be unpickled, which can run any code; expected safetensors or GGUF"
    return f"expected {SINGLE_NAME} or {INDEX_NAME}, got {', '.join(sorted(names)[:8]) or 'no files'}"
