"""A gateway over real replica processes of the fake backend, reached through real sockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.engine.tokenizer import Tokenizer
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.spec import DeploymentSpec
from mxn.server.app import build_app
from mxn.server.gateway import Gateway
from mxn.server.run import serve
from mxn.server.settings import ServerSettings


@dataclass(frozen=True)
class Running:
    """A server in a thread of its own. `call` runs a function on its event loop."""

    url: str
    fleet: Fleet
    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    http: httpx.Client

    def deployment(self, name: str = "fake-model") -> Deployment:
        found = self.fleet.get(name)
        assert found is not None
        return found

    def get_error(self, response: httpx.Response) -> dict[str, Any]:
        """The error object of a response, whose shape is checked."""
        error: dict[str, Any] = response.json()["error"]
        assert list(error) == ["message", "type", "param", "code", "request_id"]
        assert error["request_id"] == response.headers["x-request-id"]
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert "Traceback" not in error["message"]
        assert "/" + "tmp" not in error["message"]
        return error

    def wait_for(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition was not met in time"
            time.sleep(0.005)

    def num_free_blocks(self, name: str = "fake-model") -> int:
        return self.deployment(name).stats.num_free_blocks

    def post(self, path: str, body: object, **kwargs: object) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)  # type: ignore[arg-type]

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port


@contextmanager
def running_server(*specs: DeploymentSpec, settings: ServerSettings | None = None) -> Iterator[Running]:
    settings = settings or ServerSettings()
    started = threading.Event()
    found: list[Running] = []
    failure: list[BaseException] = []
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        fleet = Fleet(specs)
        await fleet.start()
        app = build_app(fleet, settings)
        key = settings.api_keys[0] if settings.api_keys else ""
        headers = {"authorization": f"Bearer {key}"} if key else {}

        def on_started(url: str) -> None:
            client = httpx.Client(base_url=url, headers=headers, timeout=20)
            found.append(Running(url=url, fleet=fleet, gateway=app.state.gateway, loop=loop, http=client))
            started.set()

        stopping = asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(stopping.set))
        try:
            await serve(app, port=0, on_started=on_started, stop=stopping)
        finally:
            await fleet.stop(drain_s=0.2)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failure.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    if failure:
        raise failure[0]
    try:
        yield found[0]
    finally:
        found[0].http.close()
        stop[0]()
        thread.join(20)
    if failure:
        raise failure[0]


SCRIPT = "hello world"
"""What "fake-model" of the shared server says before its end-of-text token; "hash-model" hashes its prompt."""


@pytest.fixture(scope="session")
def server(fake_model: Model, byte_tokenizer_folder: Path) -> Iterator[Running]:
    """A server that many tests share; they must leave it as they found it."""
    script = Tokenizer.load(str(byte_tokenizer_folder)).encode(SCRIPT + "<|im_end|>", add_special_tokens=False)
    specs = [
        spec_of(fake_model, "fake-model", script=",".join(map(str, script))),
        spec_of(fake_model, "hash-model"),
    ]
    with running_server(*specs) as running:
        yield running


def spec_of(model: Model, name: str, **options: object) -> DeploymentSpec:
    chip = Chip(uid=f"fake-{name}", kind=None, name="Simulated chip", vendor="mxn", memory_bytes=1 << 30, cores=1)
    settings = LoadSettings(options=tuple((key, str(value)) for key, value in options.items()))
    return DeploymentSpec.single(name=name, model=model, backend="fake", chips=[chip], settings=settings)


@pytest.fixture
def start_server() -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:
        yield lambda *specs, settings=None: stack.enter_context(running_server(*specs, settings=settings))
