"""The option `order`: a sequence's tokens do not depend on its company, or loading says why they may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402
from mxn.errors import ConfigError, UnsupportedModelError  # noqa: E402
from mxn.runner import cpu  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("kernels")]

NUM_NEW = 10
AWKWARD = {"hidden_size": 72, "head_dim": 20, "intermediate_size": 100, "vocab_size": 260}


@pytest.fixture
def make_saved(make_model: Callable[..., Any], byte_tokenizer_folder: Path) -> Callable[[str], Model]:
    def make(family: str, **changes: Any) -> Model:
        _, saved = make_model(family, **AWKWARD | changes)
        (Path(saved.folder) / "tokenizer.json").write_bytes((byte_tokenizer_folder / "tokenizer.json").read_bytes())
        return saved

    return make


def load(saved: Model, quantisation: str = "int8", **changes: Any) -> Any:
    options = {"tune": "off", "order": "fixed"} | changes.pop("options", {})
    settings = {"quantisation": quantisation, "kv_bytes": 2**22, "max_num_seqs": 8} | changes
    return cpu.load_cpu_runner(
        saved,
        LoadSettings(options=tuple(options.items()), **settings),
        cores=2,
        free_bytes=lambda: 2**32,
        progress=lambda phase, fraction: None,
    )


def order_note(runner: Any) -> str:
    (note,) = [note for note in runner.notes if note.startswith("order ")]
    return note


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(temperature=1.5, top_p=0.9)])
@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize(("family", "quantisation"), [("llama", "int8"), ("gemma3_text", "int8"), ("llama", "int4")])
def test_tokens_do_not_depend_on_company(
    family: str,
    quantisation: str,
    kv: str,
    sampling: SamplingParams,
    make_saved: Callable[..., Model],
    decode: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "MAX_INT4_CHANGE", float("inf"))  # random weights leave 4 bits no room
    runner = load(make_saved(family), quantisation, options={"kv": kv})
    assert order_note(runner) == "order fixed: tokens do not depend on the batch"
    assert runner.program == "step program"
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (21, 1, 70, 5, 33)]
    seeds = [11, 12, 13, 14, 15]
    alone = [
        decode(runner, [prompt], NUM_NEW, budget=200, sampling=sampling, seeds=[seed])[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert len({token for tokens in alone for token in tokens}) > 8
    for first, last, budget in ((0, 5, 200), (0, 5, 13), (1, 4, 32), (3, 5, 1)):
        found = decode(runner, prompts[first:last], NUM_NEW, budget=budget, sampling=sampling, seeds=seeds[first:last])
        assert found == alone[first:last]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"quantisation": "fp32"}, 'got fp32, reference and program "auto"'),
        ({"attention": "reference"}, 'got int8, reference and program "auto"'),
        ({"options": {"program": "modules"}}, 'got int8, cpu-cpp and program "modules"'),
    ],
)
def test_settings_that_cannot_keep_the_order_are_refused(
    settings: dict[str, Any], found: str, make_saved: Callable[..., Model]
) -> None:
    with pytest.raises(ConfigError, match=f'order "fixed" needs the step program, .*{found}'):
        load(make_saved("llama"), **settings)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v3", r"transformers modules \(no step program: layer 0: it has no q_proj.*torch rounds SiLU"),
        ("mixtral", r"layer programs \(experts by modules.*routers are products of floats"),
    ],
)
def test_model_that_cannot_keep_the_order_is_refused(family: str, reason: str, make_model: Callable[..., Any]) -> None:
    _, saved = make_model(family)
    with pytest.raises(UnsupportedModelError, match=f'order "fixed" cannot be kept by {reason}'):
        load(saved)
    assert "order not fixed: " in order_note(load(saved, options={"order": "auto"}))


def test_layer_kept_in_floats_is_refused(make_saved: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from mxn.runner import quantise

    monkeypatch.setattr(quantise, "MAX_LINEAR_ERROR", {"int8": 1e-6})
    with pytest.raises(UnsupportedModelError, match="Linear, not packed"):
        load(make_saved("llama"))


def test_unset_numbers_are_those_that_keep_the_order(make_saved: Callable[..., Model]) -> None:
    runner = load(make_saved("llama"), "auto", options={"tune": "auto"})
    assert (runner.quantisation, runner.program) == ("int8", "step program")
    assert "numbers int8, because the order is to be fixed" in runner.notes
