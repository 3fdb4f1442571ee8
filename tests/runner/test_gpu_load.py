"""How a model is loaded on a chip: what is chosen, refused and planned, with a CPU in the chip's place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.errors import ConfigError, KernelUnavailableError, OutOfMemoryError  # noqa: E402
from mxn.runner import gpu  # noqa: E402
from mxn.runner.accelerator import CudaAccelerator, find_device  # noqa: E402
from mxn.runner.gpu import MemoryPlan, load_gpu_runner  # noqa: E402

pytestmark = pytest.mark.torch
GIB = 2**30
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


def stand_in(memory_bytes: int = GIB) -> Any:
    spec = importlib.util.spec_from_file_location("chip_stand_in", Path(__file__).with_name("chip_stand_in.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.HostAccelerator(memory_bytes)


def load(
    model: Model, memory_bytes: int = GIB, quantisations: Any = ("fp32", "bf16", "fp8", "int4"), **settings: Any
) -> Any:
    chosen = {"attention": "reference", "block_size": 4, "max_num_seqs": 4, "max_step_tokens": 16} | settings
    return load_gpu_runner(
        model,
        LoadSettings(**chosen),
        accelerator=stand_in(memory_bytes),
        quantisations=quantisations,
        progress=lambda phase, done: None,
        sampler="reference",
    )


def test_the_kv_cache_gets_what_the_other_parts_leave(make_model: Any) -> None:
    _, model = make_model("llama")
    runner = load(model)
    (line,) = [note for note in runner.notes if note.startswith("memory in GiB")]
    assert all(part in line for part in ("weights", "activations", "graphs", "reserve", "for the KV cache"))
    reserve = 512 * 2**20 + int(0.02 * GIB)
    sampling = 3 * 4 * runner.vocab_size * 4
    assert GIB - reserve - 2**20 - sampling - runner.kv_bytes < 4096 * 16, "less than a block is left over"
    assert runner.quantisation == "fp32", "the chip's first choice"
    set_by_hand = load(model, kv_bytes=2**20)
    assert 0.9 * 2**20 < set_by_hand.kv_bytes <= 2**20


def test_a_plan_never_goes_below_nothing() -> None:
    plan = MemoryPlan(total=GIB, reserve=GIB // 2, activations=GIB, graphs=0)
    assert plan.kv_bytes(free=GIB) == 0


def test_weights_that_cannot_fit_are_refused_before_they_are_read(make_model: Any) -> None:
    _, model = make_model("llama")
    with pytest.raises(OutOfMemoryError, match=r"needs .* GiB for .* billion weights as float32, 0.0 GiB"):
        load(model, memory_bytes=2**16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantisation": "int8"}, '"int8" is not offered on this chip; available: auto, fp32, bf16, fp8, int4'),
        ({"attention": "cpu-cpp"}, "available: auto, triton, reference"),
        ({"options": (("speed", "11"),)}, 'no option "speed"; available: graphs, prefill'),
        ({"options": (("graphs", "maybe"),)}, 'graphs "maybe" is not offered; available: background, wait, off'),
    ],
)
def test_settings_it_cannot_meet_are_refused(make_model: Any, settings: dict[str, Any], message: str) -> None:
    _, model = make_model("llama")
    with pytest.raises(ConfigError, match=message):
        load(model, **settings)


def test_kernels_that_cannot_be_had_are_said_or_refused(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = make_model("llama")

    def missing(*_: Any) -> Any:
        raise KernelUnavailableError("no Triton for this chip")

    monkeypatch.setattr(gpu, "_triton_choice", missing)
    runner = load(model, attention="auto")
    assert runner.attention_name == "reference"
    assert any("because the Triton kernels cannot be had: no Triton for this chip" in note for note in runner.notes)
    with pytest.raises(KernelUnavailableError, match="asked for and cannot be had: no Triton"):
        load(model, attention="triton")


@pytest.mark.parametrize("quantisation", ["fp8", "int4"])
def test_narrow_weights_are_made_at_load(quantisation: str, make_model: Any, decode: Any) -> None:
    _, model = make_model("llama", **WIDE)
    runner = load(model, quantisation=quantisation)
    assert any(f"21 linear layers as {quantisation}" in note for note in runner.notes)
    assert runner.quantisation == quantisation
    tokens = decode(runner, [[5, 9, 17], [33, 12]], 3, budget=16)
    assert [len(row) for row in tokens] == [3, 3]


def test_the_chip_is_found_by_uuid_or_bus_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fact:
        name = "a chip"
        pci_domain_id, pci_device_id = 0, 0

        def __init__(self, uuid: str, bus: int) -> None:
            self.uuid, self.pci_bus_id = uuid, bus

    facts = [Fact("11111111-aaaa", 0x0A), Fact("22222222-bbbb", 0xC1)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(facts))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts[index])
    assert find_device("GPU-22222222-BBBB", "") == "cuda:1"
    assert find_device("another form", "0000:0a:00.0") == "cuda:0"
    assert find_device("another form", "00000000:c1:00.0") == "cuda:1"
    with pytest.raises(gpu_error(), match=r"does not see chip GPU-3 .*it sees a chip 11111111-aaaa"):
        find_device("GPU-3", "")
    with pytest.raises(gpu_error(), match="CUDA_VISIBLE_DEVICES=MIG-5"):
        find_device("MIG-5", "0000:0a:00.0")
    facts.pop()
    assert find_device("MIG-5", "0000:0a:00.0") == "cuda:0", "a process sees one slice"


def gpu_error() -> type[Exception]:
    from mxn.errors import ChipError

    return ChipError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm chip")
def test_greedy_tokens_on_the_chip_are_those_of_fp32_on_the_cpu(smollm2: Model) -> None:
    from transformers import AutoModelForCausalLM

    settings = LoadSettings(quantisation="fp32", attention="triton", max_num_seqs=4, options=(("graphs", "wait"),))
    runner = load_gpu_runner(
        smollm2,
        settings,
        accelerator=CudaAccelerator(),
        quantisations=("fp32",),
        progress=lambda phase, done: None,
    )
    runner.warm_up()
    reference = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32).eval()
    prompts = [[504, 3575, 282, 4649, 314], [1, 2683, 198, 19556]]
    wanted = [
        reference.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=None)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    from mxn.backends.torch_executor import chip_executor
    from mxn.core.request import SamplingParams, SequenceRequest
    from mxn.engine.engine import Engine, EngineSettings

    engine = Engine(chip_executor(runner), EngineSettings())
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=24, temperature=0.0)
        engine.add(SequenceRequest(seq_id=index, prompt_token_ids=prompt, sampling=sampling))
    found: list[list[int]] = [[], []]
    while engine.has_work:
        for output in engine.step():
            found[output.seq_id] += output.token_ids
    assert found == wanted
