"""Replica processes that outlive their gateway, on the fake backend."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from mxn.core.request import SamplingParams, SequenceRequest
from mxn.engine.messages import Load
from mxn.errors import BackendError, ConfigError
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.replica import Replica
from mxn.fleet.spec import DeploymentSpec
from mxn.fleet.state import MAX_SOCKET_PATH, ReplicaRecord, RuntimeFolder, process_start

UPSTREAM = Path(__file__).parents[2] / "engine" / "proxy" / "upstream.py"
Make = Callable[..., DeploymentSpec]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def load_of(spec: DeploymentSpec) -> Load:
    [placement] = spec.placements
    return Load(
        backend=placement.backend,
        model=spec.model,
        settings=placement.settings,
        chips=list(placement.chips),
        max_waiting=spec.max_queue,
    )


class Gateways:
    """Gateways over one folder, one after another; what they start is killed at the end of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replicas: list[Replica] = []
        self.launcher: LocalLauncher | None = None
        self._folder: RuntimeFolder | None = None

    def next(self, adopt_s: float = 20.0) -> LocalLauncher:
        """A new gateway's launcher; the one before is gone as after kill -9: its sockets and its lock are closed."""
        for replica in self.replicas:
            replica._link.writer.close()
        for spare in self.launcher._spares.values() if self.launcher is not None else ():
            spare.result().link.writer.close()
        if self._folder is not None:
            self._folder.close()
        self._folder = RuntimeFolder(self.path)
        self.launcher = LocalLauncher(self._folder, adopt_s=adopt_s)
        return self.launcher

    @property
    def records(self) -> list[ReplicaRecord]:
        assert self._folder is not None
        return self._folder.state.replicas

    async def start(self, launcher: LocalLauncher, load: Load) -> Replica:
        replica = await launcher.start(load, lambda phase, fraction: None, {})
        self.replicas.append(replica)
        return replica


@pytest.fixture
async def gateways(tmp_path: Path) -> AsyncIterator[Gateways]:
    made = Gateways(tmp_path / "run")
    yield made
    made.next()
    for replica in made.replicas:
        await asyncio.wait_for(replica.kill(), 10)


async def tokens_of(replica: Replica, seq_id: int) -> list[int]:
    request = SequenceRequest(seq_id=seq_id, prompt_token_ids=[1, 2, 3], sampling=GREEDY)
    return [token async for output in replica.submit(request) for token in output.token_ids]


async def text_of(replica: Replica, seq_id: int) -> str:
    request = SequenceRequest(seq_id=seq_id, prompt_token_ids=[1, 2, 3], sampling=GREEDY)
    return "".join([output.text or "" async for output in replica.submit(request)])


def pid_of(replica: Replica) -> int:
    assert replica.info is not None
    return replica.info.pid


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_the_next_gateway_takes_a_replica_over_and_its_sequences_are_gone(
    gateways: Gateways, fake_deployment: Make
) -> None:
    load = load_of(fake_deployment(options={"step_ms": 5, "load_ms": 300}))
    first = await gateways.start(gateways.next(), load)
    before = await tokens_of(first, 1)
    endless = SequenceRequest(seq_id=2, prompt_token_ids=[5], sampling=SamplingParams(max_tokens=2000))
    await anext(first.submit(endless))
    launcher = gateways.next()
    await launcher.keep_only([(load, {})])
    second = await gateways.start(launcher, load)
    assert pid_of(second) == pid_of(first)
    await until(lambda: second.stats.num_aborted == 1)
    assert second.stats.num_free_blocks == second.stats.num_total_blocks
    assert await tokens_of(second, 2) == before
    await second.stop(5.0)
    await until(lambda: not gateways.records)


async def test_what_nobody_wants_is_stopped_and_what_differs_is_started_anew(
    gateways: Gateways, fake_deployment: Make
) -> None:
    old, other = load_of(fake_deployment()), load_of(fake_deployment(max_num_seqs=3))
    first = await gateways.start(gateways.next(), old)
    launcher = gateways.next()
    await launcher.keep_only([(other, {})])
    assert process_start(pid_of(first)) is None
    second = await gateways.start(launcher, other)
    assert pid_of(second) != pid_of(first)
    assert [record.pid for record in gateways.records] == [pid_of(second)]


async def test_a_replica_without_a_gateway_ends_by_itself(gateways: Gateways, fake_deployment: Make) -> None:
    replica = await gateways.start(gateways.next(adopt_s=0.5), load_of(fake_deployment()))
    gateways.next()
    await until(lambda: process_start(pid_of(replica)) is None)


async def test_a_hung_replica_is_not_taken_over_but_ended(
    gateways: Gateways, fake_deployment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxn.fleet.launchers.local.ADOPTION_S", 0.3)
    load = load_of(fake_deployment())
    first = await gateways.start(gateways.next(), load)
    launcher = gateways.next()
    os.kill(pid_of(first), signal.SIGSTOP)
    second = await gateways.start(launcher, load)
    assert pid_of(second) != pid_of(first)
    await until(lambda: process_start(pid_of(first)) is None)


async def test_a_process_that_is_not_provably_its_own_is_left_alone(gateways: Gateways, fake_deployment: Make) -> None:
    load = load_of(fake_deployment())
    await gateways.start(gateways.next(), load)
    launcher = gateways.next()
    stranger = await asyncio.create_subprocess_exec("sleep", "30")
    [record] = launcher._orphans.values()
    for wrong in (
        {"pid": stranger.pid},  # started at another time
        {"pid": stranger.pid, "started": process_start(stranger.pid)},  # does not answer at the socket
    ):
        fields = {name: getattr(record, name) for name in record.__struct_fields__} | wrong
        launcher._orphans = {stranger.pid: ReplicaRecord(**fields)}
        if "started" not in wrong:
            await launcher.keep_only([])
            assert stranger.returncode is None
        replica = await gateways.start(launcher, load)
        assert pid_of(replica) != stranger.pid
    assert stranger.returncode is None
    stranger.kill()
    await stranger.wait()


async def test_the_log_of_a_lasting_replica_explains_its_end(gateways: Gateways, fake_deployment: Make) -> None:
    with pytest.raises(BackendError, match="no such weights"):
        await gateways.start(gateways.next(), load_of(fake_deployment(options={"fail_load": "no such weights"})))
    replica = await gateways.start(gateways.next(), load_of(fake_deployment()))
    os.kill(pid_of(replica), signal.SIGKILL)
    await asyncio.wait_for(replica.ended.wait(), 10)
    assert "signal 9" in replica.end_reason
    await until(lambda: not gateways.records)
    assert sorted(path.name for path in gateways.path.iterdir()) == ["lock", "state.json"]


async def test_a_spare_process_takes_the_next_model_and_another_takes_its_place(
    gateways: Gateways, fake_deployment: Make
) -> None:
    launcher = gateways.next()
    launcher.keep_spares(["fake"])
    spare = await launcher._spares["fake"]
    replica = await gateways.start(launcher, load_of(fake_deployment()))
    assert pid_of(replica) == spare.process.pid
    assert await tokens_of(replica, 1)
    following = await launcher._spares["fake"]
    assert following.process.pid != spare.process.pid
    [record] = gateways.records
    assert record.pid == spare.process.pid
    assert (await gateways.start(gateways.next(), load_of(fake_deployment()))).info == replica.info  # taken over
    await asyncio.wait_for(following.process.wait(), 10)  # a spare one ends with its gateway
    launcher.keep_spares([])


async def test_a_replica_whose_model_runs_in_a_server_is_taken_over_with_it_and_ends_with_it(
    gateways: Gateways, fake_deployment: Make
) -> None:
    command = shlex.join([sys.executable, str(UPSTREAM), "--port", "{port}"])
    spec = fake_deployment(options={"command": command, "stop_timeout_s": 5}, backend="server")
    load = load_of(spec)
    first = await gateways.start(gateways.next(adopt_s=1.0), load)
    servers = {child.pid for child in psutil.Process(pid_of(first)).children(recursive=True)}
    assert servers
    text = await text_of(first, 1)
    endless = SequenceRequest(seq_id=2, prompt_token_ids=[5], sampling=SamplingParams(max_tokens=2000))
    first.submit(endless)
    second = await gateways.start(gateways.next(adopt_s=1.0), load)
    assert pid_of(second) == pid_of(first)
    assert {child.pid for child in psutil.Process(pid_of(second)).children(recursive=True)} == servers
    assert await text_of(second, 1) == text
    gateways.next()
    await until(lambda: not any(process_start(pid) for pid in (*servers, pid_of(first))), 20)


async def test_the_folder_is_private_and_held_by_one_gateway(gateways: Gateways, fake_deployment: Make) -> None:
    await gateways.start(gateways.next(), load_of(fake_deployment()))
    assert stat.S_IMODE(gateways.path.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match=rf"served by process {os.getpid()} already"):
        RuntimeFolder(gateways.path)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others; set MXN_RUNTIME_DIR"):
        RuntimeFolder(tmp_path / "run")


def test_a_socket_fits_into_its_address_wherever_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    monkeypatch.setenv("MXN_RUNTIME_DIR", str(deep))
    folder = RuntimeFolder.of(tmp_path / "mxn.yaml")
    path = folder.path / "01234567.sock"
    assert len(os.fsencode(path)) <= MAX_SOCKET_PATH
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    folder.close()
    assert RuntimeFolder.of(tmp_path / "mxn.yaml").path == folder.path
    shutil.rmtree(folder.path.parent)


def test_a_state_that_cannot_be_read_or_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{")
    folder = RuntimeFolder(tmp_path / "run")
    assert folder.state.replicas == []
    (tmp_path / "run" / "state.json.new").mkdir()  # as a full disk: the new file cannot be written
    folder.state.cordoned["cpu-0"] = "by hand"
    folder.save()
    folder.close()
    (tmp_path / "run" / "state.json.new").rmdir()
    folder = RuntimeFolder(tmp_path / "run")
    folder.state.cordoned["cpu-0"] = "by hand"
    folder.save()
    folder.close()
    assert RuntimeFolder(tmp_path / "run").state.cordoned == {"cpu-0": "by hand"}
