"""Hashes, safetensors headers, and what is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxn.errors import ModelError
from mxn.store.integrity import check_folder, check_gguf, check_safetensors, read_json, select_files, sha256_of


def _tensor(begin: int, end: int, dtype: str = "F32", shape: list[object] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def _write(path: Path, header: object, num_bytes: int) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(num_bytes))
    return path


def test_a_whole_file_passes(tmp_path: Path) -> None:
    header = {"a": _tensor(0, 16), "b": _tensor(16, 32), "__metadata__": {"format": "pt"}, "empty": _tensor(32, 32)}
    check_safetensors(_write(tmp_path / "x", header, 32))


@pytest.mark.parametrize(
    ("header", "num_bytes", "part"),
    [
        ({"a": _tensor(0, 16)}, 15, "not whole"),
        ({"a": _tensor(0, 16)}, 17, "not whole"),
        ({"a": _tensor(0, 16), "b": _tensor(12, 28)}, 28, "begins at byte 12, the one before ends at 16"),
        ({"a": _tensor(4, 20)}, 20, "begins at byte 4"),
        ({"a": _tensor(0, 16, shape=[5])}, 16, "contradicts itself"),
        ({"a": _tensor(0, 16, shape=[-4])}, 16, "contradicts itself"),
        ({"a": _tensor(0, 16, shape=[1 << 62, 4])}, 16, "contradicts itself"),
        ({"a": _tensor(0, 16, shape=["4"])}, 16, "contradicts itself"),
        ({"a": _tensor(0, 16, shape=[True, 4])}, 16, "contradicts itself"),
        ({"a": _tensor(0, 16, dtype="OBJECT")}, 16, "unknown type 'OBJECT'"),
        ({"a": 7}, 0, "contradicts itself"),
        ([], 0, "not a mapping"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, num_bytes: int, part: str) -> None:
    with pytest.raises(ModelError, match=part):
        check_safetensors(_write(tmp_path / "x", header, num_bytes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda child: (
        st.lists(child, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), child, max_size=4)
    ),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON, num_bytes=st.integers(0, 40))
def test_no_header_raises_anything_but_a_model_error(tmp_path: Path, header: object, num_bytes: int) -> None:
    with contextlib.suppress(ModelError):
        check_safetensors(_write(tmp_path / "x", header, num_bytes))


@pytest.mark.parametrize("raw", [b"", b"abc", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"{"])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        check_safetensors(tmp_path / "x")


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 4) + b"pick")
    with pytest.raises(ModelError, match="header is not JSON"):
        check_safetensors(tmp_path / "x")
    deep = b"[" * 100_000
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(ModelError, match="header is not JSON"):
        check_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "would be unpickled, which can run any code"),
        (["config.json", "tokenizer.json", "model.pt"], "would be unpickled"),
        (["config.json", "tokenizer.json", "model.pkl"], "would be unpickled"),
        (["config.json", "a.Q4.gguf", "b.Q8.gguf"], r"only GGUF files; name one of them: a.Q4.gguf, b.Q8.gguf"),
        (["config.json", "tokenizer.json", "consolidated.safetensors"], "expected model.safetensors or"),
        (["tokenizer.json", "model.safetensors"], "no config.json"),
        (["config.json", "model.safetensors", "tokenizer.model"], "no tokenizer.json"),
        ([], "got no files"),
    ],
)
def test_a_folder_without_what_mxn_needs_is_refused(names: list[str], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        select_files(names, where="it")


def test_only_weights_and_known_text_files_are_taken() -> None:
    names = ["config.json", "tokenizer.json", "model.safetensors", "modeling.py", "pytorch_model.bin", "README.md"]
    assert select_files(names, where="it") == ["config.json", "tokenizer.json", "model.safetensors"]


def test_a_folder_that_names_code_is_refused_unless_the_card_vouches(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.Evil"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"names code to run \(auto_map\)"):
        check_folder(model_folder)
    assert check_folder(model_folder, allow_remote_code=True)["model_type"] == "llama"


def test_shards_must_all_be_there_and_be_plainly_named(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00002.safetensors")
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    check_folder(model_folder)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    with pytest.raises(ModelError, match=r"lacks 1 of \d weight files: model-00002-of-00002.safetensors"):
        check_folder(model_folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="expected names like model-00001"):
        check_folder(model_folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        check_folder(model_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_config_without_a_model_type_is_refused(model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model_type"):
        check_folder(model_folder)


def test_gguf_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="not a GGUF file"):
        check_gguf(path)
    part = tmp_path / "x-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="one part of a split GGUF"):
        check_gguf(part)


def test_hashing_reports_how_far_it_came(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 10)
    seen: list[int] = []
    assert sha256_of(path, seen.append) == "bf2cb58a68f684d95a3b78ef8f661c9a4e5b09e82cc8f9cc88cce90528caeb27"
    assert seen == [10]
