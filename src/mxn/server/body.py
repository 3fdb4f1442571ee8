"""Reads a JSON body with every limit checked before the work it guards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from mxn.errors import RequestError
from mxn.server.disconnect import ClientGoneError
from mxn.server.settings import ServerSettings

# Possessive throughout, and unterminated strings match to the end, so that no input takes more than linear time.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_json(headers: Iterable[tuple[bytes, bytes]], receive: Any, settings: ServerSettings) -> dict[str, Any]:
    """The request's JSON object.

    Raises: RequestError for any other body; ClientGoneError when the client leaves while sending it.
    """
    _check_headers(headers, settings)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            raw = await _read(receive, settings)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {settings.body_timeout_s:g} s", status=408, code="request_timeout"
        ) from None
    return parse_object(raw, settings.max_json_depth)


def parse_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Decodes one JSON object: UTF-8 only, no NaN or Infinity, at most `max_depth` brackets deep."""
    if not raw:
        raise RequestError("the body is empty; a JSON object is expected", code="invalid_json")
    if is_deeper_than(raw, max_depth):
        raise RequestError(f"the JSON is nested more than {max_depth} levels deep", code="invalid_json")
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from None
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got a {type(value).__name__}", code="invalid_json")
    return value


def is_deeper_than(raw: bytes, max_depth: int) -> bool:
    """Whether brackets outside strings nest deeper than `max_depth`, in linear time and without recursion."""
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return False
    brackets = _STRINGS.sub(b"", raw).translate(_TO_BRACKETS, _NOT_BRACKETS)
    for _ in range(max_depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return b"[" in brackets


def _check_headers(headers: Iterable[tuple[bytes, bytes]], settings: ServerSettings) -> None:
    content_type = b""
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise RequestError("compressed bodies are not accepted; send the JSON as it is", status=415)
        elif name == b"content-length" and value.isdigit() and len(value) < 20:
            _check_size(int(value), settings)
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise RequestError(
            f"Content-Type must be application/json, got {media_type.decode('ascii', 'replace')[:60] or 'none'}",
            status=415,
        )


def _check_size(num_bytes: int, settings: ServerSettings) -> None:
    if num_bytes > settings.max_body_bytes:
        raise RequestError(
            f"the body is too large: at least {num_bytes} bytes, the limit is {settings.max_body_bytes} "
            "(server setting max_body_bytes)",
            status=413,
            code="request_too_large",
        )


async def _read(receive: Any, settings: ServerSettings) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        if part:
            num_bytes += len(part)
            _check_size(num_bytes, settings)
            parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
