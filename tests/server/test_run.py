"""Serving as a process: addresses, signals, draining."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from mxn.core.model import Model
from mxn.errors import ConfigError
from mxn.fleet.fleet import Fleet
from mxn.server.app import build_app
from mxn.server.run import check_address, serve
from mxn.server.settings import ServerSettings

PROGRAM = """
import asyncio, json, sys
import msgspec
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.fleet.spec import DeploymentSpec
from mxn.fleet.fleet import Fleet
from mxn.server.app import build_app
from mxn.server.run import serve
from mxn.server.settings import ServerSettings

async def main():
    model = msgspec.json.decode(sys.argv[1], type=Model)
    chip = Chip(uid="fake-0", kind=None, name="Simulated chip", vendor="mxn", memory_bytes=1 << 30, cores=1)
    settings = LoadSettings(options=(("step_ms", "10"),))
    fleet = Fleet([DeploymentSpec.single(name="m", model=model, backend="fake", chips=[chip], settings=settings)])
    await fleet.start()
    app = build_app(fleet, ServerSettings(drain_s=float(sys.argv[2])))
    code = await serve(app, port=0, on_started=lambda url: print(url, flush=True))
    await fleet.stop(drain_s=1)
    return code

assert "torch" not in sys.modules
sys.exit(asyncio.run(main()))
"""


@contextmanager
def serving(model: Model, drain_s: float = 10) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server in a process of its own, and its URL."""
    arguments = [sys.executable, "-c", PROGRAM, msgspec.json.encode(model).decode(), str(drain_s)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def body(num_tokens: int) -> dict[str, object]:
    return {"model": "m", "prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}


@contextmanager
def streaming(url: str, num_tokens: int) -> Iterator[Iterator[bytes]]:
    """The chunks of a running stream; it is closed when nothing holds them."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body(num_tokens)) as response:
        yield response.iter_bytes()


def wait_until_draining(url: str) -> httpx.Response:
    for _ in range(200):
        response = httpx.get(f"{url}/readyz")
        if response.status_code == 503:
            return response
        time.sleep(0.005)
    raise AssertionError("the server does not drain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_process_exits_0(fake_model: Model, number: signal.Signals) -> None:
    with serving(fake_model) as (process, url), streaming(url, 60) as chunks:
        text = next(chunks)
        process.send_signal(number)
        ready = wait_until_draining(url)
        assert ready.json()["status"] == "draining"
        assert httpx.get(f"{url}/livez").status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json=body(1))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "service_unavailable"
        text += b"".join(chunks)
        assert text.endswith(b"data: [DONE]\n\n")
        assert process.wait(10) == 0


def test_a_second_signal_ends_at_once(fake_model: Model) -> None:
    with serving(fake_model, drain_s=60) as (process, url), streaming(url, 1900) as chunks:
        next(chunks)
        process.send_signal(signal.SIGTERM)
        wait_until_draining(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 1


def test_requests_that_outlast_the_drain_are_ended(fake_model: Model) -> None:
    with serving(fake_model, drain_s=0.3) as (process, url), streaming(url, 1900) as chunks:
        next(chunks)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 1


def test_an_idle_server_leaves_at_once_and_takes_its_children_along(fake_model: Model) -> None:
    with serving(fake_model) as (process, url):
        chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2  # the replica and the template's process
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        time.sleep(0.1)
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_children_end_when_the_gateway_is_killed(fake_model: Model) -> None:
    with serving(fake_model) as (process, url):
        httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 1})
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while any(is_running(int(child)) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_only_loopback_is_listened_on(fake_model: Model) -> None:
    with serving(fake_model) as (process, url):
        port = httpx.URL(url).port
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        inodes = {
            os.readlink(link).removeprefix("socket:[").removesuffix("]")
            for pid in [process.pid, *children_of(process.pid)]
            for link in Path(f"/proc/{pid}/fd").iterdir()
            if link.is_symlink() and os.readlink(link).startswith("socket:")
        }
        own = [fields[1] for fields in listening if fields[3] == "0A" and fields[9] in inodes]
        assert own == [f"0100007F:{port:04X}"]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        check_address(host, ServerSettings())
    check_address(host, ServerSettings(api_keys=("a-key",)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    check_address(host, ServerSettings())


async def test_a_taken_port_is_an_error_that_says_what_to_do() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="--port"):
            await serve(build_app(Fleet([]), ServerSettings()), port=port)


def test_the_gateway_imports_no_torch() -> None:
    code = "import sys, json, mxn.server.run, mxn.server.app, mxn.fleet.fleet; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "transformers", "triton", "onnxruntime"} & set(modules)
