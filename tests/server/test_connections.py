"""Clients that leave, stall, trickle or shout, on real sockets."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mxn.core.model import Model
from mxn.fleet.spec import DeploymentSpec
from mxn.fleet.stream import SequenceStream
from mxn.server.settings import ServerSettings

from .conftest import Running, running_server, spec_of

Start = Callable[..., Running]
Make = Callable[..., DeploymentSpec]


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def endless(**fields: object) -> dict[str, Any]:
    return {"model": "fake-model", "prompt": "x" * 64, "max_tokens": 1900, "ignore_eos": True, **fields}


def read_until(connection: socket.socket, text: bytes, seconds: float = 10) -> bytes:
    connection.settimeout(seconds)
    found = b""
    while text not in found:
        part = connection.recv(65536)
        if not part:
            break
        found += part
    return found


def is_closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.fixture(scope="module")
def slow(fake_model: Model) -> Iterator[Running]:
    """A model with 10 ms steps."""
    with running_server(spec_of(fake_model, "fake-model", step_ms=10)) as running:
        yield running


@pytest.fixture
def canary(slow: Running) -> Iterator[Callable[[], bool]]:
    """A stream on the same replica that runs all the time; call it at the end to see that it never stopped."""
    times: list[float] = []
    stop = threading.Event()

    def run() -> None:
        with slow.http.stream("POST", "/v1/completions", json=endless(prompt="canary", stream=True)) as response:
            for _ in response.iter_bytes():
                times.append(time.monotonic())
                if stop.is_set():
                    return

    thread = threading.Thread(target=run)
    thread.start()
    slow.wait_for(lambda: len(times) > 2)

    def is_well() -> bool:
        slow.wait_for(lambda: time.monotonic() - times[-1] < 0.2, 2)
        return max(b - a for a, b in itertools.pairwise(times)) < 1.0

    yield is_well
    stop.set()
    thread.join(10)
    slow.wait_for(lambda: not slow.deployment().stats.num_running)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_blocks_within_two_steps(
    slow: Running, canary: Callable[[], bool], monkeypatch: pytest.MonkeyPatch, stream: bool, n: int
) -> None:
    deployment = slow.deployment()
    baseline, aborted = deployment.stats.num_running, deployment.stats.num_aborted
    noticed_at: list[int] = []
    abort = SequenceStream.abort

    def noted_abort(stream: SequenceStream) -> None:
        noticed_at.append(deployment.stats.num_steps)
        abort(stream)

    monkeypatch.setattr(SequenceStream, "abort", noted_abort)
    with socket.create_connection(slow.address) as connection:
        connection.sendall(request_bytes(endless(stream=stream, n=n)))
        slow.wait_for(lambda: deployment.stats.num_running == baseline + n)
    slow.wait_for(lambda: deployment.stats.num_running == baseline, 2)
    freed_at = deployment.stats.num_steps
    assert deployment.stats.num_aborted == aborted + n
    assert freed_at - noticed_at[0] <= 3  # two, and one more that may pass while this test polls
    assert canary()
    metric = 'mxn_requests_total{model="fake-model",outcome="client_gone"}'
    slow.wait_for(lambda: metric in slow.http.get("/metrics").text)


def test_a_finished_request_is_not_aborted(slow: Running) -> None:
    aborted = slow.deployment().stats.num_aborted
    for stream in (True, False):
        slow.post("/v1/completions", {"model": "fake-model", "prompt": "x", "max_tokens": 3, "stream": stream})
    assert slow.deployment().stats.num_aborted == aborted


def test_gaps_between_tokens_are_observed(slow: Running) -> None:
    name = "mxn_inter_token_latency_seconds"
    slow.post("/v1/completions", {"model": "fake-model", "prompt": "x", "max_tokens": 5, "ignore_eos": True})
    samples = dict(line.rsplit(" ", 1) for line in slow.http.get("/metrics").text.splitlines() if line.startswith(name))
    short = float(samples[f'{name}_bucket{{le="0.0025",model="fake-model"}}'])
    count = float(samples[f'{name}_count{{model="fake-model"}}'])
    assert count >= 4
    assert short < count / 2  # a step takes 10 ms; a busy machine may hand on two at once


def test_free_blocks_return_after_many_disconnects(slow: Running) -> None:
    deployment = slow.deployment()
    baseline = deployment.stats.num_free_blocks
    for i in range(60):
        with socket.create_connection(slow.address) as connection:
            connection.sendall(request_bytes(endless(stream=i % 2 == 0)))
            time.sleep(0.002 * (i % 8))
    slow.wait_for(lambda: deployment.stats.num_running == deployment.stats.num_waiting == 0)
    # the gauge moves with steps: one more request makes the engine report
    slow.post("/v1/completions", {"model": "fake-model", "prompt": "x", "max_tokens": 1})
    slow.wait_for(lambda: deployment.stats.num_free_blocks == baseline)
    assert slow.gateway.num_active == 0


def test_a_slow_reader_is_cut_off_and_hurts_nobody(start_server: Start, fake_deployment: Make) -> None:
    limits = ServerSettings(send_timeout_s=0.5, socket_buffer_bytes=4096)
    server = start_server(fake_deployment(options={"step_ms": 1}), settings=limits)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(server.address)
    with connection:
        # Logprobs make the answer about 4 MB, far beyond what the socket buffers hold.
        connection.sendall(request_bytes(endless(stream=True, logprobs=20)))
        server.wait_for(lambda: server.gateway.num_active == 1)
        while server.gateway.num_active:
            connection.recv(1)
            body = {"model": "fake-model", "prompt": "y", "max_tokens": 2}
            assert server.post("/v1/completions", body).status_code == 200
            time.sleep(0.05)
        server.wait_for(lambda: not server.deployment().stats.num_running, 3)
    text = server.http.get("/metrics").text
    assert 'mxn_requests_total{model="fake-model",outcome="client_gone"} 1.0' in text


@pytest.fixture(scope="module")
def guarded(fake_model: Model) -> Iterator[Running]:
    limits = ServerSettings(
        head_timeout_s=0.4, body_timeout_s=0.4, max_body_bytes=100_000, max_connections=8, max_head_bytes=16_384
    )
    with running_server(spec_of(fake_model, "fake-model"), settings=limits) as running:
        yield running


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: "])
def test_a_head_that_does_not_end_closes_the_connection(guarded: Running, sent: bytes) -> None:
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(sent)
        assert is_closed_within(connection, 2)


def test_a_head_that_trickles_closes_the_connection(guarded: Running) -> None:
    started_s = time.monotonic()
    with socket.create_connection(guarded.address) as connection:
        try:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
            while time.monotonic() - started_s < 3:
                connection.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - started_s < 2


def test_a_second_head_on_the_same_connection_has_a_limit_too(guarded: Running) -> None:
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"alive" in read_until(connection, b"alive")
        connection.sendall(b"GET /livez")
        assert is_closed_within(connection, 2)


def test_a_body_that_does_not_come_is_answered_with_408(guarded: Running) -> None:
    with socket.create_connection(guarded.address) as connection:
        head = request_bytes({"a": 1}).partition(b"\r\n\r\n")[0]
        connection.sendall(head + b"\r\n\r\n")
        assert b"408" in read_until(connection, b"}}")


@pytest.mark.parametrize(
    "head",
    [
        b"X-A: " + b"x" * 200_000,
        b"\r\n".join(b"X-%d: y" % i for i in range(20_000)),
        b"X-A: b\x00c",
        b"Content-Length: -5",
        b"Content-Length: 1\r\nContent-Length: 2",
        b"Transfer-Encoding: nonsense",
    ],
)
def test_a_wrong_or_huge_head_is_refused_in_openais_shape(guarded: Running, head: bytes) -> None:
    with socket.create_connection(guarded.address) as connection:
        try:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
            answer = read_until(connection, b"}}", 3)
        except ConnectionError:
            return  # closed while the rest was still being sent
    assert answer.split()[1] in (b"400", b"415", b"501"), answer[:100]
    assert b'{"error":{"message":' in answer


def test_a_body_over_the_limit_is_answered_with_413_and_the_connection_lives_on(guarded: Running) -> None:
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(request_bytes({"model": "fake-model", "prompt": "x" * 150_000}))
        answer = read_until(connection, b"}}")
        assert b" 413 " in answer
        assert b"max_body_bytes" in answer
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"alive" in read_until(connection, b"alive")


def test_a_chunked_body_over_the_limit_is_cut_while_it_comes(guarded: Running) -> None:
    with socket.create_connection(guarded.address) as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall((b"1000\r\n" + b"x" * 4096 + b"\r\n") * 30)
        assert b" 413 " in read_until(connection, b"}}")


def test_connections_beyond_the_limit_are_refused(guarded: Running) -> None:
    time.sleep(0.5)
    held = [socket.create_connection(guarded.address) for _ in range(12)]
    try:
        answers = []
        for connection in held:
            connection.settimeout(0.05)
            try:
                answers.append(connection.recv(1000))
            except TimeoutError:
                answers.append(b"")
        assert any(b"max_connections" in answer for answer in answers)
    finally:
        for connection in held:
            connection.close()
    guarded.wait_for(lambda: guarded.http.get("/livez").status_code == 200)


def test_pipelined_requests_are_answered_in_order(guarded: Running) -> None:
    with socket.create_connection(guarded.address) as connection:
        one = request_bytes({"model": "fake-model", "prompt": "a"}, "/tokenize")
        connection.sendall(one + b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = read_until(connection, b"alive")
    assert answer.index(b'"count":1') < answer.index(b"alive")
