"""What a client may ask for, checked once: OpenAI's text and embeddings APIs with vLLM's sampling extensions.

Every field is either used, documented as having no effect, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mxn.errors import RequestError
from mxn.server.errors import brief
from mxn.server.fields import Content, Input, LogitBias, Metadata, Prompt, Stop, StopTokenIds, TemplateKwargs, TokenIds

MAX_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_PRIORITY = 100
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "prompt_cache_retention": (None, "in_memory"),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""OpenAI fields that mxn does not support, with the values that ask for nothing; any other value is refused by name."""

_INSTEAD: Mapping[str, str] = {
    "best_of": "use n",
    "cache_salt": "the server derives it from the API key",
    "chat_template": "the model's own template is used",
    "guided_json": "constrained output is not supported yet",
    "response_format": 'only {"type": "text"} is available',
    "suffix": "insertion is not supported",
    "tools": "tool calls are not supported yet",
}


class Checked(BaseModel):
    """Strict types, no unknown fields, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}


class StreamOptions(Checked):
    """What a stream carries besides the text."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = False


class GenerationRequest(Checked):
    """Fields that both text APIs share."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = _NEUTRAL

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(default=1, ge=1, le=INT32_MAX)
    max_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    min_tokens: int | None = Field(default=0, ge=0, le=INT32_MAX)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=0, ge=-1, le=INT32_MAX, description="0 and -1 switch it off")
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: LogitBias = ()
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: Stop = ()
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    ignore_eos: bool | None = False
    priority: int | None = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="lower is served first")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    include_energy: bool | None = Field(default=False, description="usage.mxn then tells the joules of the answer")
    user: str | None = Field(default=None, max_length=512, description="accepted, has no effect")
    safety_identifier: str | None = Field(default=None, max_length=512, description="accepted, has no effect")
    prompt_cache_key: str | None = Field(
        default=None, max_length=512, description="accepted, has no effect: prefixes are always shared per API key"
    )
    metadata: Metadata = None


class ChatMessage(Checked):
    """One turn; its text parts are joined by newlines."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "annotations": (None, []),
        "audio": (None,),
        "function_call": (None,),
        "name": (None,),
        "refusal": (None,),
        "tool_calls": (None, []),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: TemplateKwargs = {}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = True


class EmbeddingRequest(Checked):
    """POST /v1/embeddings."""

    model: str = Field(min_length=1, max_length=512)
    input: Input
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(default=None, ge=1, le=INT32_MAX, description="only the model's own number")
    user: str | None = Field(default=None, max_length=512, description="accepted, has no effect")
    include_energy: bool | None = Field(default=False, description="usage.mxn then tells the joules of the answer")


class TokenizeRequest(Checked):
    """POST /tokenize, in vLLM's shape: either a prompt or messages."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False
    chat_template_kwargs: TemplateKwargs = {}


class ExplainRequest(Checked):
    """POST /v1/mxn/explain. prompt: a text for which the router's view is asked."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    prompt: str | None = None
    max_tokens: int | None = Field(default=128, ge=1, le=INT32_MAX)


class DetokenizeRequest(Checked):
    """POST /detokenize, in vLLM's shape."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    tokens: TokenIds


# ---------------------------------------------------------------- checking

R = TypeVar("R", bound=Checked)


def check(kind: type[R], body: dict[str, Any]) -> R:
    """`body` as a `kind`. Raises RequestError that names the first field at fault."""
    _drop_neutral(body, kind.neutral)
    if isinstance(body.get("stream_options"), dict):
        _drop_neutral(body["stream_options"], StreamOptions.neutral)
    messages = body.get("messages")
    if isinstance(messages, list):
        if len(messages) > MAX_MESSAGES:
            raise RequestError(f"messages holds {len(messages)} entries, the limit is {MAX_MESSAGES}", param="messages")
        for message in messages:
            if isinstance(message, dict):
                _drop_neutral(message, ChatMessage.neutral)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _request_error(error) from None


def message_text(message: ChatMessage, index: int) -> str:
    """The text of a message whose content is a string or a list of text parts."""
    content = message.content
    if isinstance(content, str):
        return content
    param = f"messages[{index}].content"
    if not isinstance(content, list) or not content:
        raise RequestError(f"{param} must be a string or a list of text parts, got {brief(content)}", param=param)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(
                f"{param} may hold parts of type 'text' only, got {brief(kind if kind is not None else part)}",
                param=param,
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise RequestError(f'{param} parts look like {{"type": "text", "text": "..."}}', param=param)
        texts.append(part["text"])
    return "\n".join(texts)


def _drop_neutral(body: dict[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    for name in neutral.keys() & body.keys():
        value = body[name]
        if any(type(value) is type(idle) and value == idle for idle in neutral[name]):
            del body[name]


def _request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    loc = first["loc"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{brief(part)[1:-1]}" for part in loc).lstrip(".")
    name = loc[-1] if loc else ""
    if first["type"] == "extra_forbidden":
        hint = _INSTEAD.get(str(name))
        is_known = name in _NEUTRAL or name in ChatMessage.neutral or hint
        text = f"{param} is not supported" if is_known else f"unknown field {param}"
        return RequestError(f"{text}: {hint}" if hint else text, param=param, code="unsupported_parameter")
    if first["type"] == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    if name == "role":
        return RequestError(
            f"{param} must be system, developer, user or assistant, got {brief(first['input'])}", param=param
        )
    text = first["msg"].replace("Input should be", f"{param} must be", 1)
    text = text if text.startswith(param) else f"{param}: {text}"
    return RequestError(f"{text}, got {brief(first['input'])}", param=param)
