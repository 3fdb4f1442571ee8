"""`mxn serve` on a real Ray cluster: a head and nodes with two kinds of simulated chips, all on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(find_spec("ray") is None, reason="mxn[ray] is not installed"),
]

NODES = {"a": ["sim-a"], "b": ["sim-b", "sim-b", "sim-b"]}
PROMPT = [5, 6, 7, 8]


@dataclass
class Served:
    """A cluster, and an mxn that serves on it."""

    url: str
    process: subprocess.Popen[str]
    nodes: subprocess.Popen[str]

    def remove_node(self, name: str) -> None:
        """Kills a node and all that runs on it."""
        assert self.nodes.stdin is not None
        assert self.nodes.stdout is not None
        print(name, file=self.nodes.stdin, flush=True)
        assert self.nodes.stdout.readline() == "removed\n"

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, trust_env=False, timeout=5).json()

    def until(self, is_true: Callable[[], bool], seconds: float) -> float:
        """Seconds until it was; what cannot be told yet is not true."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < seconds:
            try:
                if is_true():
                    return time.monotonic() - start_s
            except (httpx.HTTPError, KeyError):
                pass
            time.sleep(0.1)
        raise AssertionError(f"not true after {seconds} s; status: {self.get('/v1/mxn/status')}")

    def workers(self, model: str) -> set[int]:
        """Process ids of the replicas that a gateway holds for ready."""
        [deployment] = [one for one in self.get("/v1/mxn/status")["deployments"] if one["model"] == model]
        return {one["info"]["pid"] for one in deployment["replicas"] if one["state"] == "ready"}

    def kinds(self) -> dict[str, set[str]]:
        """Kinds of the chips under the ready replicas of each deployment."""
        return {
            deployment["model"]: {
                chip.split("/")[0].split(".")[-1]
                for one in deployment["replicas"]
                if one["state"] == "ready"
                for chip in one["chips"]
            }
            for deployment in self.get("/v1/mxn/status")["deployments"]
        }

    def answers(self, model: str, times: int = 12) -> bool:
        """Whether so many requests in a row are answered, each over a connection and perhaps a gateway of its own."""
        return all(ask(self.url, model, 4).status_code == 200 for _ in range(times))


def ask(url: str, model: str, max_tokens: int) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=5)


async def stream(url: str, model: str, max_tokens: int) -> str:
    """The text of a streamed answer that ended as it should."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    text, is_done = "", False
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
        client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response,
    ):
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"]
    assert is_done
    return text


@pytest.fixture(scope="module")
def served(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills workers when others fill the machine's memory
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    nodes = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), json.dumps(NODES)], **pipes
    )
    process = None
    try:
        assert nodes.stdout is not None
        file = tmp_path_factory.mktemp("ray") / "mxn.yaml"
        file.write_text(_yaml(nodes.stdout.readline().strip(), model_folder))
        process = subprocess.Popen(
            [sys.executable, "-m", "mxn.cli.main", "serve", str(file), "--port", port, "--json"], **pipes
        )
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        found = Served(url=ready["url"].removesuffix("/v1"), process=process, nodes=nodes)
        found.until(lambda: found.answers("moves") and found.answers("pair"), 60)
        yield found
    finally:
        for child in filter(None, (process, nodes)):
            _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """By the end of its stdin where that is enough, else by force."""
    try:
        child.communicate(timeout=1 if "serve" in child.args else 60)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def _yaml(address: str, model: str) -> str:
    options = "options: {step_ms: 20}"
    return f"""
server: {{drain_s: 5}}
cluster: {{launcher: ray, ray: {{address: "{address}"}}}}
deployments:
  - {{name: moves, model: {model}, backend: fake, {options}}}
  - {{name: pair, model: {model}, backend: fake, {options}, where: {{chips: [sim-b]}}, replicas: {{min: 2}}}}
"""


def test_every_deployment_has_its_replicas_on_the_kind_of_chip_it_was_placed_on(served: Served) -> None:
    assert {name: len(served.workers(name)) for name in ("moves", "pair")} == {"moves": 1, "pair": 2}
    assert served.kinds() == {"moves": {"sim-a"}, "pair": {"sim-b"}}


def test_the_official_client_streams_from_the_cluster(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.completions.create(model="pair", prompt="a", max_tokens=9, temperature=0, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


async def test_streams_go_on_by_the_same_text_when_one_of_two_replicas_is_killed(served: Served) -> None:
    expected = await stream(served.url, "pair", 100)
    streams = [asyncio.create_task(stream(served.url, "pair", 100)) for _ in range(8)]
    await asyncio.sleep(0.7)
    killed = min(served.workers("pair"))
    os.kill(killed, signal.SIGKILL)
    assert set(await asyncio.gather(*streams)) == {expected}
    seconds = served.until(lambda: len(served.workers("pair") - {killed}) == 2 and served.answers("pair"), 30)
    print(f"two replicas again after {seconds:.1f} s")


def test_what_a_lost_node_served_is_served_on_chips_of_another_kind(served: Served) -> None:
    served.remove_node("a")
    seconds = served.until(lambda: served.kinds()["moves"] == {"sim-b"} and served.answers("moves"), 30)
    print(f"served again after {seconds:.1f} s")
    assert served.answers("pair")


def test_sigterm_ends_all_that_runs_on_the_cluster_and_exits_zero(served: Served) -> None:
    workers = served.workers("moves") | served.workers("pair")
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert len(workers) == 3
    assert not any(psutil.pid_exists(pid) for pid in workers)
