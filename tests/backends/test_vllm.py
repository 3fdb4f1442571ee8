"""The vLLM preset: what it would start, read from an environment laid out as pip does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mxn.backends.registry import load_backend
from mxn.backends.vllm import VllmBackend
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.errors import BackendError, UnsupportedModelError

CHIP = Chip(uid="cpu-0", kind=None, name="CPU", vendor="x", memory_bytes=8 << 30, cores=2)


def make_environment(root: Path, version: str) -> Path:
    """A virtual environment that holds vLLM's program and metadata. Returns its interpreter's path."""
    info = root / "lib" / "python3.11" / "site-packages" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (root / "bin").mkdir()
    program = root / "bin" / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return root / "bin" / "python"


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmBackend:
    monkeypatch.setenv("MXN_VLLM_PYTHON", str(make_environment(tmp_path / "env", "0.32.0+cpu")))
    return VllmBackend()


def value_of(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_its_version_is_read_without_importing_it(backend: VllmBackend) -> None:
    probe = backend.probe()
    assert probe.state == "active"
    assert probe.versions == {"vllm": "0.32.0+cpu"}
    assert backend.chips()[0].uid == "cpu-0"


def test_a_missing_vllm_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_VLLM_PYTHON", str(tmp_path / "bin" / "python"))
    probe = load_backend("vllm").probe()
    assert probe.state == "absent"
    assert "MXN_VLLM_PYTHON" in probe.reason


def test_a_build_for_another_chip_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_VLLM_PYTHON", str(make_environment(tmp_path / "env", "0.32.0")))
    probe = VllmBackend().probe()
    assert probe.state == "broken"
    assert "built for another chip" in probe.reason


def test_memory_is_given_in_bytes_and_all_rules_are_passed_on(backend: VllmBackend, fake_model: Model) -> None:
    settings = LoadSettings(kv_bytes=300 << 20, context_length=512, max_num_seqs=8, quantisation="bf16", threads=1)
    spec = backend.serve(fake_model, settings, [CHIP])
    assert value_of(spec.argv, "--kv-cache-memory-bytes") == str(300 << 20)
    assert "--gpu-memory-utilization" not in spec.argv
    assert value_of(spec.argv, "--max-model-len") == "512"
    assert value_of(spec.argv, "--max-num-seqs") == "8"
    assert value_of(spec.argv, "--dtype") == "bfloat16"
    assert "--enable-prefix-caching" in spec.argv
    assert (spec.kv_bytes, spec.quantisation, spec.threads) == (300 << 20, "bf16", 1)
    assert {"return_token_ids", "cache_salt", "stop_token_ids", "min_tokens"} <= set(spec.extensions)
    assert not any("{key}" in argument for argument in spec.argv)
    assert ("VLLM_API_KEY", "{key}") in spec.environment


def test_an_auto_cache_is_sized_for_its_sequences(backend: VllmBackend, fake_model: Model) -> None:
    model = replace(fake_model, spec=replace(fake_model.spec, num_layers=8, num_kv_heads=2, key_dim=64, value_dim=64))
    spec = backend.serve(model, LoadSettings(max_num_seqs=4), [CHIP])
    assert spec.kv_bytes == 4 * 1024 * 4096  # four sequences of 1,024 tokens at 4 KiB


def test_a_quantisation_it_has_not_is_refused(backend: VllmBackend, fake_model: Model) -> None:
    with pytest.raises(UnsupportedModelError, match="auto, bf16, fp16, fp32; int4 was asked for"):
        backend.serve(fake_model, LoadSettings(quantisation="int4"), [CHIP])


def test_an_interpreter_without_vllm_is_named(backend: VllmBackend, fake_model: Model, tmp_path: Path) -> None:
    options = (("python", str(tmp_path / "other" / "python")),)
    with pytest.raises(BackendError, match="no vllm beside"):
        backend.serve(fake_model, LoadSettings(options=options), [CHIP])
