"""OpenAI's error object for every failure, and how each of mxn's errors becomes one."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from mxn.errors import MxnError, OverloadedError, ReplicaDiedError, RequestError, UnavailableError
from mxn.server.request_id import current_request_id

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PATH = re.compile(r"(?<![\w/.])/(?!v1/)(?:[\w.@+-]+/)+[\w.@+-]*|[A-Za-z]:\\[^\s'\"]+")
_MAX_MESSAGE_CHARS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorAnswer:
    """An error ready to be sent, as a response or as one event of a stream."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> bytes:
        """The error object as JSON: OpenAI's four fields, and the id of the request it answers."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
            "param": self.param,
            "code": self.code,
        }
        if request_id := current_request_id():
            error["request_id"] = request_id
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Response headers that belong to the error."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        if self.retry_after_s is not None:
            return [(b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s)))]
        return []


def answer_for(error: BaseException) -> ErrorAnswer:
    """What a client is told about `error`; unexpected ones are logged and answered without details."""
    if isinstance(error, OverloadedError | UnavailableError):
        retry_after_s = error.retry_after_s
        return ErrorAnswer(
            status=error.status,
            message=fit_to_show(error),
            code=error.code,
            param=error.param,
            retry_after_s=retry_after_s,
        )
    if isinstance(error, RequestError):
        return ErrorAnswer(status=error.status, message=fit_to_show(error), param=error.param, code=error.code)
    if isinstance(error, ReplicaDiedError):
        log.error("replica died with a request in work: %s", error)
        message = "the replica that held this request ended before the answer was complete; send the request again"
        return ErrorAnswer(status=503, message=message, code="replica_died", retry_after_s=1.0)
    if isinstance(error, MxnError):
        log.error("%s: %s", type(error).__name__, error)
        return ErrorAnswer(status=500, message=fit_to_show(error), code="internal_error")
    log.error("unexpected error while serving a request", exc_info=error)
    return ErrorAnswer(
        status=500, message="an internal error occurred; the server's log has the cause", code="internal_error"
    )


def fit_to_show(error: BaseException | str) -> str:
    """The text of an error without file paths, bounded in length."""
    text = _PATH.sub("<path>", str(error))
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[: _MAX_MESSAGE_CHARS - 3] + "..."


def brief(value: object, max_chars: int = 60) -> str:
    """A client's value as it may be quoted in an error: bounded, on one line."""
    if isinstance(value, str):
        value = value[: max_chars + 1]
    elif isinstance(value, list | dict) and len(value) > 20:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    elif isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    text = repr(value)
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


async def send_error(send: Any, answer: ErrorAnswer) -> None:
    """Sends `answer` as a whole ASGI response."""
    await send_json(send, answer.body(), status=answer.status, headers=answer.headers())


async def send_json(
    send: Any, body: bytes, *, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Sends JSON bytes as a whole ASGI response."""
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
