"""Time in a server's line, read from the metrics of servers that tell it."""

import pytest

from mxn.bench.queue import QueueTotals, ask_queue, read_queue

from .canned import canned_server

MXN = """
# TYPE mxn_engine_sequences_started_total counter
mxn_engine_sequences_started_total{model="m"} 4
mxn_engine_sequences_started_total{model="other"} 9
# TYPE mxn_engine_queue_seconds_total counter
mxn_engine_queue_seconds_total{model="m"} 2.0
mxn_engine_queue_seconds_total{model="other"} 90
"""
VLLM = """
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 3
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 4
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 2.0
"""


@pytest.mark.parametrize("text", [MXN, VLLM])
def test_totals_of_the_model_are_read(text: str) -> None:
    assert read_queue(text, "m") == QueueTotals(num_started=4, seconds=2)


@pytest.mark.parametrize("text", ["", "<html>", "llamacpp:requests_deferred 3\n", MXN.replace('"m"', '"n"')])
def test_a_server_that_does_not_tell_is_unknown_and_not_zero(text: str) -> None:
    assert read_queue(text, "m") is None


def test_mean_is_of_the_requests_between() -> None:
    before = QueueTotals(num_started=4, seconds=2)
    assert before.mean_s_until(QueueTotals(num_started=6, seconds=3)) == 0.5
    assert before.mean_s_until(before) is None


async def test_metrics_are_asked_for_beside_the_api() -> None:
    asked: list[bytes] = []

    def answer(request: bytes) -> list[bytes]:
        asked.append(request.split(b" ")[1])
        return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(MXN), MXN.encode())]

    async with canned_server(answer) as url:
        assert await ask_queue(url, "m", {}) == QueueTotals(num_started=4, seconds=2)
    assert asked == [b"/metrics"]
    assert await ask_queue(url, "m", {}) is None  # it is gone
