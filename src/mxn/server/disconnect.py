"""Notices that a client has left while its answer is still being made."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads the answer any more."""


class StopWhenGone:
    """Cancels the body of an `async with` as soon as the client leaves, and raises ClientGoneError instead.

    `receive` must be past the request's body.
    """

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._is_gone = False
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> StopWhenGone:
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._is_gone and kind is asyncio.CancelledError and self._task is not None and self._task.uncancel() == 0:
            raise ClientGoneError from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        if self._task is not None:
            self._task.cancel()
