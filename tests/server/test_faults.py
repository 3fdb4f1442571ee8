"""Overload, dead and loading replicas, failing sequences: each answer is an error a client understands."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mxn.core.request import FinishReason, SequenceOutput, TokenLogprob
from mxn.fleet.deployment import Deployment
from mxn.fleet.spec import DeploymentSpec
from mxn.server.settings import ServerSettings

from .conftest import Running

Start = Callable[..., Running]
Make = Callable[..., DeploymentSpec]
COMPLETIONS = "/v1/completions"


def body(**fields: object) -> dict[str, Any]:
    return {"model": "fake-model", "prompt": "x" * 32, "max_tokens": 100, "ignore_eos": True, **fields}


def last_event(response: httpx.Response) -> dict[str, Any]:
    """The last event of a stream that did not end properly."""
    assert "[DONE]" not in response.text
    event: dict[str, Any] = json.loads(response.text.rstrip().rpartition("data: ")[2])
    return event


def test_a_full_queue_is_answered_with_429_and_the_accepted_finish(start_server: Start, fake_deployment: Make) -> None:
    server = start_server(fake_deployment(options={"step_ms": 5}, max_num_seqs=2, max_queue=2))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.post(COMPLETIONS, body(max_tokens=20)), range(12)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(200) >= 4
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert server.get_error(answer)["type"] == "rate_limit_error"
    assert server.post(COMPLETIONS, body(max_tokens=2)).status_code == 200


def test_n_choices_are_all_let_in_or_none(start_server: Start, fake_deployment: Make) -> None:
    server = start_server(fake_deployment(max_num_seqs=2, max_queue=2))
    baseline = server.num_free_blocks()
    assert server.post(COMPLETIONS, body(n=5)).status_code == 429
    server.wait_for(lambda: not any(k.replica and k.replica.num_streams for k in server.deployment().keepers))
    assert server.post(COMPLETIONS, body(n=4)).status_code == 200
    server.wait_for(lambda: server.num_free_blocks() == baseline)


def test_limits_of_the_gateway_name_their_settings(start_server: Start, fake_deployment: Make) -> None:
    limits = ServerSettings(max_requests=1, max_n=4, max_sequences=6)
    server = start_server(fake_deployment(options={"step_ms": 20}), settings=limits)
    assert "max_n" in server.get_error(server.post(COMPLETIONS, body(n=5)))["message"]
    many = server.get_error(server.post(COMPLETIONS, body(prompt=["a"] * 4, n=2)))
    assert "max_sequences" in many["message"]
    with server.http.stream("POST", COMPLETIONS, json=body(stream=True)) as running:
        chunks = running.iter_bytes()  # closed when nothing holds it
        next(chunks)
        refused = server.post(COMPLETIONS, body())
        assert refused.status_code == 429
        assert "max_requests" in server.get_error(refused)["message"]
        for path in ("/livez", "/readyz", "/metrics", "/v1/mxn/status"):
            assert server.http.get(path).status_code == 200


def text_of(events: list[str]) -> str:
    """The text of a completion's events."""
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def kill_holder(deployment: Deployment) -> None:
    """Kills the only replica that runs something."""
    [pid] = [k.replica.info.pid for k in deployment.keepers if k.replica and k.replica.info and k.replica.num_streams]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_stream_survives_its_replica_with_the_same_bytes_and_usage(
    start_server: Start, fake_deployment: Make, num_replicas: int
) -> None:
    server = start_server(fake_deployment(options={"step_ms": 5}, num_replicas=num_replicas))
    asked = body(stream=True, temperature=0, stream_options={"include_usage": True}, logprobs=1)
    server.post(COMPLETIONS, asked)  # from here on its first blocks are cached
    whole = server.post(COMPLETIONS, asked).text.split("\n\n")
    with server.http.stream("POST", COMPLETIONS, json=asked) as answer:
        lines = answer.iter_lines()
        events = [line for _, line in zip(range(20), lines, strict=False)]
        kill_holder(server.deployment())
        events += lines
    events = [line.removeprefix("data: ") for line in events if line]
    expected = [event.removeprefix("data: ") for event in whole if event]
    assert events[-1] == expected[-1] == "[DONE]"
    assert text_of(events) == text_of(expected)
    assert json.loads(events[-2])["usage"] == json.loads(expected[-2])["usage"]
    server.wait_for(lambda: server.deployment().num_restarts == 1 and server.deployment().is_ready)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {}])
def test_a_whole_answer_survives_its_replica(
    start_server: Start, fake_deployment: Make, sampling: dict[str, Any]
) -> None:
    server = start_server(fake_deployment(options={"step_ms": 5}, num_replicas=2))
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, body(**sampling))))
    asking.start()
    server.wait_for(lambda: server.deployment().stats.num_output_tokens > 3)
    kill_holder(server.deployment())
    asking.join(10)
    [answer] = answers
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 100
    if sampling:
        assert answer.json()["choices"] == server.post(COMPLETIONS, body(**sampling)).json()["choices"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_replica_that_dies_for_good_ends_its_requests_with_an_error(
    start_server: Start, fake_deployment: Make, stream: bool
) -> None:
    server = start_server(fake_deployment(options={"step_ms": 10}, restart_delays_s=()))
    deployment = server.deployment()
    if stream:
        with server.http.stream("POST", COMPLETIONS, json=body(stream=True)) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)  # from here on the answer has begun
            kill_holder(deployment)
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert json.loads(events[-1])["error"]["code"] == "replica_died"
    else:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, body())))
        asking.start()
        server.wait_for(lambda: deployment.stats.num_output_tokens > 3)
        kill_holder(deployment)
        asking.join(10)
        [refused] = answers
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert server.get_error(refused)["code"] == "replica_died"
    assert 'outcome="failed"} 1.0' in server.http.get("/metrics").text
    assert server.post(COMPLETIONS, body(max_tokens=3)).status_code == 503


def test_a_deployment_that_is_not_ready_is_answered_with_503_and_its_state(
    start_server: Start, fake_deployment: Make
) -> None:
    broken = fake_deployment("broken", options={"fail_load": "weights.safetensors is truncated"})
    server = start_server(broken)
    response = server.post(COMPLETIONS, body(model="broken"))
    assert response.status_code == 503
    assert response.headers["retry-after"]
    error = server.get_error(response)
    assert "failed" in error["message"]
    assert "truncated" in error["message"]
    ready = server.http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["status"] == "failed"
    assert "truncated" in ready.json()["deployments"][0]["reason"]


def test_one_ready_deployment_is_enough_and_each_can_be_asked_for(start_server: Start, fake_deployment: Make) -> None:
    broken = fake_deployment("broken", options={"fail_load": "no"})
    server = start_server(broken, fake_deployment())
    assert server.http.get("/readyz").status_code == 200
    assert server.http.get("/readyz?model=fake-model").status_code == 200
    assert server.http.get("/readyz?model=broken").status_code == 503
    assert server.http.get("/readyz?model=other").status_code == 404


def test_reasons_are_for_those_with_the_key(start_server: Start, fake_deployment: Make) -> None:
    broken = fake_deployment("broken", options={"fail_load": "secret reason"})
    server = start_server(broken, settings=ServerSettings(api_keys=("some-key",)))
    assert "secret reason" in server.http.get("/readyz").text
    bare = httpx.get(f"{server.url}/readyz")
    assert bare.status_code == 503
    assert "secret reason" not in bare.text


def test_a_hung_replica_is_ended_and_its_requests_told_when_all_hang(
    start_server: Start, fake_deployment: Make
) -> None:
    server = start_server(fake_deployment(options={"hang_after": 3}, stall_s=0.3, max_step_tokens=8))
    refused = server.post(COMPLETIONS, body())  # hangs within its prompt, twice
    assert refused.status_code == 503
    assert server.get_error(refused)["code"] == "replica_died"
    assert server.deployment().num_restarts >= 1
    assert server.http.get("/livez").status_code == 200
    server.wait_for(lambda: not server.gateway.num_active)
    server.wait_for(lambda: server.http.get("/readyz").status_code == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_a_sequence_that_fails_is_told_and_its_neighbours_go_on(
    start_server: Start, fake_deployment: Make, stream: bool
) -> None:
    server = start_server(fake_deployment(options={"nan_on": 200, "step_ms": 1}))
    with server.http.stream("POST", COMPLETIONS, json=body(prompt=[1], stream=True, temperature=0)) as neighbour:
        chunks = neighbour.iter_bytes()
        next(chunks)
        answer = server.post(COMPLETIONS, body(prompt=[1, 200], stream=stream))
        assert answer.status_code == 500
        assert "not a number" in server.get_error(answer)["message"]
        text = b"".join(chunks)
    assert text.endswith(b"data: [DONE]\n\n")


class Scripted:
    """A stream that yields what it is told to."""

    def __init__(self, *outputs: SequenceOutput | Exception) -> None:
        self._outputs = list(outputs)
        self.num_aborts = 0

    def __aiter__(self) -> Scripted:
        return self

    async def __anext__(self) -> SequenceOutput:
        if not self._outputs:
            raise StopAsyncIteration
        output = self._outputs.pop(0)
        if isinstance(output, Exception):
            raise output
        return output

    def abort(self) -> None:
        self.num_aborts += 1


def scripted(server: Running, monkeypatch: pytest.MonkeyPatch, *streams: Scripted) -> None:
    waiting = list(streams)
    monkeypatch.setattr(server.deployment(), "submit", lambda *a, **k: waiting.pop(0))


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ([SequenceOutput(seq_id=1, finish_reason=FinishReason.ERROR, error="chip at /dev/x broke")], 500),
        ([SequenceOutput(seq_id=1, finish_reason=FinishReason.ABORT)], 503),
        ([], 503),
        ([RuntimeError("bug")], 500),
    ],
)
def test_an_end_without_a_reason_is_an_error_in_the_status_or_in_the_stream(
    server: Running, monkeypatch: pytest.MonkeyPatch, ending: list[Any], status: int
) -> None:
    begun = SequenceOutput(seq_id=1, token_ids=[65])
    scripted(server, monkeypatch, Scripted(*ending), Scripted(begun, *ending), Scripted(begun, *ending))
    before = server.post(COMPLETIONS, body(stream=True))
    assert before.status_code == status
    server.get_error(before)
    whole = server.post(COMPLETIONS, body())
    assert whole.status_code == status
    server.get_error(whole)
    after = server.post(COMPLETIONS, body(stream=True))
    assert after.status_code == 200
    error = last_event(after)["error"]
    assert error["type"] == "server_error"
    assert "/dev/x" not in after.text


def test_one_failing_choice_ends_the_others(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Scripted(*[SequenceOutput(seq_id=1, token_ids=[65])] * 3)
    bad = Scripted(SequenceOutput(seq_id=2, finish_reason=FinishReason.ERROR, error="broke"))
    scripted(server, monkeypatch, good, bad)
    assert server.post(COMPLETIONS, body(n=2)).status_code == 500
    assert good.num_aborts == bad.num_aborts == 1


def test_echo_with_logprobs_scores_the_prompt(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = server.post("/tokenize", {"model": "fake-model", "prompt": "abX"}).json()["tokens"]
    scores = [None, *(TokenLogprob(token_id=i, logprob=-1.0, top=((ids[0], float("-inf")),)) for i in ids[1:2])]
    drawn = TokenLogprob(token_id=ids[2], logprob=-2.0, top=((ids[2], -2.0),))
    output = SequenceOutput(
        seq_id=1, token_ids=[ids[2]], logprobs=[drawn], prompt_logprobs=scores, finish_reason=FinishReason.LENGTH
    )
    scripted(server, monkeypatch, Scripted(output), Scripted(output))
    for max_tokens, text in ((1, "abX"), (0, "ab")):
        answer = server.post(COMPLETIONS, body(prompt="ab", echo=True, logprobs=1, max_tokens=max_tokens)).json()
        choice = answer["choices"][0]
        assert choice["text"] == text
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list(text)
        assert logprobs["token_logprobs"] == [None, -1.0, -2.0][: len(text)]
        assert logprobs["text_offset"] == [0, 1, 2][: len(text)]
        assert logprobs["top_logprobs"][:2] == [None, {"a": -9999.0, "b": -1.0}]


BAD_BODIES: list[tuple[bytes, int]] = [
    (b'{"model": "fake-model", "prompt": "\xff"}', 400),
    (b"[" * 1_000_000, 400),
    (b'{"model": "fake-model", "prompt": "x", "n": 1e308}', 400),
    (b'{"model": "fake-model", "prompt": "x", "temperature": NaN}', 400),
    (b'{"model": "nope", "prompt": "x"}', 404),
    (b'{"model": "fake-model", "prompt": "' + b"x" * 10_000_000 + b'"}', 413),
    (b'{"model": "fake-model", "prompt": "' + b"x" * 5_000_000 + b'"}', 400),
    (b'{"model": "fake-model", "prompt": "' + b"x" * 3000 + b'"}', 400),
    (b'{"model": "fake-model", "prompt": [' + b"1," * 1_000_000 + b"1]}", 400),
    (b'{"model": "fake-model", "prompt": [' + b'"x",' * 100_000 + b'"x"]}', 400),
    (b'{"model": "fake-model", "prompt": "x", "stop": [' + b'"x",' * 10_000 + b'"x"]}', 400),
    (b'{"model": "fake-model", "prompt": "x", "logit_bias": {"259": 1}}', 400),
    (b'{"model": "fake-model", "prompt": "x", "unknown": 1}', 400),
    (b'{"model": "fake-model", "prompt": ""}', 400),
]


def test_bad_input_is_refused_within_a_second_while_a_stream_goes_on(server: Running) -> None:
    baseline = server.num_free_blocks("hash-model")
    info = server.deployment().info
    with server.http.stream(
        "POST", COMPLETIONS, json=body(model="hash-model", max_tokens=2000, stream=True, temperature=0)
    ) as canary:
        chunks = canary.iter_bytes()
        next(chunks)
        for raw, status in BAD_BODIES:
            response = server.http.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
            assert response.status_code == status, raw[:80]
            assert response.elapsed.total_seconds() < 1, raw[:80]
            server.get_error(response)
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
    server.wait_for(lambda: server.num_free_blocks("hash-model") == baseline)
    assert server.deployment().info == info
