"""The id of the request that the running task works for: in its answer's head, in its error, in each of its log lines.

A client may bring its own in X-Request-Id. Ids are shown and logged, never looked up, so two equal ones do no harm.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

HEADER = b"x-request-id"

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_current: ContextVar[str] = ContextVar("mxn_request_id", default="")


def current_request_id() -> str:
    """Empty outside a request. Tasks that a request's task starts have its id too."""
    return _current.get()


def begin_request(headers: list[tuple[bytes, bytes]]) -> str:
    """The id of a request that begins in this task: the client's own if it is harmless, else a new one."""
    for name, value in headers:
        if name == HEADER:
            request_id = value.decode() if _CLIENT_ID.fullmatch(value) else _new_id()
            break
    else:
        request_id = _new_id()
    _current.set(request_id)
    return request_id


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"
