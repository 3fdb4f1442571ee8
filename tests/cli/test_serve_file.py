"""`mxn serve mxn.yaml` with real processes on the fake backend: taken over after kill -9, changed, drained, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Mxn, Ran, Serving

FILE = """
server: {{port: 0, drain_s: 5}}
cluster: {{adopt_s: {adopt_s}}}
policy: {{fallback: allow}}
deployments:
  - {{name: one, model: {folder}, backend: fake, replicas: {{min: {replicas}}}, max_num_seqs: {seqs}}}
  - {{name: two, model: {folder}, backend: fake, options: {{step_ms: 1}}}}
{more}
"""


@pytest.fixture
def write(tmp_path: Path, model_folder: str) -> Callable[..., Path]:
    def write_file(*, replicas: int = 2, seqs: int = 8, adopt_s: float = 20, more: str = "") -> Path:
        path = tmp_path / "mxn.yaml"
        text = FILE.format(folder=model_folder, replicas=replicas, seqs=seqs, adopt_s=adopt_s, more=more)
        path.write_text(text.replace("FOLDER", model_folder))
        return path

    return write_file


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """A folder for sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="mxn-") as name:
        yield Path(name)


@pytest.fixture
def serve_file(environment: dict[str, str], run_folder: Path) -> Iterator[Callable[[Path], Serving]]:
    """Starts `mxn serve FILE`; whatever is left is ended at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path) -> Serving:
        process = subprocess.Popen(
            [sys.executable, "-m", "mxn.cli.main", "serve", str(path), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"MXN_RUNTIME_DIR": str(run_folder), "MXN_LOG_LEVEL": "info"},
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            assert process.stderr is not None
            pytest.fail(process.stderr.read())
        return Serving(process, json.loads(line))

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    for path in run_folder.glob("*/state.json"):
        assert json.loads(path.read_text())["replicas"] == []


def status_of(serving: Serving) -> dict[str, Any]:
    with urllib.request.urlopen(serving.url.removesuffix("/v1") + "/v1/mxn/status", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def deployment_of(serving: Serving, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in status_of(serving)["deployments"] if one["model"] == name)
    return found


def complete(serving: Serving, model: str, prompt: str = "hello") -> str:
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"{serving.url}/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


def worker_pids(run_folder: Path) -> set[int]:
    """Replicas that the state file names."""
    [path] = run_folder.glob("*/state.json")
    return {record["pid"] for record in json.loads(path.read_text())["replicas"]}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "the condition was not met in time"
        time.sleep(0.05)


def test_replicas_outlive_a_killed_server_and_the_next_one_takes_them_over(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], run_folder: Path
) -> None:
    path = write(more="  - {name: cold, model: FOLDER, backend: fake, keep_loaded: false}")
    first = serve_file(path)
    assert len(worker_pids(run_folder)) == 3
    assert deployment_of(first, "cold")["state"] == "unloaded"
    assert complete(first, "cold")
    before, text = worker_pids(run_folder), complete(first, "one")
    assert len(before) == 4
    first.process.kill()
    first.process.communicate()
    second = serve_file(path)
    assert worker_pids(run_folder) == before
    assert deployment_of(second, "cold")["is_ready"]  # what was loaded on demand stays so
    assert complete(second, "one") == text
    second.process.send_signal(signal.SIGTERM)
    _, errors = second.process.communicate(timeout=30)
    assert second.process.returncode == 0, errors
    until(lambda: not any(map(is_running, before)))


def test_replicas_end_by_themselves_when_no_server_comes(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], run_folder: Path
) -> None:
    serving = serve_file(write(adopt_s=0.5))
    pids = worker_pids(run_folder)
    serving.process.kill()
    serving.process.communicate()
    until(lambda: not any(map(is_running, pids)))
    for state in run_folder.glob("*/state.json"):
        state.unlink()


def test_apply_goes_over_to_a_changed_file_and_keeps_what_stays(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], mxn: Mxn, run_folder: Path
) -> None:
    serving = serve_file(write())
    before = worker_pids(run_folder)
    path = write(seqs=4, replicas=1, more="  - {name: three, model: FOLDER, backend: fake}")
    ran = mxn("apply", str(path), "--url", serving.url)
    assert ran.code == 0, ran.err
    until(lambda: [d["model"] for d in status_of(serving)["deployments"] if d["is_ready"]] == ["one", "two", "three"])
    until(lambda: len(worker_pids(run_folder)) == 3)
    assert len(worker_pids(run_folder) & before) == 1  # two runs on; one was replaced
    assert complete(serving, "three")


def test_a_bad_file_is_refused_with_its_faults_and_the_old_plan_goes_on(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], mxn: Mxn, run_folder: Path
) -> None:
    path = write()
    serving = serve_file(path)
    before = worker_pids(run_folder)
    path.write_text("deployments: [{model: 7, colour: red}]\n")
    ran: Ran = mxn("apply", "--url", serving.url)
    assert ran.code == 1
    assert "deployments[0].colour: unknown key" in ran.err
    assert "deployments[0].model: expected" in ran.err
    serving.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert complete(serving, "one")
    assert worker_pids(run_folder) == before
    write(replicas=1)
    serving.process.send_signal(signal.SIGHUP)
    until(lambda: len(worker_pids(run_folder)) == 2)


def test_a_replica_and_a_chip_can_be_drained(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], mxn: Mxn, run_folder: Path
) -> None:
    serving = serve_file(write())
    ran = mxn("drain", "one/0", "--url", serving.url)
    assert ran.code == 0, ran.err
    assert "ending: one/0" in ran.out
    until(lambda: len(worker_pids(run_folder)) == 2)
    assert complete(serving, "one")
    ran = mxn("drain", "nothing", "--url", serving.url)
    assert ran.code == 1
    assert 'nothing is called "nothing"' in ran.err
    assert 'there is no chip "gpu-7"' in mxn("cordon", "gpu-7", "--url", serving.url).err.replace("'", '"')
    assert mxn("cordon", "fake-0", "--url", serving.url).code == 0
    ran = mxn("apply", "--url", serving.url)  # a plan uses no cordoned chip, and there is no other
    assert "fake on fake-0 may not be used now" in ran.out
    assert mxn("uncordon", "fake-0", "--url", serving.url).code == 0
    until(lambda: len(worker_pids(run_folder)) == 3)


def test_a_lost_chip_leaves_the_deployment_degraded_with_the_reason(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path]
) -> None:
    serving = serve_file(write(more="  - {name: doomed, model: FOLDER, backend: fake, options: {lose_chip_after: 3}}"))
    with pytest.raises(urllib.error.HTTPError) as caught:
        complete(serving, "doomed")
    caught.value.close()
    until(lambda: "chip fake-0 is lost" in json.dumps(status_of(serving)))


def test_only_a_file_of_the_servers_own_user_is_applied(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], tmp_path: Path
) -> None:
    serving = serve_file(write())
    loose = tmp_path / "loose.yaml"
    loose.write_text("deployments: []\n")
    loose.chmod(0o666)
    for body, status in (
        ({"path": str(loose)}, 403),
        ({"path": "relative.yaml"}, 400),
        ({"path": "/nowhere.yaml"}, 400),
        ({"text": "deployments: []"}, 400),
    ):
        request = urllib.request.Request(
            serving.url + "/mxn/apply", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == status
        caught.value.close()
    request.add_header("Origin", "http://evil.example")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 403
    caught.value.close()


def test_a_file_is_served_once(
    serve_file: Callable[[Path], Serving], write: Callable[..., Path], mxn: Mxn, run_folder: Path
) -> None:
    path = write()
    serving = serve_file(path)
    ran = mxn("serve", str(path), MXN_RUNTIME_DIR=str(run_folder))
    assert ran.code == 2
    assert f"served by process {serving.process.pid} already: `mxn apply` changes what it serves" in ran.err
    assert os.path.exists(path)
