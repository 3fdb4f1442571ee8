"""Model and chip cards: every shipped one is sound, users' own come on top, faults of all files come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.config.chip_card import Figure, figure_quantity, find_chip_card, load_chip_cards
from mxn.config.environment import shipped_config_dir
from mxn.config.model_card import ModelCard, find_model_card, load_model_cards
from mxn.config.source import WheelSource
from mxn.core.quantity import Provenance
from mxn.errors import ConfigError

SHIPPED = shipped_config_dir()
MODELS = load_model_cards(SHIPPED / "models")
CHIPS = load_chip_cards(SHIPPED / "chips")


@pytest.mark.parametrize("card", MODELS.values(), ids=lambda card: card.name)
def test_a_shipped_model_card_is_whole(card: ModelCard) -> None:
    assert (SHIPPED / "models" / f"{card.name}.yaml").is_file()
    assert card.licence is not None
    assert card.licence.url is not None
    spec = card.architecture.spec()
    assert spec is not None
    assert spec.num_heads % spec.num_kv_heads == 0
    assert spec.num_parameters is not None
    assert (spec.num_active_parameters or 0) <= spec.num_parameters
    if isinstance(card.parsed_source, WheelSource):
        assert all(archive.sha256 and archive.bytes for archive in card.archives)
        assert all(file.sha256 and file.bytes for file in card.files)


def test_the_families_people_serve_are_there() -> None:
    families = (
        "llama-3.1",
        "llama-3.2",
        "llama-3.3",
        "qwen3",
        "gemma",
        "mistral",
        "gpt-oss",
        "deepseek",
        "phi",
        "smollm",
    )
    assert all(any(name.startswith(family) for name in MODELS) for family in families)
    assert len(MODELS) >= 14
    assert find_model_card(MODELS, "SmolLM2") is MODELS["smollm2-135m-instruct"]
    assert find_model_card(MODELS, "nothing") is None


def test_layer_windows_follow_the_period() -> None:
    gemma = MODELS["gemma3-270m"].architecture.layer_windows()
    assert gemma[:7] == (512, 512, 512, 512, 512, None, 512)
    assert MODELS["gpt-oss-20b"].architecture.layer_windows()[:3] == (128, None, 128)
    assert MODELS["qwen3-8b"].architecture.layer_windows() == ()


def test_chips_know_where_each_figure_comes_from() -> None:
    assert len(CHIPS) >= 29
    assert all((SHIPPED / "chips" / f"{name}.yaml").is_file() for name in CHIPS)
    h100 = CHIPS["h100-sxm"]
    assert h100.memory_bandwidth_gb_s is not None
    assert (h100.memory_bandwidth_gb_s.value, h100.memory_bandwidth_gb_s.confidence) == (3350.0, "high")
    assert h100.idle_w is not None
    assert h100.idle_w.confidence == "low"
    assert CHIPS["kunlun-p800"].tdp_w is None
    assert CHIPS["t4"].compute.bf16_tflops is None
    assert CHIPS["xeon-8480plus"].memory_gib is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("Intel(R) Xeon(R) Platinum 8480+", "xeon-8480plus"),
        ("AMD EPYC 9654P 96-Core Processor", "epyc-9654"),
        ("AMD EPYC 9655 96-Core Processor", None),
    ],
)
def test_a_chip_is_found_by_what_the_driver_calls_it(name: str, expected: str | None) -> None:
    card = find_chip_card(CHIPS, name)
    assert (card.id if card else None) == expected


def test_an_unknown_figure_is_unavailable_and_a_known_one_names_its_source() -> None:
    missing = figure_quantity(None, "W", what="idle power")
    assert (missing.value, missing.provenance) == (None, Provenance.UNAVAILABLE)
    known = figure_quantity(Figure(value=70.0, source="page", confidence="low"), "W", what="idle power")
    assert (known.value, known.source) == (70.0, "page (confidence low)")


def test_the_users_cards_come_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "own.yaml").write_text("name: own\naliases: [smollm2]\nsource: folder:/somewhere\n", encoding="utf-8")
    cards = load_model_cards()
    assert len(cards) == len(MODELS) + 1
    (folder / "twin.yaml").write_text("name: smollm2\nsource: folder:/elsewhere\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r'"smollm2" is already the name'):
        load_model_cards()


def test_the_users_name_wins_over_a_shipped_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_CONFIG_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.yaml").write_text("name: smollm2\nsource: folder:/mine\n", encoding="utf-8")
    card = find_model_card(load_model_cards(), "smollm2")
    assert card is not None
    assert card.source == "folder:/mine"


def test_faults_of_all_cards_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nsource: ftp://x\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("name: b/../c\nsource: hf:o/n\nlicense: {name: x}\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        "name: c\nsource: hf:o/n\nfiles: [{path: ../x, sha256: abc}]\narchives: [{source: 'hf:o/n'}]\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as error:
        load_model_cards(tmp_path)
    text = str(error.value)
    assert "a.yaml:2:9: source: expected a source of the form hf:org/name" in text
    assert "b.yaml:1:7: name: expected text of the form" in text
    assert 'b.yaml:3:1: license: unknown key; did you mean "licence"?' in text
    assert "c.yaml:3:16: files[0].path" in text
    assert "c.yaml:3:30: files[0].sha256" in text
    assert "c.yaml:4:21: archives[0].source: expected a source of the form pypi:" in text


@pytest.mark.parametrize("value", ["0", "-1", "1e308", ".inf", "many", "null"])
def test_a_figure_is_a_positive_finite_number(tmp_path: Path, value: str) -> None:
    text = f"id: x\nname: X\nvendor: v\nkind: gpu\ntdp_w: {{value: {value}, source: s, confidence: high}}\n"
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x.yaml:5:16: tdp_w.value: expected a"):
        load_chip_cards(tmp_path)


def test_a_missing_folder_holds_no_cards(tmp_path: Path) -> None:
    assert load_chip_cards(tmp_path / "none") == {}
