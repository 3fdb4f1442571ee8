"""POST /v1/embeddings, over a real replica process of the fake backend."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from mxn.backends.fake import FAKE_DIMENSIONS, fake_vector
from mxn.core.model import Model
from mxn.fleet.spec import DeploymentSpec

from .conftest import Running, running_server, spec_of

CONTEXT = 32
NAN, BROKEN = 50, 51


def embedding_spec(model: Model, name: str = "fake-embedder", **options: object) -> DeploymentSpec:
    embedder = replace(model, name=name, spec=replace(model.spec, task="embed", max_context=CONTEXT))
    return spec_of(embedder, name, **options)


@pytest.fixture(scope="module")
def embedding_server(fake_model: Model) -> Iterator[Running]:
    broken = embedding_spec(fake_model, "broken", nan_on=NAN, raise_on=BROKEN)
    with running_server(embedding_spec(fake_model), broken, spec_of(fake_model, "fake-model")) as running:
        yield running


def vectors(answer: httpx.Response) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [(one["object"], one["index"]) for one in data] == [("embedding", i) for i in range(len(data))]
    return [one["embedding"] for one in data]


def ids_of(server: Running, text: str) -> list[int]:
    return server.deployment("fake-embedder").tokenizer.encode(text, add_special_tokens=True)


def expected(server: Running, *texts: str) -> list[list[float]]:
    return [np.frombuffer(fake_vector(ids_of(server, text)), dtype="<f4").tolist() for text in texts]


def test_the_official_client_gets_the_models_vectors(embedding_server: Running) -> None:
    with openai.OpenAI(base_url=f"{embedding_server.url}/v1", api_key="unused", max_retries=0) as client:
        for texts in ("one text", ["a", "bb", "a"]):
            answer = client.embeddings.create(model="fake-embedder", input=texts)
            want = expected(embedding_server, *([texts] if isinstance(texts, str) else texts))
            assert [one.embedding for one in answer.data] == want
            num_tokens = len("".join(texts))
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
        assert "fake-embedder" in [model.id for model in client.models.list()]


def test_token_ids_are_taken_as_they_are(embedding_server: Running) -> None:
    one = embedding_server.post("/v1/embeddings", {"model": "fake-embedder", "input": [5, 6]})
    two = embedding_server.post("/v1/embeddings", {"model": "fake-embedder", "input": [[7], [5, 6]]})
    assert vectors(one)[0] == vectors(two)[1] == np.frombuffer(fake_vector([5, 6]), dtype="<f4").tolist()
    assert two.json()["usage"]["prompt_tokens"] == 3


def test_base64_holds_the_same_numbers(embedding_server: Running) -> None:
    body = {"model": "fake-embedder", "input": "a", "encoding_format": "base64", "dimensions": FAKE_DIMENSIONS}
    [text] = vectors(embedding_server.post("/v1/embeddings", body))
    assert isinstance(text, str)
    assert np.frombuffer(base64.b64decode(text), dtype="<f4").tolist() == expected(embedding_server, "a")[0]


def test_many_more_texts_than_the_line_holds_are_answered_in_order(embedding_server: Running) -> None:
    texts = [f"t{i}" for i in range(2048)]
    answer = vectors(embedding_server.post("/v1/embeddings", {"model": "fake-embedder", "input": texts}))
    assert answer == expected(embedding_server, *texts)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": "x" * (CONTEXT + 1)}, "input", f"has {CONTEXT + 1} tokens; fake-embedder takes at most {CONTEXT}"),
        ({"input": ["a", "x" * 10_000]}, "input[1]", f"takes at most {CONTEXT} tokens"),
        ({"input": ["a", ""]}, "input", "empty text"),
        ({"input": ""}, "input", "empty text"),
        ({"input": []}, "input", "input must be"),
        ({"input": [[]]}, "input", "input must be"),
        ({"input": [1, "a"]}, "input", "input must be"),
        ({"input": [[1], [10**6]]}, "input[1]", "token id 1000000"),
        ({"input": ["a"] * 2049}, "input", "the limit is 2048"),
        ({"dimensions": 4}, "dimensions", "have 8 numbers"),
        ({"encoding_format": "int8"}, "encoding_format", "float"),
        ({"truncate": True}, "truncate", "unknown field"),
        ({"model": "fake-model"}, "model", "generates text; it is served at /v1/chat/completions"),
    ],
)
def test_bad_input_is_named(embedding_server: Running, fields: dict[str, Any], param: str, words: str) -> None:
    answer = embedding_server.post("/v1/embeddings", {"model": "fake-embedder", "input": "a"} | fields)
    error = embedding_server.get_error(answer)
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_the_longest_text_fits(embedding_server: Running) -> None:
    answer = embedding_server.post("/v1/embeddings", {"model": "fake-embedder", "input": "x" * CONTEXT})
    assert vectors(answer) == expected(embedding_server, "x" * CONTEXT)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_model_that_embeds_generates_nothing(embedding_server: Running, path: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    answer = embedding_server.post(path, {"model": "fake-embedder"} | prompt)
    error = embedding_server.get_error(answer)
    assert (answer.status_code, error["param"]) == (400, "model")
    assert "makes vectors; it is served at /v1/embeddings" in error["message"]


@pytest.mark.parametrize("bad", [NAN, BROKEN])
def test_a_text_without_a_vector_fails_its_request_only(embedding_server: Running, bad: int) -> None:
    answers: dict[str, httpx.Response] = {}

    def post(name: str, texts: list[list[int]]) -> None:
        answers[name] = embedding_server.post("/v1/embeddings", {"model": "broken", "input": texts})

    threads = [
        threading.Thread(target=post, args=("bad", [[1], [bad]])),
        threading.Thread(target=post, args=("good", [[1], [2], [3]])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers["bad"].status_code == 500
    assert embedding_server.get_error(answers["bad"])["message"].startswith("input 1: ")
    assert len(vectors(answers["good"])) == 3


def test_energy_and_metrics_count_texts(embedding_server: Running) -> None:
    body = {"model": "fake-embedder", "input": ["a", "b"], "include_energy": True}
    usage = embedding_server.post("/v1/embeddings", body).json()["usage"]
    assert "simulated" in usage["mxn"]["source"]
    text = embedding_server.http.get("/metrics").text
    assert 'mxn_requests_total{model="fake-embedder",outcome="stop"}' in text
    assert 'mxn_http_requests_total{method="POST",route="/v1/embeddings",status="200"}' in text
    assert embedding_server.deployment("fake-embedder").stats.num_finished >= 2


def test_a_full_line_is_refused_and_a_request_that_has_begun_goes_on(
    fake_model: Model, start_server: Callable[..., Running]
) -> None:
    spec = embedding_spec(fake_model, step_ms=200)
    [placement] = spec.placements
    one_at_a_time = replace(placement, settings=replace(placement.settings, max_num_seqs=1))
    spec = replace(spec, max_queue=1, placements=[one_at_a_time])
    server = start_server(spec)
    bodies = [{"model": "fake-embedder", "input": [[i]] * 4} for i in range(4)]
    codes: list[int] = []

    def post(body: object) -> None:
        codes.append(server.post("/v1/embeddings", body).status_code)

    threads = [threading.Thread(target=post, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(set(codes)) == [200, 429]


def test_a_client_that_leaves_takes_its_texts_out_of_the_line(
    fake_model: Model, start_server: Callable[..., Running]
) -> None:
    server = start_server(embedding_spec(fake_model, step_ms=300))
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/embeddings", json={"model": "fake-embedder", "input": [[1] * 30] * 200}, timeout=0.5)
    server.wait_for(lambda: server.deployment("fake-embedder").stats.num_aborted > 0)
    server.wait_for(lambda: server.deployment("fake-embedder").stats.num_waiting == 0)
    assert server.deployment("fake-embedder").stats.num_finished < 200
