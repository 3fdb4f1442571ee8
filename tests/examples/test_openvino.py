"""The OpenVINO example, installed by pip on its own; its engine scripted, and real where there is one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput
from mxn.errors import ReplicaDiedError
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.spec import DeploymentSpec

ROOT = Path(__file__).parents[2]
CHIP = Chip(uid="cpu-0", kind=None, name="CPU", vendor="x", memory_bytes=8 << 30, cores=2)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example as pip installs it, and with scripted modules where OpenVINO's would be."""
    site = tmp_path_factory.mktemp("site")
    source = ROOT / "examples" / "mxn-openvino"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=120)
    return site


@pytest.fixture
def scripted(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example is found by replicas, and its engine's environment holds the scripted pipeline."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "openvino_genai.py").write_text(Path(__file__).with_name("scripted_openvino.py").read_text())
    (modules / "openvino.py").write_text("def Tensor(array):\n    return [int(i) for i in array[0]]\n")
    monkeypatch.setenv("PYTHONPATH", f"{installed}{os.pathsep}{modules}")
    monkeypatch.setenv("MXN_OPENVINO_PYTHON", sys.executable)
    (tmp_path / "ir").mkdir()
    (tmp_path / "ir" / "openvino_model.xml").write_text("<net/>")
    return tmp_path / "ir"


def spec_of(model: Model, **options: str) -> DeploymentSpec:
    settings = LoadSettings(options=tuple(options.items()), kv_bytes=1 << 30, max_num_seqs=8)
    return DeploymentSpec.single(
        name="m", model=model, backend="openvino", chips=[CHIP], settings=settings, restart_delays_s=()
    )


async def outputs_of(deployment: Deployment, prompt: list[int], **fields: object) -> list[SequenceOutput]:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "stop_token_ids": (256,), **fields})  # type: ignore[arg-type]
    return [output async for output in deployment.submit(prompt, sampling)]


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def test_tokens_of_the_pipeline_come_back_and_what_it_cannot_do_is_named(
    fake_model: Model, scripted: Path
) -> None:
    fleet = Fleet([spec_of(fake_model, ir=str(scripted))])
    await fleet.start()
    [deployment] = fleet.deployments
    try:
        assert deployment.state == "ready", deployment.reason
        assert deployment.info is not None
        assert "logit_bias" in deployment.info.refused
        assert "logprobs" in deployment.info.refused
        assert deployment.info.kv_bytes == 1 << 30
        results = await asyncio.gather(*(outputs_of(deployment, [i, 2]) for i in range(5)))
        assert [tokens_of(outputs) for outputs in results] == [[i + 2 + j for j in range(8)] for i in range(5)]
        [*_, stopped] = await outputs_of(deployment, [1, 2], stop_token_ids=(6,))
        assert (stopped.token_ids[-1], stopped.finish_reason) == (6, FinishReason.STOP)
        [refused] = await outputs_of(deployment, [1], logit_bias=((5, 1.0),))
        assert "logit_bias is not supported" in (refused.error or "")
        [wrong] = await outputs_of(deployment, [1], temperature=6.0)
        assert "HTTP 400: temperature is out of range" in (wrong.error or "")
        [big] = await outputs_of(deployment, [1] * 600)
        assert "no room for this sequence" in (big.error or "")
        stream = deployment.submit([3], SamplingParams(temperature=0.0, max_tokens=2000))
        await anext(stream)
        stream.abort()
        assert tokens_of(await outputs_of(deployment, [7])) == [7 + j for j in range(8)]
    finally:
        await fleet.stop(drain_s=5)


async def test_a_pipeline_that_breaks_ends_its_replica_with_its_words(fake_model: Model, scripted: Path) -> None:
    fleet = Fleet([spec_of(fake_model, ir=str(scripted))])
    await fleet.start()
    [deployment] = fleet.deployments
    try:
        with pytest.raises(ReplicaDiedError, match="RuntimeError: the scripted pipeline breaks"):
            await outputs_of(deployment, [249])
    finally:
        await fleet.stop(drain_s=5)


async def test_a_model_that_cannot_be_exported_is_told_with_the_exporters_words(
    fake_model: Model, scripted: Path
) -> None:
    fleet = Fleet([spec_of(fake_model, ir=str(scripted / "absent"))])
    await fleet.start()
    try:
        [deployment] = fleet.deployments
        assert deployment.state == "failed"
        assert "optimum-cli" in deployment.reason
        assert not list(scripted.glob("absent*"))
    finally:
        await fleet.stop(drain_s=5)


@pytest.mark.model
@pytest.mark.slow
async def test_the_real_pipeline_serves_cancels_and_leaves_nothing_behind(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    code = "import mxn_openvino as m, json; p = m.OpenVinoBackend().probe(); print(p.state, p.reason)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    if not said.startswith("active"):
        pytest.skip(f"openvino is {said.strip()}")
    from mxn.store.fetch import fetch

    model = fetch("smollm2-135m-instruct")
    fleet = Fleet([spec_of(model)])  # the first run exports the model, which takes a minute
    await fleet.start()
    [deployment] = fleet.deployments
    try:
        assert deployment.state == "ready", deployment.reason
        assert deployment.info is not None
        family = psutil.Process(deployment.info.pid).children(recursive=True)
        prompt = deployment.tokenizer.encode("The capital of France is", add_special_tokens=True)
        alone = tokens_of(await outputs_of(deployment, prompt))
        together = await asyncio.gather(*(outputs_of(deployment, prompt) for _ in range(4)))
        assert len(alone) == 8
        assert "Paris" in deployment.tokenizer.decode(alone)
        assert [len(tokens_of(outputs)) for outputs in together] == [8] * 4
        stream = deployment.submit(prompt, SamplingParams(temperature=0.0, max_tokens=4000))
        await anext(stream)
        stream.abort()
        assert tokens_of(await outputs_of(deployment, prompt)) == alone
    finally:
        await fleet.stop(drain_s=5)
    assert not psutil.wait_procs(family, timeout=15)[1]
