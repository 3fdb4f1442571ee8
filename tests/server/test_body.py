"""Reading a body: every limit holds before the work it guards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import RequestError
from mxn.server.body import is_deeper_than, parse_object, read_json
from mxn.server.disconnect import ClientGoneError
from mxn.server.settings import ServerSettings

JSON = [(b"content-type", b"application/json; charset=utf-8")]


class Body:
    """An ASGI `receive` that hands out parts and counts how many were taken."""

    def __init__(self, parts: Iterator[bytes] | list[bytes]) -> None:
        self._parts = iter(parts)
        self.num_taken = 0

    async def __call__(self) -> dict[str, Any]:
        part = next(self._parts, None)
        if part is None:
            return {"type": "http.request", "body": b"", "more_body": False}
        self.num_taken += 1
        return {"type": "http.request", "body": part, "more_body": True}


async def refusal(headers: list[tuple[bytes, bytes]], body: Body, **limits: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await read_json(headers, body, ServerSettings(**limits))
    return caught.value


async def test_parts_are_put_together() -> None:
    assert await read_json(JSON, Body([b'{"a"', b":", b"1}"]), ServerSettings()) == {"a": 1}


async def test_a_body_over_the_limit_is_refused_while_it_is_read() -> None:
    body = Body(b"x" * 1000 for _ in range(1_000_000))
    error = await refusal(JSON, body, max_body_bytes=10_000)
    assert error.status == 413
    assert body.num_taken == 11
    assert all(text in str(error) for text in ("11000", "10000", "max_body_bytes"))


async def test_an_announced_size_is_refused_without_reading() -> None:
    body = Body([b"{}"])
    error = await refusal([*JSON, (b"content-length", b"10001")], body, max_body_bytes=10_000)
    assert error.status == 413
    assert body.num_taken == 0


async def test_a_lying_content_length_changes_nothing() -> None:
    error = await refusal([*JSON, (b"content-length", b"2")], Body([b"x" * 20_000]), max_body_bytes=10_000)
    assert error.status == 413


async def test_many_tiny_parts_take_linear_time() -> None:
    started_s = time.perf_counter()
    value = await read_json(JSON, Body([b"{", *([b" "] * 200_000), b"}"]), ServerSettings())
    assert value == {}
    assert time.perf_counter() - started_s < 2


@pytest.mark.parametrize("headers", [[], [(b"content-type", b"text/plain")], [(b"content-type", b"")]])
async def test_other_content_types_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert (await refusal(headers, Body([b"{}"]))).status == 415


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"zstd", b"x"])
async def test_compressed_bodies_are_refused(encoding: bytes) -> None:
    assert (await refusal([*JSON, (b"content-encoding", encoding)], Body([b"{}"]))).status == 415


async def test_a_client_that_leaves_while_sending_is_noticed() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        await read_json(JSON, receive, ServerSettings())


async def test_a_body_that_stops_coming_times_out() -> None:
    import asyncio

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    with pytest.raises(RequestError) as caught:
        await read_json(JSON, receive, ServerSettings(body_timeout_s=0.05))
    assert caught.value.status == 408


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"{}x",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00x"}',
        b'{"a": "\\ud800\\u0041"}',
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"{'a': 1}",
        b'{"a": .5}',
        b'{"a": 01}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[{" * 100_000,
    ],
)
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    started_s = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        parse_object(raw, max_depth=32)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    assert time.perf_counter() - started_s < 1


def test_duplicate_keys_and_control_characters_are_fine() -> None:
    assert parse_object(b'{"a": 1, "a": 2, "b": "\\u0000"}', 32) == {"a": 2, "b": "\0"}


def depth_of(raw: bytes) -> int:
    """Depth of brackets outside strings, character by character."""
    depth = deepest = 0
    is_text = is_escaped = False
    for char in raw.decode("latin-1"):
        if is_text:
            is_text = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            is_text = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth = depth - 1
    return deepest


VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='ab[]{}"\\'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a[]{}"\\'), inner, max_size=4),
    max_leaves=40,
)


@given(value=VALUES, limit=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_depth_is_judged_as_by_counting(value: object, limit: int) -> None:
    import json

    raw = json.dumps(value).encode()
    assert is_deeper_than(raw, limit) == (depth_of(raw) > limit)


@pytest.mark.parametrize(
    "raw",
    [
        b'"' + b'\\"' * 1_000_000,
        b'"' + b'\\"' * 1_000_000 + b"\\",
        b"[" * 40 + b'"' * 1_000_001,
        b"[]" * 1_000_000,
        b'[["' * 500_000,
    ],
)
def test_hostile_brackets_and_quotes_take_linear_time(raw: bytes) -> None:
    started_s = time.perf_counter()
    is_deeper_than(b"[" * 33 + raw, 32)
    assert time.perf_counter() - started_s < 1
