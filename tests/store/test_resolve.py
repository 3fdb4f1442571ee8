"""Names to cards: cards first, then this disk, then the hub; unknown names come with near ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.config.environment import shipped_config_dir
from mxn.config.model_card import load_model_cards
from mxn.errors import ModelError
from mxn.store.resolve import resolve

CARDS = load_model_cards(shipped_config_dir() / "models")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", "smollm2-135m-instruct"),
        ("QWEN3-8B", "qwen3-8b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("qwen/qwen3-8b", "qwen3-8b"),
        ("hf:Qwen/Qwen3-8B", "qwen3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
    ],
)
def test_a_card_is_found_by_name_alias_and_hub_id(name: str, expected: str) -> None:
    assert resolve(name, CARDS).name == expected


def test_any_hub_id_makes_a_card_of_its_own() -> None:
    card = resolve("org/some-model@v2", CARDS)
    assert (card.name, card.source, card.licence, card.chat) == ("org/some-model", "hf:org/some-model@v2", None, None)
    assert resolve("Qwen/Qwen3-8B@refs/pr/1", CARDS).source == "hf:Qwen/Qwen3-8B@refs/pr/1"


def test_local_folders_and_gguf_files_are_found(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(str(model_folder), CARDS).source == f"folder:{model_folder}"
    gguf = tmp_path / "-odd name!.gguf"
    gguf.write_bytes(b"GGUF")
    card = resolve(str(gguf), CARDS)
    assert (card.name, card.source) == ("odd-name-", f"gguf:{gguf}")
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny", CARDS).source == f"folder:{model_folder}"
    assert resolve("./tiny", CARDS).name == "tiny"


def test_an_unknown_name_lists_near_ones_and_what_to_do() -> None:
    with pytest.raises(ModelError, match=r'no model is called "smollm"\. Near names: .*smollm.*`mxn models`'):
        resolve("smollm", CARDS)
    with pytest.raises(ModelError, match="qwen3-8b"):
        resolve("qwen-8b", CARDS)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../../etc/passwd", "x\0y", "org/..", "--help", "a" * 5000, "http://example.org/m", "a b/c"]
)
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"no model is called|no such folder"):
        resolve(name, CARDS)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./nothing", "no such folder"),
        ("nothing.gguf", "no such GGUF file"),
        ("pypi:x>=1#y", "is not a source"),
        ("hf:oops", "is not a source"),
    ],
)
def test_what_is_not_there_is_said_so(name: str, part: str) -> None:
    with pytest.raises(ModelError, match=part):
        resolve(name, CARDS)
