"""The official client library understands what the server says."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from .conftest import SCRIPT, Running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_chat_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake-model", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == SCRIPT
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake-model",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SCRIPT
    assert chunks[-1].usage is not None


def test_completions_and_models(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake-model", prompt=["a", "b"], max_tokens=4, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["ahell", "bhell"]
    streamed = client.completions.create(model="fake-model", prompt="a", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == SCRIPT
    assert [model.id for model in client.models.list()] == ["fake-model", "hash-model"]
    assert client.models.retrieve("fake-model").owned_by == "mxn"


def test_errors_become_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="fake-model", prompt="a", temperature=3)
    assert wrong.value.param == "temperature"


async def test_async_client(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="fake-model", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == SCRIPT
