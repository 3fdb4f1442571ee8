"""The llama.cpp preset: what it would start, and the real server where there is one."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mxn.backends.llama_cpp import LlamaCppBackend
from mxn.backends.registry import load_backend
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import FinishReason, SamplingParams
from mxn.errors import BackendError, ReplicaDiedError, UnsupportedModelError
from mxn.fleet.fleet import Fleet
from mxn.fleet.spec import DeploymentSpec

CHIP = Chip(uid="cpu-0", kind=None, name="CPU", vendor="x", memory_bytes=8 << 30, cores=2)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaCppBackend:
    """The backend where `llama-server` is a program that only tells its version."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'version: 1 (test)' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("MXN_LLAMA_SERVER", str(program))
    return LlamaCppBackend()


@pytest.fixture
def model(fake_model: Model, tmp_path: Path) -> Model:
    """A model that came as a GGUF file and whose tokens take 4 KiB of cache."""
    (tmp_path / "tiny.Q8_0.gguf").write_bytes(bytes(1000))
    spec = replace(fake_model.spec, num_layers=8, num_kv_heads=2, key_dim=64, value_dim=64)
    return replace(fake_model, folder=str(tmp_path), spec=spec)


def value_of(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_the_program_and_its_version_are_found(backend: LlamaCppBackend) -> None:
    probe = backend.probe()
    assert probe.state == "active"
    assert probe.versions == {"llama.cpp": "1 (test)"}
    assert backend.chips()[0].uid == "cpu-0"


def test_a_missing_program_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_LLAMA_SERVER", "/nowhere/llama-server")
    probe = load_backend("llama.cpp").probe()
    assert probe.state == "absent"
    assert "MXN_LLAMA_SERVER" in probe.reason
    assert load_backend("llama.cpp").chips() == ()


def test_a_program_that_cannot_run_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'libgomp.so.1: cannot open' >&2\nexit 127\n")
    program.chmod(0o755)
    monkeypatch.setenv("MXN_LLAMA_SERVER", str(program))
    probe = LlamaCppBackend().probe()
    assert probe.state == "broken"
    assert "libgomp.so.1: cannot open" in probe.reason


def test_its_cache_is_divided_by_the_bytes_it_is_given(backend: LlamaCppBackend, model: Model) -> None:
    settings = LoadSettings(kv_bytes=40 << 20, context_length=2048)
    spec = backend.serve(model, settings, [CHIP])
    assert value_of(spec.argv, "--parallel") == "5"  # 40 MiB at 4 KiB a token are five times 2,048 tokens
    assert value_of(spec.argv, "--ctx-size") == str(5 * 2048)
    assert (spec.max_num_seqs, spec.max_context, spec.kv_bytes) == (5, 2048, 40 << 20)
    assert spec.quantisation == "q8_0"
    assert spec.weight_bytes == 1000


def test_a_cache_too_small_for_one_sequence_shortens_the_context(backend: LlamaCppBackend, model: Model) -> None:
    spec = backend.serve(model, LoadSettings(kv_bytes=1 << 20), [CHIP])
    assert (spec.max_num_seqs, spec.max_context) == (1, 256)


def test_the_key_never_stands_in_the_process_list(backend: LlamaCppBackend, model: Model) -> None:
    spec = backend.serve(model, LoadSettings(), [CHIP])
    assert not any("{key}" in argument for argument in spec.argv)
    assert ("LLAMA_API_KEY", "{key}") in spec.environment


def test_a_model_without_a_gguf_file_is_told_how_to_get_one(backend: LlamaCppBackend, fake_model: Model) -> None:
    with pytest.raises(UnsupportedModelError, match=r"convert_hf_to_gguf\.py.*--option gguf=FILE"):
        backend.serve(fake_model, LoadSettings(), [CHIP])


def test_another_quantisation_than_the_files_is_refused(backend: LlamaCppBackend, model: Model) -> None:
    with pytest.raises(UnsupportedModelError, match="as it is quantised"):
        backend.serve(model, LoadSettings(quantisation="int8"), [CHIP])


def test_a_file_that_is_not_there_is_named(backend: LlamaCppBackend, model: Model) -> None:
    with pytest.raises(BackendError, match=r"no such file .*absent\.gguf"):
        backend.serve(model, LoadSettings(options=(("gguf", "absent.gguf"),)), [CHIP])


# ---------------------------------------------------------------- the real server


@pytest.fixture
def real_spec() -> DeploymentSpec:
    """A small model on the real `llama-server`."""
    backend = load_backend("llama.cpp")
    probe = backend.probe()
    if probe.state != "active":
        pytest.skip(f"llama.cpp is {probe.state}: {probe.reason}")
    from mxn.store.fetch import fetch

    model = fetch("smollm2-135m-instruct")
    settings = LoadSettings(context_length=1024, max_num_seqs=4, kv_bytes=96 << 20)
    return DeploymentSpec.single(name="m", model=model, backend="llama.cpp", chips=backend.chips(), settings=settings)


@pytest.mark.model
@pytest.mark.slow
async def test_the_real_server_serves_counts_cancels_and_leaves_nothing_behind(real_spec: DeploymentSpec) -> None:
    fleet = Fleet([real_spec])
    await fleet.start()
    [deployment] = fleet.deployments
    try:
        assert deployment.state == "ready", deployment.reason
        assert deployment.info is not None
        family = psutil.Process(deployment.info.pid).children(recursive=True)
        [server] = [process for process in family if "warden.py" not in " ".join(process.cmdline())]
        prompts = [deployment.tokenizer.encode(text, add_special_tokens=True) for text in ("The sky is", "One, two,")]

        async def ask(prompt: list[int], **fields: object) -> tuple[str, int, FinishReason | None]:
            sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **fields})  # type: ignore[arg-type]
            outputs = [output async for output in deployment.submit(prompt, sampling)]
            return "".join(o.text or "" for o in outputs), sum(o.num_tokens for o in outputs), outputs[-1].finish_reason

        alone = [await ask(prompt) for prompt in prompts]
        assert [count for _, count, _ in alone] == [12, 12]
        assert {reason for _, _, reason in alone} == {FinishReason.LENGTH}
        together = await asyncio.gather(*(ask(prompt, seed=5, temperature=0.8) for prompt in prompts))
        again = [await ask(prompt, seed=5, temperature=0.8) for prompt in prompts]
        assert [count for _, count, _ in together] == [count for _, count, _ in again] == [12, 12]

        stream = deployment.submit(prompts[0], SamplingParams(temperature=0.0, max_tokens=900))
        await anext(stream)
        stream.abort()
        used = server.cpu_times().user
        await asyncio.sleep(1.0)
        assert server.cpu_times().user - used < 0.5, "the server still computes for a sequence that was aborted"

        stream = deployment.submit(prompts[0], SamplingParams(temperature=0.0, max_tokens=900))
        await anext(stream)
        os.kill(deployment.info.pid, signal.SIGKILL)
        with pytest.raises(ReplicaDiedError):
            async for _ in stream:
                pass
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
    finally:
        await fleet.stop(drain_s=5)
