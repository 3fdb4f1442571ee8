"""Validation: every field of a request at and beyond its edges."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import RequestError
from mxn.fleet.deployment import Deployment
from mxn.server.fields import MAX_LOGIT_BIAS, MAX_STOP, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS
from mxn.server.openai import INT32_MAX, INT64_MAX, ChatRequest, CompletionRequest, check, message_text
from mxn.server.sampling import check_prompt_ids, for_choice, to_sampling

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
VOCAB = 100
CONTEXT = 64

NUMBERS: dict[str, tuple[type, float, float]] = {
    "n": (int, 1, INT32_MAX),
    "max_tokens": (int, 0, INT32_MAX),
    "max_completion_tokens": (int, 0, INT32_MAX),
    "min_tokens": (int, 0, INT32_MAX),
    "temperature": (float, 0, 2),
    "top_p": (float, math.ulp(0.0), 1),
    "top_k": (int, -1, INT32_MAX),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "seed": (int, -INT64_MAX - 1, INT64_MAX),
    "priority": (int, -100, 100),
    "top_logprobs": (int, 0, 20),
}
"""Field of a chat request -> its kind and least and greatest value."""

WRONG_NUMBERS = st.one_of(
    st.booleans(),
    st.text(),
    st.integers(min_value=2**63),
    st.integers(max_value=-(2**63) - 1),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, "5", [], {}, [1], 2**70, -(2**70), 10**400]),
    st.lists(st.integers(), min_size=1, max_size=3),
)


def deployment() -> Deployment:
    tokenizer = SimpleNamespace(eos_token_ids=(7, 9), vocab_size=VOCAB)
    model = SimpleNamespace(spec=SimpleNamespace(task="generate"))
    facts = SimpleNamespace(name="m", tokenizer=tokenizer, info=None, refused=[], max_context=CONTEXT, model=model)
    return cast(Deployment, facts)


def refusal(kind: type[ChatRequest] | type[CompletionRequest], body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        to_sampling(check(kind, body), deployment(), 4)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 700
    return caught.value


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_at_its_edges_is_accepted_and_beyond_is_refused_by_name(name: str) -> None:
    kind, low, high = NUMBERS[name]
    step: float = 1 if kind is int else 1e-6
    for value in (low, high, None):
        check(ChatRequest, {**CHAT, name: value})
    for value in (low - step, high + step):
        assert refusal(ChatRequest, {**CHAT, name: value}).param == name


@given(name=st.sampled_from(sorted(NUMBERS)), value=WRONG_NUMBERS)
@settings(max_examples=400, deadline=None)
def test_no_wrong_number_passes(name: str, value: object) -> None:
    assert refusal(ChatRequest, {**CHAT, name: value}).param == name


@given(name=st.sampled_from(sorted(NUMBERS)), value=st.integers() | st.floats())
@settings(max_examples=400, deadline=None)
def test_any_number_is_used_or_refused_but_never_raises_otherwise(name: str, value: float) -> None:
    try:
        sampling = to_sampling(check(ChatRequest, {**CHAT, name: value}), deployment(), 4)
    except RequestError:
        return
    assert 1 <= sampling.max_tokens <= CONTEXT - 4
    assert 0 <= sampling.top_k <= INT32_MAX


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["x"] * (MAX_STOP + 1)),
        ("stop", ["x"] * 10_000),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", "x" * (MAX_STOP_CHARS + 1)),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop", True),
        ("stop_token_ids", [1] * (MAX_STOP_TOKEN_IDS + 1)),
        ("stop_token_ids", [VOCAB]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", 5),
        ("logit_bias", {str(i): 0 for i in range(MAX_LOGIT_BIAS + 1)}),
        ("logit_bias", {str(VOCAB): 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"1.5": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": math.nan}),
        ("logit_bias", {"1": 1e308}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {"1": "5"}),
        ("logit_bias", [[1, 2]]),
        ("stream", 1),
        ("stream", "true"),
        ("ignore_eos", "yes"),
        ("model", ""),
        ("model", None),
        ("model", 3),
        ("model", "x" * 513),
        ("user", 3),
        ("metadata", {"a": 1}),
        ("metadata", {str(i): "x" for i in range(17)}),
        ("messages", []),
        ("messages", "hi"),
        ("messages", None),
        ("messages", [{"role": "user", "content": "x"}] * 3000),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", []),
        ("chat_template_kwargs", {"enable_thinking": "no"}),
        ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", []),
        ("logprobs", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    param = refusal(ChatRequest, {**CHAT, name: value}).param
    assert param is not None
    assert param.split(".")[0].split("[")[0] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_object"}),
        ("functions", [{}]),
        ("best_of", 2),
        ("suffix", "x"),
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("service_tier", "flex"),
        ("cache_salt", "x"),
        ("chat_template", "{{ 1 }}"),
        ("guided_json", {}),
        ("request_id", "x"),
        ("reasoning_effort", "high"),
        ("prompt_logprobs", 1),
        ("x" * 1000, 1),
    ],
)
def test_an_unsupported_field_is_refused_by_name(name: str, value: object) -> None:
    error = refusal(ChatRequest, {**CHAT, name: value})
    assert error.code == "unsupported_parameter"
    assert error.param is not None
    assert name.startswith(error.param[:50])


def test_true_is_not_one_where_a_field_is_idle() -> None:
    assert refusal(CompletionRequest, {**COMPLETION, "best_of": True}).param == "best_of"
    check(CompletionRequest, {**COMPLETION, "best_of": 1, "suffix": None})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_come_in_four_forms(prompt: object, expected: object) -> None:
    assert check(CompletionRequest, {**COMPLETION, "prompt": prompt}).prompt == expected


@pytest.mark.parametrize(
    "prompt", [None, 5, True, {}, [], [[]], [1, "a"], [[1], "a"], [["a"]], [[True]], [1.5], [[1], []], [None], [[[1]]]]
)
def test_any_other_prompt_is_refused(prompt: object) -> None:
    assert refusal(CompletionRequest, {**COMPLETION, "prompt": prompt}).param == "prompt"


@pytest.mark.parametrize("content", [None, 5, [], {}, [{"type": "image_url"}], ["x"], [{"type": "text"}], [5]])
def test_content_other_than_text_is_refused(content: object) -> None:
    request = check(ChatRequest, {**CHAT, "messages": [{"role": "user", "content": content}]})
    with pytest.raises(RequestError) as caught:
        message_text(request.messages[0], 0)
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": "x", "name": "bob"}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ("hi", "messages[0]"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: object, param: str) -> None:
    assert refusal(ChatRequest, {**CHAT, "messages": [message]}).param == param


def test_too_many_tokens_names_the_numbers() -> None:
    error = refusal(ChatRequest, {**CHAT, "max_tokens": 61})
    assert error.code == "context_length_exceeded"
    assert all(number in str(error) for number in ("4", "61", "65", "64", "60"))


def test_zero_tokens_are_for_an_echoed_prompt_only() -> None:
    assert refusal(ChatRequest, {**CHAT, "max_tokens": 0}).param == "max_tokens"
    assert refusal(CompletionRequest, {**COMPLETION, "max_tokens": 0}).param == "max_tokens"
    check_kind = check(CompletionRequest, {**COMPLETION, "max_tokens": 0, "echo": True})
    assert to_sampling(check_kind, deployment(), 4).max_tokens == 1


def test_both_limits_must_agree() -> None:
    assert refusal(ChatRequest, {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}).param == "max_tokens"
    both = check(ChatRequest, {**CHAT, "max_tokens": 4, "max_completion_tokens": 4})
    assert to_sampling(both, deployment(), 4).max_tokens == 4


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert refusal(ChatRequest, {**CHAT, "min_tokens": 9, "max_tokens": 8}).param == "min_tokens"


def test_top_logprobs_needs_logprobs() -> None:
    assert refusal(ChatRequest, {**CHAT, "top_logprobs": 2}).param == "top_logprobs"


def test_sampling_carries_every_field() -> None:
    body = {
        **CHAT,
        "max_tokens": 12,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "logit_bias": {"3": -100, "4": 2.5},
        "seed": -1,
        "stop_token_ids": [11, 7],
        "logprobs": True,
        "top_logprobs": 3,
    }
    sampling = to_sampling(check(ChatRequest, body), deployment(), 4)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k) == (12, 2, 40)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.05)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.25, -0.25)
    assert sampling.logit_bias == ((3, -100.0), (4, 2.5))
    assert sampling.seed == INT64_MAX
    assert sampling.stop_token_ids == (7, 9, 11)
    assert sampling.num_logprobs == 3
    ignoring = check(ChatRequest, {**CHAT, "ignore_eos": True})
    assert to_sampling(ignoring, deployment(), 4).stop_token_ids == ()


def test_prompt_logprobs_are_asked_for_by_echo_with_logprobs() -> None:
    asked = to_sampling(check(CompletionRequest, {**COMPLETION, "echo": True, "logprobs": 2}), deployment(), 4)
    assert (asked.num_logprobs, asked.num_prompt_logprobs) == (2, 2)
    plain = to_sampling(check(CompletionRequest, {**COMPLETION, "echo": True}), deployment(), 4)
    assert (plain.num_logprobs, plain.num_prompt_logprobs) == (None, None)


def test_each_choice_has_its_own_seed() -> None:
    sampling = to_sampling(check(ChatRequest, {**CHAT, "seed": INT64_MAX}), deployment(), 4)
    seeds = [for_choice(sampling, i).seed for i in range(3)]
    assert seeds == [INT64_MAX, 0, 1]
    unseeded = to_sampling(check(ChatRequest, CHAT), deployment(), 4)
    assert for_choice(unseeded, 1).seed is None


@pytest.mark.parametrize("ids", [[], [VOCAB], [-1], [2**63], list(range(CONTEXT))])
def test_prompt_ids_out_of_range_are_refused(ids: list[int]) -> None:
    with pytest.raises(RequestError):
        check_prompt_ids(ids, deployment(), "prompt")
