"""The comparison behind `mxn doctor`: ways of computing a model beside float32, or why one is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.runner import tiers  # noqa: E402
from mxn.runner.tiers import TIERS, compare, main  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("kernels")]


@pytest.fixture
def make_saved(make_model: Callable[..., Any], byte_tokenizer_folder: Path) -> Callable[..., Model]:
    def make(family: str, **changes: Any) -> Model:
        _, saved = make_model(family, vocab_size=260, **changes)
        (Path(saved.folder) / "tokenizer.json").write_bytes((byte_tokenizer_folder / "tokenizer.json").read_bytes())
        return saved

    return make


def test_every_way_is_near_float32(make_saved: Callable[..., Model]) -> None:
    entries = list(compare(make_saved("llama"), cores=1))
    assert [entry["tier"] for entry in entries] == list(TIERS)
    first, *others = [entry for entry in entries if "nll" in entry]
    assert (first["tier"], first["error"], first["same_tokens"]) == ("fp32 modules", 0.0, 1.0)
    assert {entry["tier"] for entry in others} >= {"int8 modules", "int8 program"}
    for entry in others:
        # Random weights leave no room for rounding: 8 bits stay well below what a wrong flag gives, which is 1.
        assert 0 < entry["error"] < (0.5 if entry["tier"].startswith("int8") else 1.5)
        assert entry["error"] <= entry["worst_error"]
        assert entry["num_tokens"] == 128, "the model's whole context"
        assert set(entry["ms"]) <= {"batch 1", "prompt of 128"}


def test_what_is_added_to_all_logits_of_a_token_is_no_error(make_saved: Callable[..., Model]) -> None:
    settings = LoadSettings(quantisation="fp32", kv_bytes=2**22)
    runner = tiers.load_cpu_runner(
        make_saved("llama"), settings, cores=1, free_bytes=lambda: 2**32, progress=lambda phase, fraction: None
    )
    reference = torch.randn(5, 260, generator=torch.Generator().manual_seed(0))
    shifted = reference + torch.linspace(-9, 9, 5)[:, None]
    wrong = reference.clone()
    wrong[2] = wrong[2].flip(0)
    for logits, low, high in ((shifted, 0, 1e-5), (wrong, 1, 2)):
        found = tiers._compared("a way", logits, reference, [1, 2, 3, 4, 5], runner)
        assert found.error <= found.worst_error
        assert low <= found.worst_error <= high


def test_way_that_is_not_offered_has_its_reason(make_saved: Callable[..., Model]) -> None:
    entries = {entry["tier"]: entry for entry in compare(make_saved("opt", ffn_dim=96), cores=1)}
    assert "no step program for " in entries["int8 program"]["error"]
    assert "nll" in entries["int8 modules"]


def test_command_prints_one_json_line_for_each(
    make_saved: Callable[..., Model], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "TIERS", {name: TIERS[name] for name in ("fp32 modules", "int8 program")})
    assert main([make_saved("qwen3").folder, "--cores", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["tier"] for line in lines] == ["fp32 modules", "int8 program"]
