"""The CPU backend: what it reports without torch, what it chooses when it loads, and that it says so."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mxn.backends import cpu, host
from mxn.backends.cpu import CpuBackend
from mxn.backends.registry import load_backend
from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance
from mxn.core.request import SamplingParams
from mxn.errors import ConfigError, KernelUnavailableError

SPEC = ModelSpec(
    architecture="llama",
    num_layers=32,
    hidden_size=4096,
    vocab_size=128256,
    num_heads=32,
    num_kv_heads=8,
    key_dim=128,
    value_dim=128,
    max_context=8192,
    num_parameters=8_030_000_000,
)
CHIP = Chip(uid="cpu-0", kind=None, name="a CPU", vendor="someone", memory_bytes=64 * 2**30, cores=8)


def test_probing_and_listing_chips_import_no_torch() -> None:
    code = (
        "import sys; from mxn.backends.cpu import CpuBackend; b = CpuBackend(); b.probe(); b.chips(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_library_makes_it_absent_with_the_command_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_NEEDED", ("not-a-package-of-anyone",))
    probe = CpuBackend().probe()
    assert probe.state == "absent"
    assert "not-a-package-of-anyone not installed; install with: pip install 'mxn[cpu]'" in probe.reason
    assert CpuBackend().chips() == ()


def test_chip_names_what_the_process_may_use() -> None:
    pytest.importorskip("torch")
    (chip,) = load_backend("cpu").chips()
    assert chip.uid == "cpu-0"
    assert chip.cores >= 1
    assert chip.memory_bytes > 2**28
    assert chip.name


def test_container_quota_limits_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cgroup_cores", lambda: 0.5)
    assert host.usable_cores() == 1


def test_refused_architecture_has_its_reason() -> None:
    support = CpuBackend().supports(replace(SPEC, architecture="mamba"), CHIP)
    assert support.verdict == "no"
    assert "recurrent" in support.reasons[0]
    assert CpuBackend().supports(SPEC, CHIP).verdict == "yes"


def test_estimates_say_where_they_come_from() -> None:
    backend = CpuBackend()
    fp32 = backend.estimate(SPEC, LoadSettings(quantisation="fp32", kv_bytes=2**30), CHIP)
    assert fp32.weights.value == pytest.approx(4 * 8.03e9)
    assert fp32.kv_cache.value == 2**30
    int8 = backend.estimate(SPEC, LoadSettings(), CHIP)
    assert int8.weights.value is not None
    assert 8.03e9 < int8.weights.value < 11e9
    assert int8.kv_cache.value == 64 * 1024 * SPEC.kv_bytes_per_token(2), "1,024 tokens for each of 64 sequences"
    greedy = backend.estimate(SPEC, LoadSettings(max_num_seqs=1024), CHIP)
    assert greedy.kv_cache.value == 32 * 2**30, "never more than half of the memory"
    unknown = backend.estimate(replace(SPEC, num_parameters=None), LoadSettings(), CHIP)
    assert unknown.weights.provenance is Provenance.UNAVAILABLE


def test_power_reader_states_its_kind() -> None:
    reader = CpuBackend().power(CHIP)
    assert reader.detail
    reader.close()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured while loading is not kept for the user's own models."""
    monkeypatch.setenv("MXN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path: Path) -> Model:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from mxn.store.spec import spec_from_config

    config = LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return Model(name="tiny", folder=str(tmp_path), revision="0", spec=spec_from_config(config.to_dict()))


def load(model: Model, **settings: Any) -> Any:
    phases: list[str] = []
    backend = CpuBackend()
    chosen = LoadSettings(**({"kv_bytes": 2**20, "threads": 1} | settings))
    return backend.load(model, chosen, backend.chips(), lambda phase, fraction: phases.append(phase)), phases


@pytest.mark.torch
@pytest.mark.parametrize(("quantisation", "device"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_float_formats_run_on_reference_attention(saved: Model, quantisation: str, device: str) -> None:
    executor, phases = load(saved, quantisation=quantisation)
    assert executor.info.attention == "reference"
    assert executor.info.quantisation == quantisation
    assert executor.info.threads == 1
    assert any(device in note for note in executor.info.notes)
    assert {"weights", "self-test"} <= set(phases)
    assert executor.warm_up().compiled
    assert executor.kv.num_blocks * executor.kv.block_size >= executor.info.max_context
    executor.close()
    executor.close()


@pytest.mark.torch
def test_auto_is_int8_with_kernels_or_fp32_with_the_reason(saved: Model) -> None:
    executor, _ = load(saved)
    if executor.info.quantisation == "int8":
        assert executor.info.attention == "cpu-cpp"
    else:
        assert executor.info.quantisation == "fp32"
        assert any("the C++ kernels are not available: " in note for note in executor.info.notes)
    executor.warm_up()


@pytest.mark.torch
def test_what_was_measured_is_remembered_for_the_same_model_and_machine(saved: Model, kernels: None) -> None:
    def measured(model: Model, **settings: Any) -> list[str]:
        executor, _ = load(model, quantisation="int8", **settings)
        return [note for note in executor.info.notes if "measured" in note]

    assert "measured now" in measured(saved)[0]
    assert "measured at an earlier start" in measured(saved)[0]
    assert "measured now" in measured(replace(saved, revision="another"))[0]
    assert "measured now" in measured(saved, options=(("tune", "again"),))[0]
    assert not measured(saved, options=(("tune", "off"),))


@pytest.mark.torch
def test_missing_kernels_are_said_and_survived(saved: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxn.runner import cpu as runner_cpu

    monkeypatch.setattr(runner_cpu, "_kernels_missing", lambda *_: "no compiler found")
    executor, _ = load(saved)
    assert executor.info.quantisation == "fp32"
    assert any("not available: no compiler found" in note for note in executor.info.notes)
    with pytest.raises(KernelUnavailableError, match="no compiler found"):
        load(saved, quantisation="int8")


@pytest.mark.torch
@pytest.mark.parametrize("quantisation", ["int8", "fp32"])
@pytest.mark.parametrize("length", [1, 128])
def test_context_of_one_token_and_of_full_length(saved: Model, kernels: None, quantisation: str, length: int) -> None:
    executor, _ = load(saved, quantisation=quantisation, context_length=length, max_num_seqs=2)
    assert executor.info.max_context == length
    executor.warm_up()
    step = SequenceStep(
        seq_id=0,
        token_ids=[7] * length,
        start=0,
        block_ids=range(-(-length // 16)),
        is_sampled=True,
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        num_prompt_tokens=length,
        num_output_tokens=0,
    )
    result = executor.execute(StepBatch(step_id=0, sequences=(step,)))
    assert len(result.tokens) == 1
    assert not result.failed


@pytest.mark.torch
def test_int8_cache_takes_about_half_of_the_memory(saved: Model, kernels: None) -> None:
    half, _ = load(saved, quantisation="int8")
    small, _ = load(saved, quantisation="int8", options=(("kv", "int8"),))
    assert small.kv.num_blocks > 1.5 * half.kv.num_blocks
    assert any("int8 KV cache" in note for note in small.info.notes)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantisation": "fp16"}, '"fp16" is not offered by the cpu backend; available: auto, int8, int4, bf16, fp32'),
        ({"attention": "flash"}, 'attention "flash" is not offered'),
        ({"threads": 0}, "threads must be at least 1"),
        ({"quantisation": "fp32", "options": (("kv", "int8"),)}, 'kv "int8" needs attention cpu-cpp, got reference'),
        ({"options": (("tune", "never"),)}, 'tune "never" is not offered; available: auto, off, again'),
        ({"options": (("speed", "11"),)}, 'no option "speed"; available: '),
        ({"attention": "cpu-cpp", "block_size": 8}, "multiple of 16, got 8"),
    ],
)
def test_settings_it_cannot_meet_are_refused(
    saved: Model, settings: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    if settings.get("attention") == "cpu-cpp":
        request.getfixturevalue("kernels")
    with pytest.raises(ConfigError, match=message):
        load(saved, **settings)


@pytest.fixture
def kernels() -> None:
    """Skips where the C++ kernels cannot be built."""
    from mxn.attention.paged import prepare_cpu_kernels

    try:
        prepare_cpu_kernels()
    except KernelUnavailableError as error:
        pytest.skip(f"no C++ kernels: {error}")
