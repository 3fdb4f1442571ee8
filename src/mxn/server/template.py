"""Renders a model's chat template in a child process that is replaced when it misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from asyncio.subprocess import PIPE, Process

import msgspec

from mxn.config.environment import child_environment
from mxn.errors import RequestError
from mxn.server.errors import fit_to_show
from mxn.server.settings import ServerSettings
from mxn.server.template_worker import LENGTH_BYTES, Failed, Refused, Render, Rendered, Setup

log = logging.getLogger(__name__)

_START_S = 20.0
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TZ", "LANG", "LC_ALL")
_DECODER = msgspec.msgpack.Decoder(Rendered | Refused | Failed)


class TemplateRenderer:
    """One template and the process that renders it. Conversations are rendered one at a time."""

    def __init__(self, template: str, special_tokens: dict[str, str], settings: ServerSettings) -> None:
        self._setup = Setup(template=template, special_tokens=special_tokens)
        self._settings = settings
        self._process: Process | None = None
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when none runs."""
        return self._process.pid if self._process is not None else None

    async def render(self, messages: list[dict[str, str]], variables: dict[str, bool]) -> str:
        """The prompt as the model was trained to see it.

        Raises: RequestError when the template refuses the conversation, fails, or takes too long.
        """
        async with self._lock:
            exchange = asyncio.ensure_future(self._exchange(Render(messages=messages, variables=variables)))
            try:
                answer = await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait([exchange])  # an answer left in the pipe would be taken for the next one's
                exchange.exception()
                raise
        if isinstance(answer, Rendered):
            return answer.text
        if isinstance(answer, Refused):
            raise RequestError(
                f"the model's chat template refuses this conversation: {fit_to_show(answer.message)}", param="messages"
            )
        raise _failed(answer.message)

    async def start(self) -> None:
        """Starts the child ahead of the first conversation; a template that does not compile is told then, not here."""
        async with self._lock:
            with contextlib.suppress(RequestError, OSError, TimeoutError, asyncio.IncompleteReadError):
                await self._started()

    async def close(self) -> None:
        """Ends the child."""
        async with self._lock:
            await self._kill()

    async def _exchange(self, request: Render) -> Rendered | Refused | Failed:
        try:
            process = await self._started()
            async with asyncio.timeout(self._settings.template_timeout_s):
                return await _ask(process, request)
        except TimeoutError:
            await self._kill()
            return Failed(f"it took longer than {self._settings.template_timeout_s:g} s")
        except (asyncio.IncompleteReadError, OSError):
            await self._kill()
            return Failed("it needed more time or memory than it may have")

    async def _started(self) -> Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        limits = self._settings
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mxn.server.template_worker",
            str(limits.template_memory_bytes),
            str(limits.template_timeout_s * 1.5),
            str(limits.max_template_bytes),
            stdin=PIPE,
            stdout=PIPE,
            env={name: value for name, value in child_environment().items() if name in _KEPT_ENVIRONMENT},
            limit=2 * limits.max_template_bytes,
        )
        self._process = process
        async with asyncio.timeout(_START_S):
            answer = await _ask(process, self._setup)
        if isinstance(answer, Failed):
            await self._kill()
            raise _failed(answer.message)
        return process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


async def _ask(process: Process, request: Setup | Render) -> Rendered | Refused | Failed:
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise BrokenPipeError("the template process has no pipes")
    data = msgspec.msgpack.encode(request)
    stdin.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    await stdin.drain()
    size = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "little")
    answer: Rendered | Refused | Failed = _DECODER.decode(await stdout.readexactly(size))
    return answer


def _failed(reason: str) -> RequestError:
    log.warning("chat template failed: %s", reason)
    return RequestError(
        f"the model's chat template failed: {fit_to_show(reason)}; /v1/completions takes a prompt without a template",
        param="messages",
        code="chat_template_error",
    )
