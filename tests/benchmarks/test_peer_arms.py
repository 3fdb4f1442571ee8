import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxn.bench.runner import measure
from mxn.bench.workloads import PromptMaker, parse_workloads
from mxn.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("peer_arms", "bounds", "cpu"):
        sys.modules.pop(name, None)


async def is_stopped(pid: int) -> bool:
    """A signal is sent at once but takes its time to act."""
    for _ in range(500):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_side_runs_in_a_process_of_its_own_that_is_stopped_outside_its_turn(model_folder: str) -> None:
    from peer_arms import Peer, started

    prompts = PromptMaker(model_folder, seed=0)
    peer = Peer(label="fake", worker="mxn", model=model_folder, options=("--backend", "fake"), quantisation="fp32")
    async with started(peer, "tiny", prompts, limit_s=30) as side:
        assert side.pid is not None
        assert await is_stopped(side.pid)
        (record,) = await measure([side], parse_workloads("W2c8"), prompts, repetitions=2)
        assert await is_stopped(side.pid)
    assert record.faults == ()
    assert record.subject.interface == "in process"
    assert record.num_output_tokens == 2 * 32 * 64
    assert record.num_prompt_tokens == 2 * 32 * 128
    assert not Path(f"/proc/{side.pid}").exists()


async def test_server_is_started_and_measured_once_it_answers(model_folder: str) -> None:
    from cpu import free_port
    from peer_arms import Peer, started

    port = free_port()
    command = (sys.executable, "-m", "mxn.cli.main", "serve", model_folder, "--backend", "fake", "--port", str(port))
    prompts = PromptMaker(model_folder, seed=0)
    peer = Peer(label="server", url=f"http://127.0.0.1:{port}/v1", command=command)
    async with started(peer, "tiny", prompts, limit_s=30) as side:
        (record,) = await measure([side], parse_workloads("W2c8"), prompts, repetitions=1)
    assert record.faults == ()
    assert record.subject.interface == "HTTP"


async def test_late_side_fails_and_is_not_asked_again(model_folder: str) -> None:
    from peer_arms import Peer, started

    prompts = PromptMaker(model_folder, seed=0)
    peer = Peer(label="fake", worker="mxn", model=model_folder, options=("--backend", "fake"))
    async with started(peer, "tiny", prompts, limit_s=1e-3) as side:
        for _ in range(2):
            (result,) = await side.run([" time year people"], 64, 1)
            assert result.error == "not done after 0.001 s; it was not asked again"


async def test_side_that_does_not_start_is_quoted(model_folder: str) -> None:
    from peer_arms import Peer, PeerError, started

    prompts = PromptMaker(model_folder, seed=0)
    peer = Peer(label="broken", worker="mxn", model=model_folder, options=("--backend", "nonsense"))
    with pytest.raises(PeerError, match=r"(?s)broken ended with exit code 1.*nonsense"):
        async with started(peer, "tiny", prompts, limit_s=1):
            pass


def test_peer_is_a_worker_or_a_server(tmp_path: Path) -> None:
    from peer_arms import load_setup

    path = tmp_path / "setup.yaml"
    path.write_text("model: tiny\npeers: [{label: odd, url: http://x/v1, worker: openvino}]\n")
    with pytest.raises(ConfigError, match="odd needs either worker"):
        load_setup(path)
    path.write_text("model: tiny\npeers: [{label: far, worker: openvino, python: /nowhere/python}]\n")
    assert load_setup(path).peers[0].missing == "there is no /nowhere/python"
