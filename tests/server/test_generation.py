"""What the two text APIs answer, byte for byte where it matters."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from .conftest import SCRIPT, Running

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(**fields: object) -> dict[str, object]:
    return {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], **fields}


def completion(**fields: object) -> dict[str, object]:
    return {"model": "fake-model", "prompt": "hi", "max_tokens": 100, **fields}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream that ended properly."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_chat_answer_has_openais_shape(server: Running) -> None:
    answer = server.post(CHAT, chat()).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "fake-model"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": SCRIPT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    num_prompt = 3 + len(prompt) - len("<|im_start|><|im_end|><|im_start|>")
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == len(SCRIPT) + 1
    assert answer["usage"]["total_tokens"] == num_prompt + len(SCRIPT) + 1


def test_completion_answer_has_openais_shape(server: Running) -> None:
    answer = server.post(COMPLETIONS, completion(max_tokens=5)).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}]


def test_chat_stream_begins_with_the_role_and_ends_with_one_finish_reason_per_choice(server: Running) -> None:
    events = events_of(server.post(CHAT, chat(stream=True, n=3)))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    for index in range(3):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == SCRIPT
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == "stop"
    assert all("usage" not in event for event in events)


def test_usage_comes_last_without_choices_when_asked_for(server: Running) -> None:
    events = events_of(server.post(CHAT, chat(stream=True, stream_options={"include_usage": True})))
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(SCRIPT) + 1
    assert "cached_tokens" in events[-1]["usage"]["prompt_tokens_details"]


def test_streamed_and_whole_answers_are_the_same_text(server: Running) -> None:
    body = completion(model="hash-model", seed=11, temperature=1.3, max_tokens=60, ignore_eos=True)
    whole = server.post(COMPLETIONS, body).json()["choices"][0]["text"]
    events = events_of(server.post(COMPLETIONS, {**body, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_prefix_hits_are_reported_as_cached_tokens(server: Running) -> None:
    prompt = list(range(200))
    body = {"model": "hash-model", "prompt": prompt, "max_tokens": 1}
    server.post(COMPLETIONS, body)
    usage = server.post(COMPLETIONS, body).json()["usage"]
    assert usage["prompt_tokens"] == 200
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 176


def test_the_same_seed_gives_the_same_text_and_choices_differ(server: Running) -> None:
    body = completion(model="hash-model", seed=5, n=3, max_tokens=20, ignore_eos=True)
    first, second = ([choice["text"] for choice in server.post(COMPLETIONS, body).json()["choices"]] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3
    alone = server.post(COMPLETIONS, {**body, "n": 1}).json()["choices"][0]["text"]
    assert alone == first[0]


def test_several_prompts_are_answered_in_order(server: Running) -> None:
    body = {"model": "hash-model", "prompt": ["one", "two", "three"], "n": 2, "max_tokens": 8, "temperature": 0}
    choices = server.post(COMPLETIONS, body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    texts = [choice["text"] for choice in choices]
    assert texts[0] == texts[1] != texts[2]
    single = server.post(COMPLETIONS, {**body, "prompt": "two", "n": 1}).json()["choices"][0]["text"]
    assert single == texts[2]


def test_token_ids_and_text_are_the_same_prompt(server: Running) -> None:
    ids = server.post("/tokenize", {"model": "hash-model", "prompt": "abc"}).json()["tokens"]
    body = {"model": "hash-model", "max_tokens": 8, "temperature": 0}
    answers = [server.post(COMPLETIONS, {**body, "prompt": p}).json() for p in ("abc", ids, [ids])]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "wor"}, "hello ", "stop"),
        ({"stop": ["zzz", "lo"]}, "hel", "stop"),
        ({"stop": "wor", "include_stop_str_in_output": True}, "hello wor", "stop"),
        ({"stop": "zzz"}, "hello world", "stop"),
        ({"stop": "world!"}, "hello world", "stop"),
        ({"ignore_eos": True, "max_tokens": 17}, "hello worldhello", "length"),
        ({"ignore_eos": True, "max_tokens": 17, "skip_special_tokens": False}, "hello world<|im_end|>hello", "length"),
        ({"skip_special_tokens": False}, "hello world", "stop"),
        ({"max_tokens": 3}, "hel", "length"),
    ],
)
def test_where_a_text_ends(server: Running, stream: bool, fields: dict[str, object], text: str, reason: str) -> None:
    response = server.post(COMPLETIONS, completion(stream=stream, **fields))
    choices = [event["choices"][0] for event in events_of(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == reason


def test_stop_token_ids_end_the_text_before_their_own(server: Running) -> None:
    ids = server.post("/tokenize", {"model": "fake-model", "prompt": "w"}).json()["tokens"]
    answer = server.post(COMPLETIONS, completion(stop_token_ids=ids)).json()
    assert answer["choices"][0]["text"] == "hello "
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_chat_logprobs_have_openais_shape(server: Running) -> None:
    choice = server.post(CHAT, chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list(SCRIPT)
    assert content[0]["bytes"] == [ord("h")]
    assert content[0]["logprob"] == -0.5
    assert len(content[0]["top_logprobs"]) == 2
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}
    bare = server.post(CHAT, chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []


def test_completion_logprobs_have_openais_shape(server: Running) -> None:
    logprobs = server.post(COMPLETIONS, completion(logprobs=2, max_tokens=4)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("hell")
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 4


def test_streamed_logprobs_cover_every_token_of_the_text_once(server: Running) -> None:
    events = events_of(server.post(CHAT, chat(logprobs=True, stream=True, stop=["worm", "d!"])))
    tokens = [
        entry["token"]
        for event in events
        if (logprobs := event["choices"][0]["logprobs"]) is not None
        for entry in logprobs["content"]
    ]
    assert tokens == list(SCRIPT)


def test_logprobs_end_with_the_text_at_a_stop_string(server: Running) -> None:
    logprobs = server.post(COMPLETIONS, completion(logprobs=0, stop="wor")).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "hello "


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_each_choice(server: Running, stream: bool) -> None:
    response = server.post(COMPLETIONS, completion(prompt=["hi ", "ho "], n=2, echo=True, stream=stream))
    choices = [event["choices"][0] for event in events_of(response)] if stream else response.json()["choices"]
    texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in range(4)]
    assert texts == ["hi hello world"] * 2 + ["ho hello world"] * 2


def test_echo_decodes_a_prompt_of_token_ids(server: Running) -> None:
    ids = server.post("/tokenize", {"model": "fake-model", "prompt": "abc"}).json()["tokens"]
    answer = server.post(COMPLETIONS, completion(prompt=ids, echo=True, max_tokens=2)).json()
    assert answer["choices"][0]["text"] == "abche"


def test_echo_without_tokens_gives_the_prompt_alone(server: Running) -> None:
    answer = server.post(COMPLETIONS, completion(prompt="abc", echo=True, max_tokens=0)).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_text_parts_are_joined_and_developer_means_system(server: Running) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompts = [
        [{"role": "developer", "content": parts}],
        [{"role": "system", "content": "a\nb"}],
    ]
    tokens = [server.post("/tokenize", {"model": "fake-model", "messages": m}).json()["tokens"] for m in prompts]
    assert tokens[0] == tokens[1]


def test_chat_without_max_tokens_may_fill_the_context(server: Running) -> None:
    answer = server.post(CHAT, chat(ignore_eos=True)).json()
    assert answer["usage"]["total_tokens"] == 2048
    assert answer["choices"][0]["finish_reason"] == "length"


def test_tokenize_and_detokenize_have_vllms_shapes(server: Running) -> None:
    answer = server.post("/tokenize", {"model": "fake-model", "prompt": "añb", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == 4
    assert answer["max_model_len"] == 2048
    assert answer["token_strs"][0] == "a"
    text = server.post("/detokenize", {"model": "fake-model", "tokens": answer["tokens"]}).json()
    assert text == {"prompt": "añb"}
    assert server.post("/detokenize", {"model": "fake-model", "tokens": []}).json() == {"prompt": ""}


def test_models_are_listed_and_found(server: Running) -> None:
    listed = server.http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["fake-model", "hash-model"]
    assert server.http.get("/v1/models/hash-model").json() == listed["data"][1]
    missing = server.http.get("/v1/models/some/other")
    assert missing.status_code == 404
    assert server.get_error(missing)["code"] == "model_not_found"


def test_fields_without_effect_are_accepted(server: Running) -> None:
    idle = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "modalities": ["text"],
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "logit_bias": None,
        "stop": None,
        "n": None,
        "temperature": None,
        "parallel_tool_calls": None,
    }
    assert server.post(CHAT, chat(**idle)).status_code == 200
    turn = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    assert server.post(CHAT, chat(messages=[turn, {"role": "user", "content": "y"}])).status_code == 200
