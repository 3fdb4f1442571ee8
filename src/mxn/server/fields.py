"""Fields of a request whose values are more than a number or a string: their checks and their JSON schemas.

Checks are written by hand where a library would try several types on each of a million entries, or would report an
error for each of them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from mxn.errors import RequestError
from mxn.server.errors import brief

MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_INPUTS = 2048
"""OpenAI's limit on the texts of one request for embeddings."""

TEMPLATE_KWARGS = ("enable_thinking", "thinking", "preserve_thinking")
"""Switches that chat templates read. Nothing else of a request reaches a template but its messages."""


def _check_stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops[: MAX_STOP + 1]):
        raise RequestError(f"stop must be a string or a list of strings, got {brief(value)}", param="stop")
    if len(stops) > MAX_STOP:
        raise RequestError(f"stop holds {len(stops)} strings, the limit is {MAX_STOP}", param="stop")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise RequestError(
                f"each stop string has 1 to {MAX_STOP_CHARS} characters, got one of {len(text)}", param="stop"
            )
    return tuple(stops)


def _check_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias must map token ids to numbers, got {brief(value)}", param="logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias holds {len(value)} entries, the limit is {MAX_LOGIT_BIAS}", param="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError(f"logit_bias keys are token ids, got {brief(key)}", param="logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise RequestError(f"logit_bias values are numbers from -100 to 100, got {brief(bias)}", param="logit_bias")
        biases[int(key)] = float(bias)
    return tuple(biases.items())


def _check_stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKEN_IDS or not set(map(type, value)) <= {int}:
        raise RequestError(
            f"stop_token_ids must be a list of at most {MAX_STOP_TOKEN_IDS} token ids, got {brief(value)}",
            param="stop_token_ids",
        )
    return tuple(value)


def _check_token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise RequestError(f"tokens must be a list of token ids, got {brief(value)}", param="tokens")
    return value


def _check_prompt(value: object) -> list[str] | list[list[int]]:
    """One or more prompts, all texts or all token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {str}:
            return value
        if kinds == {list} and all(ids and set(map(type, ids)) == {int} for ids in value):
            return value
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, "
        f"none of them empty lists; got {brief(value)}",
        param="prompt",
    )


def _check_input(value: object) -> list[str] | list[list[int]]:
    """One or more texts to embed, in the forms a prompt has, none of them empty."""
    try:
        texts = _check_prompt(value)
    except RequestError as error:
        raise RequestError(str(error).replace("prompt must", "input must", 1), param="input") from None
    if len(texts) > MAX_INPUTS:
        raise RequestError(f"input holds {len(texts)} texts, the limit is {MAX_INPUTS}", param="input")
    if not all(texts):
        raise RequestError("input holds an empty text; each has at least one character", param="input")
    return texts


def _check_metadata(value: object) -> None:
    if value is None:
        return
    is_flat = isinstance(value, dict) and len(value) <= 16 and all(isinstance(v, str) for v in value.values())
    if not is_flat:
        raise RequestError(f"metadata is an object of at most 16 strings, got {brief(value)}", param="metadata")


def _check_template_kwargs(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"chat_template_kwargs must be an object, got {brief(value)}", param="chat_template_kwargs")
    for name, setting in value.items():
        if name not in TEMPLATE_KWARGS:
            raise RequestError(
                f"chat_template_kwargs.{brief(name)[1:-1]} is not accepted; available: {', '.join(TEMPLATE_KWARGS)}",
                param="chat_template_kwargs",
            )
        if type(setting) is not bool:
            raise RequestError(
                f"chat_template_kwargs.{name} must be true or false, got {brief(setting)}", param="chat_template_kwargs"
            )
    return value


Stop = Annotated[
    Any,
    PlainValidator(_check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOP,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                },
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    Any,
    PlainValidator(_check_logit_bias),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
StopTokenIds = Annotated[
    Any,
    PlainValidator(_check_stop_token_ids),
    WithJsonSchema(
        {"type": ["array", "null"], "maxItems": MAX_STOP_TOKEN_IDS, "items": {"type": "integer", "minimum": 0}}
    ),
]
_TEXTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}
Prompt = Annotated[Any, PlainValidator(_check_prompt), WithJsonSchema(_TEXTS_SCHEMA)]
Input = Annotated[Any, PlainValidator(_check_input), WithJsonSchema(_TEXTS_SCHEMA)]
Metadata = Annotated[
    Any,
    PlainValidator(_check_metadata),
    WithJsonSchema({"type": ["object", "null"], "maxProperties": 16, "additionalProperties": {"type": "string"}}),
]
TemplateKwargs = Annotated[
    Any,
    PlainValidator(_check_template_kwargs),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "properties": {name: {"type": "boolean"} for name in TEMPLATE_KWARGS},
            "additionalProperties": False,
        }
    ),
]
Content = Annotated[
    Any,
    PlainValidator(lambda value: value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]
"""A message's content as it came; `openai.message_text` checks it and makes a text of it."""

TokenIds = Annotated[
    Any, PlainValidator(_check_token_ids), WithJsonSchema({"type": "array", "items": {"type": "integer"}})
]
