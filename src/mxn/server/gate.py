"""The first thing every request meets: key, host, drain and concurrency checks, ids, and the last net for errors.

Everything but the two probes is closed by default: a route that somebody adds needs the key without asking for it.
Decisions look at `scope["path"]` and raw headers only, never at a URL rebuilt from the Host header.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from mxn.errors import OverloadedError, RequestError, UnavailableError
from mxn.server.disconnect import ClientGoneError
from mxn.server.errors import answer_for, send_error
from mxn.server.gateway import MODEL, PRINCIPAL, Gateway
from mxn.server.request_id import HEADER, begin_request

log = logging.getLogger("mxn.server.access")

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""Routes that answer without a key."""

_WATCHING_PATHS = OPEN_PATHS | {"/metrics", "/v1/mxn/status"}
"""Routes that answer while draining and when the gateway is full."""

_LOOPBACK_HOST = re.compile(rb"(localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?")
_CLIENT_GONE = 499


class Gate:
    """ASGI middleware around all routes.

    templates: endpoint -> path of its route, the names under which requests are counted.
    """

    def __init__(self, app: Any, gateway: Gateway, templates: Mapping[Any, str]) -> None:
        self._app = app
        self._gateway = gateway
        self._templates = templates
        self._digests = [hashlib.sha256(key.encode()).digest() for key in gateway.settings.api_keys]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = begin_request(scope["headers"]).encode()
        status = 0

        async def tagged_send(message: dict[str, Any]) -> None:
            nonlocal status
            if not status and message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        started_s = time.perf_counter()
        self._gateway.enter()
        try:
            self._check(scope)
            await self._app(scope, receive, tagged_send)
        except ClientGoneError:
            status = _CLIENT_GONE
        except Exception as error:
            if not status:
                await send_error(tagged_send, answer_for(error))
            else:
                log.error("the request failed after its answer had begun", exc_info=error)
        finally:
            self._gateway.leave()
            self._note(scope, status, time.perf_counter() - started_s)

    def _check(self, scope: dict[str, Any]) -> None:
        path = scope["path"]
        has_key = self._has_key(scope)
        if not has_key and path not in OPEN_PATHS:
            raise RequestError(
                "this server needs an API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
            )
        if not self._digests:
            _check_is_local(scope["headers"])
        scope["mxn.is_trusted"] = has_key
        if path in _WATCHING_PATHS:
            return
        gateway = self._gateway
        if gateway.is_draining:
            raise UnavailableError("the server is shutting down and takes no new requests", retry_after_s=5.0)
        if gateway.num_active > gateway.settings.max_requests:
            raise OverloadedError(
                f"the gateway has {gateway.settings.max_requests} requests in work, its limit "
                "(server setting max_requests); retry later",
                retry_after_s=1.0,
            )

    def _has_key(self, scope: dict[str, Any]) -> bool:
        """Whether the request carries a valid key, or none is needed. Takes the same time for every wrong key."""
        if not self._digests:
            return True
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(token.strip(b" ")).digest()
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(digest, known)
        scope[PRINCIPAL] = digest
        return is_known and kind.lower() == b"bearer"

    def _note(self, scope: dict[str, Any], status: int, seconds: float) -> None:
        """Counts the request and writes its line to the access log."""
        template = self._templates.get(scope.get("endpoint"), "unknown")
        method = scope["method"]
        self._gateway.metrics.count_http(template, method, status)
        if log.isEnabledFor(logging.INFO):
            duration_ms = round(1000 * seconds, 1)
            fields = {"method": method, "route": template, "status": status, "duration_ms": duration_ms}
            if model := scope.get(MODEL):
                fields["model"] = model
            log.info("%s %s %d %.1f ms", method, template, status, duration_ms, extra={"fields": fields})


def _check_is_local(headers: list[tuple[bytes, bytes]]) -> None:
    """Without a key only this machine's own programs may call: a web page that reaches us by DNS rebinding may not."""
    for name, value in headers:
        if name == b"host" and not _LOOPBACK_HOST.fullmatch(value):
            raise RequestError(
                "without an API key the Host header must be localhost or 127.0.0.1", code="host_not_allowed", status=403
            )
        if name == b"origin" and not _LOOPBACK_HOST.fullmatch(value.partition(b"://")[2]):
            raise RequestError(
                "without an API key, web pages of other origins are not served", code="origin_not_allowed", status=403
            )
