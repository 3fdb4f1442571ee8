"""Serves an application until a signal, and drains before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from mxn.errors import ConfigError
from mxn.server.connection import protocol_for
from mxn.server.gateway import Gateway
from mxn.server.settings import ServerSettings

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048


async def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_started: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    is_shared: bool = False,
) -> int:
    """Serves an app of `build_app` until SIGTERM or SIGINT; returns the exit code: 0 drained, 1 forced.

    The first signal turns new work away (503) and lets what runs finish for `drain_s`; a second one ends it at once.
    on_started: called with the base URL when connections are accepted; port 0 lets the system choose one.
    stop: does what the first signal does when it is set, for callers that are no process of their own.
    is_shared: other gateways of this user may listen on the same address, and the system spreads connections over them.
    Raises: ConfigError when the address cannot be used, or is not loopback and no API key is set.
    """
    gateway: Gateway = app.state.gateway
    listener = _listen(host, port, gateway.settings, is_shared=is_shared)
    server = _Server(_config(app, gateway.settings))
    drain = _Drain(gateway, server)
    with _handle_signals(drain.on_signal):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if server.started and on_started is not None:
            on_started(f"http://{_shown(host)}:{listener.getsockname()[1]}")
        stopping = asyncio.create_task(_when_set(stop, drain.on_signal)) if stop is not None else None
        try:
            await serving
        finally:
            await drain.finished()
            if stopping is not None:
                stopping.cancel()
            listener.close()
    return 1 if drain.is_forced else 0


def check_address(host: str, settings: ServerSettings) -> None:
    """Raises ConfigError when `host` is reachable from elsewhere and no API key is set."""
    if not settings.api_keys and not _is_loopback(host):
        raise ConfigError(
            f"refusing to serve on {host} without an API key: anybody who reaches this address could use it. "
            "Set one with --api-key or MXN_API_KEY, or serve on 127.0.0.1"
        )


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which re-raises the signal at the end instead of exiting 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Drain:
    """What happens between the first signal and the end."""

    def __init__(self, gateway: Gateway, server: uvicorn.Server) -> None:
        self.is_forced = False
        self._gateway = gateway
        self._server = server
        self._task: asyncio.Task[None] | None = None

    def on_signal(self) -> None:
        """Begins to drain; called again, ends at once."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        else:
            log.warning("second signal: ending %d requests now", self._gateway.num_active)
            self._force()

    async def finished(self) -> None:
        """Returns when draining is over."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        gateway = self._gateway
        gateway.is_draining = True
        log.info("draining: %d requests in work, at most %g s", gateway.num_active, gateway.settings.drain_s)
        try:
            await asyncio.wait_for(gateway.wait_until_idle(), gateway.settings.drain_s)
        except TimeoutError:
            log.warning("%d requests did not finish in time and are ended", gateway.num_active)
            self._force()
        self._server.should_exit = True

    def _force(self) -> None:
        self.is_forced = True
        for task in self._server.server_state.tasks:
            task.cancel()
        self._server.should_exit = True


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol_for(settings),
        loop="none",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=round(settings.keep_alive_s),
        timeout_graceful_shutdown=1,
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=settings.max_head_bytes,
    )


def _listen(host: str, port: int, settings: ServerSettings, *, is_shared: bool = False) -> socket.socket:
    check_address(host, settings)
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.socket_buffer_bytes)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --host or --port"
        ) from error
    listener.setblocking(False)
    return listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _when_set(event: asyncio.Event, action: Callable[[], None]) -> None:
    await event.wait()
    action()


@contextlib.contextmanager
def _handle_signals(handler: Callable[[], None]) -> Iterator[None]:
    """Calls `handler` on the event loop for each signal; does nothing outside the main thread, where none arrive."""
    loop = asyncio.get_running_loop()
    handled = []
    try:
        for number in _SIGNALS:
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, handler)
                handled.append(number)
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
