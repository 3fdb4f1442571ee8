"""Routes that change what runs: a new plan, drained replicas, chips that may not be used.

A plan comes from a file on the server's own disk that nobody but its user, or root, can have written: who holds a key
may choose among such files and can bring none along, so a key never lets anyone run a command here.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from mxn.backends.survey import physical_chips, survey
from mxn.errors import MxnError, RequestError
from mxn.server.body import read_json
from mxn.server.errors import ErrorAnswer, brief
from mxn.server.gateway import Gateway
from mxn.server.openai import Checked, check

if TYPE_CHECKING:
    from mxn.fleet.supervisor import Supervisor

_MAX_FAULTS_CHARS = 20_000


class ApplyRequest(Checked):
    """POST /v1/mxn/apply. path: the file; the one that the server was started with when left out."""

    path: str | None = Field(default=None, min_length=1, max_length=4096)


class DrainRequest(Checked):
    """POST /v1/mxn/drain. name: a chip, a deployment, or a replica such as "smollm2/0"."""

    name: str = Field(min_length=1, max_length=512)


class CordonRequest(Checked):
    """POST /v1/mxn/cordon and uncordon. chip: its uid."""

    chip: str = Field(min_length=1, max_length=512)


R = TypeVar("R", bound=Checked)


class ControlRoutes:
    """Handlers of /v1/mxn/apply, drain, cordon and uncordon: POST, a JSON object in, what became of it out."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def apply(self, request: Request) -> Response:
        """Goes over to what a file says now."""
        path = (await self._read(request, ApplyRequest)).path
        return await self._do(self._gateway.fleet.reload(_checked_file(path) if path is not None else None))

    async def drain(self, request: Request) -> Response:
        """Empties a chip, a deployment or a replica."""
        return await self._do(self._supervisor.drain((await self._read(request, DrainRequest)).name))

    async def cordon(self, request: Request) -> Response:
        """Lets nothing start on a chip any more."""
        chip = (await self._read(request, CordonRequest)).chip
        used = {one.uid for deployment in self._gateway.fleet.deployments for one in deployment.chips}
        if chip not in used:
            here = await asyncio.to_thread(_chips_here)
            if chip not in here:
                there = ", ".join(sorted(used | here))
                raise RequestError(f"there is no chip {brief(chip)}; there are: {there}", param="chip")
        return await self._do(self._supervisor.cordon(chip))

    async def uncordon(self, request: Request) -> Response:
        """Lets a chip be used again."""
        return await self._do(self._supervisor.uncordon((await self._read(request, CordonRequest)).chip))

    @property
    def _supervisor(self) -> Supervisor:
        return self._gateway.fleet.supervisor

    async def _read(self, request: Request, kind: type[R]) -> R:
        if "origin" in request.headers:  # no page that a browser shows may do this, whatever its address resolves to
            raise RequestError("this route is not for web pages", status=403)
        return check(kind, await read_json(request.scope["headers"], request.receive, self._gateway.settings))

    async def _do(self, work: Awaitable[list[str] | None]) -> Response:
        """Answers with what runs on which chips, or with why nothing was changed."""
        try:
            changed = await work
        except MxnError as error:
            message = str(error)[:_MAX_FAULTS_CHARS]
            return Response(
                ErrorAnswer(status=422, message=message, code="not_applied").body(), 422, None, "application/json"
            )
        deployments = [
            {
                "model": deployment.name,
                "state": deployment.state,
                "trouble": deployment.trouble,
                "replicas": [keeper.id for keeper in deployment.keepers],
            }
            for deployment in self._gateway.fleet.deployments
        ]
        answer = {"changed": changed or [], "deployments": deployments, "cordoned": self._supervisor.cordoned}
        return Response(msgspec.json.encode(answer), 200, None, "application/json")


def _chips_here() -> set[str]:
    """Uids of this machine's chips, as all backends name them."""
    return {seen.chip.uid for seen in physical_chips(survey())}


def _checked_file(name: str) -> Path:
    """A file that none but this user or root can have written. Raises: RequestError."""
    path = Path(name)
    if not path.is_absolute():
        raise RequestError("path: expected an absolute path on the server's machine", param="path")
    try:
        found = path.stat()
    except OSError as error:
        raise RequestError(f"path: cannot be read by the server: {error.strerror}", param="path") from None
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.getuid()) or found.st_mode & stat.S_IWOTH:
        raise RequestError("path: expected a file that only the server's own user can write", param="path", status=403)
    return path
