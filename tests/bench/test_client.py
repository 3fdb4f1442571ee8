import json
import re

import pytest

from mxn.bench.client import CompletionsClient

from .canned import STREAM_HEAD, canned_server, chunk, sse, stream


async def test_stream_is_counted_and_timed() -> None:
    seen: list[dict[str, object]] = []

    def answer(request: bytes) -> list[bytes]:
        seen.append(json.loads(request.split(b"\r\n\r\n", 1)[1]))
        return stream(7, prompt_tokens=11, cached=4)

    async with canned_server(answer) as url:
        client = CompletionsClient(url, model="m", api_key="k")
        result = await client.complete("hi", 7)
        client.close()
    assert result.error is None
    assert (result.num_output_tokens, result.num_prompt_tokens, result.num_cached_tokens) == (7, 11, 4)
    assert len(result.chunk_times_s) == 7
    assert result.start_s <= result.chunk_times_s[0] <= result.chunk_times_s[-1] <= result.end_s
    assert seen[0] == {
        "model": "m",
        "temperature": 0,
        "ignore_eos": True,
        "prompt": "hi",
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_chat_is_asked_as_messages_and_only_pieces_with_text_are_timed() -> None:
    seen: list[bytes] = []
    pieces = ['{"role":"assistant","content":""}', '{"content":"a"}', '{"reasoning_content":"b"}', "{}"]
    events = [b'data: {"choices":[{"index":0,"delta":%s}]}\n\n' % piece.encode() for piece in pieces]
    events += [b'data: {"choices":[],"usage":{"completion_tokens":2,"prompt_tokens":9}}\n\n', b"data: [DONE]\n\n"]

    def answer(request: bytes) -> list[bytes]:
        seen.append(request)
        return [STREAM_HEAD, *(chunk(event) for event in events), b"0\r\n\r\n"]

    async with canned_server(answer) as url:
        client = CompletionsClient(url, model="m")
        result = await client.complete([{"role": "user", "content": "hi"}], 2, keeps_text=True)
        client.close()
    assert seen[0].startswith(b"POST /v1/chat/completions ")
    assert json.loads(seen[0].split(b"\r\n\r\n", 1)[1])["messages"] == [{"role": "user", "content": "hi"}]
    assert result.error is None
    assert len(result.chunk_times_s) == 2
    assert (result.text, result.num_output_tokens, result.num_prompt_tokens) == ("ab", 2, 9)


async def test_events_may_be_cut_anywhere_between_chunks() -> None:
    body = b"".join(sse(3))
    for at in range(1, len(body)):
        pieces = [STREAM_HEAD, chunk(body[:at]), chunk(body[at:]), b"0\r\n\r\n"]
        async with canned_server(lambda _, pieces=pieces: pieces) as url:
            result = await CompletionsClient(url, model="m").complete("hi", 3)
        assert result.error is None
        assert len(result.chunk_times_s) == 3


async def test_answer_without_stream() -> None:
    body = b'{"choices":[{"text":"a"}],"usage":{"prompt_tokens":2,"completion_tokens":1}}'
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with canned_server(lambda _: [raw]) as url:
        result = await CompletionsClient(url, model="m").complete("hi", 1, stream=False)
    assert (result.error, result.num_output_tokens) == (None, 1)


def refusal(status: str, body: bytes) -> list[bytes]:
    return [b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refusal("404 Not Found", b'{"error":{"message":"no such model"}}'), "HTTP 404: no such model"),
        (refusal("502 Bad Gateway", b"<html>"), "HTTP 502: <html>"),
        ([STREAM_HEAD, chunk(b"".join(sse(2)[:2])), b"0\r\n\r\n"], r"without \[DONE\]"),
        ([STREAM_HEAD, chunk(sse(2)[0]), b""], "closed the connection"),
        ([STREAM_HEAD, chunk(b'data: {"error":{"message":"replica died"}}\n\n'), b"0\r\n\r\n"], "replica died"),
        ([STREAM_HEAD, chunk(b"data: {nonsense\n\n"), b"0\r\n\r\n"], "not a completion chunk"),
    ],
)
async def test_failure_is_told_in_the_result(answer: list[bytes], reason: str) -> None:
    async with canned_server(lambda _: answer) as url:
        result = await CompletionsClient(url, model="m").complete("hi", 2)
    assert result.error is not None
    assert re.search(reason, result.error)


async def test_closed_loop_keeps_the_asked_concurrency_and_the_order() -> None:
    running = peak = 0

    def answer(request: bytes) -> list[bytes]:
        nonlocal running, peak
        prompt = json.loads(request.split(b"\r\n\r\n", 1)[1])["prompt"]
        return stream(2, prompt_tokens=int(prompt))

    async with canned_server(answer) as url:
        client = CompletionsClient(url, model="m")
        original = client.complete

        async def counted(prompt: str, max_tokens: int, *, stream: bool = True):
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            result = await original(prompt, max_tokens, stream=stream)
            running -= 1
            return result

        client.complete = counted  # type: ignore[method-assign]
        results = await client.run([str(i) for i in range(1, 21)], 2, 4)
    assert [r.num_prompt_tokens for r in results] == list(range(1, 21))
    assert peak == 4
