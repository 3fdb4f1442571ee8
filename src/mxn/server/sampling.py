"""Turns a checked request into sampling parameters for one deployment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mxn.core.request import PROMPT_LOGPROBS, SamplingParams
from mxn.errors import RequestError
from mxn.server.openai import ChatRequest, CompletionRequest, GenerationRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mxn.fleet.deployment import Deployment

_SEED_MASK = 2**63 - 1
_DEFAULT_COMPLETION_TOKENS = 16


def to_sampling(request: GenerationRequest, deployment: Deployment, num_prompt_tokens: int) -> SamplingParams:
    """Sampling parameters of the first completion; `for_choice` derives those of the others.

    Raises: RequestError for a field that does not fit this model.
    """
    _check_served(request, deployment)
    vocab_size = _vocab_size(deployment)
    _check_ids([token_id for token_id, _ in request.logit_bias], vocab_size, "logit_bias")
    _check_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    max_tokens = _max_tokens(request, num_prompt_tokens, deployment.max_context)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(f"min_tokens is {min_tokens}, more than max_tokens, {max_tokens}", param="min_tokens")
    num_logprobs, num_prompt_logprobs = _num_logprobs(request)
    eos = () if request.ignore_eos else deployment.tokenizer.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(request.temperature, 1.0),
        top_k=max(0, request.top_k or 0),
        top_p=_or(request.top_p, 1.0),
        min_p=request.min_p or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias,
        seed=None if request.seed is None else request.seed & _SEED_MASK,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        stop_token_ids=tuple(dict.fromkeys((*eos, *request.stop_token_ids))),
    )


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Sampling of completion number `choice` of the same prompt: another seed when one was given."""
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) & _SEED_MASK)


def check_prompt_ids(ids: Sequence[int], deployment: Deployment, param: str) -> None:
    """Raises RequestError unless all ids are tokens of the model and its context holds them, and what it generates."""
    if not ids:
        raise RequestError(f"{param} is empty; at least one token is needed", param=param)
    makes_vectors = deployment.model.spec.task == "embed"
    if len(ids) > deployment.max_context - (not makes_vectors):
        raise too_long(f"{len(ids)} tokens", deployment, param)
    _check_ids(ids, _vocab_size(deployment), param)


def too_long(found: str, deployment: Deployment, param: str) -> RequestError:
    """The error for a prompt that leaves no room for an answer, or a text too long to embed."""
    together = ", prompt and answer together" if deployment.model.spec.task == "generate" else ""
    return RequestError(
        f"{param} has {found}; {deployment.name} takes at most {deployment.max_context} tokens{together}",
        param=param,
        code="context_length_exceeded",
    )


def _check_served(request: GenerationRequest, deployment: Deployment) -> None:
    """Raises RequestError for a field that this deployment's backend cannot serve."""
    for field in deployment.refused:
        is_echo = field == PROMPT_LOGPROBS
        if _num_logprobs(request)[1] is not None if is_echo else _is_used(request, field):
            what, param = ("echo with logprobs", "echo") if is_echo else (field, field)
            raise RequestError(
                f"{what} is not supported by the {deployment.backend} backend behind {deployment.name}",
                param=param,
                code="unsupported_parameter",
            )


def _is_used(request: GenerationRequest, field: str) -> bool:
    """True when a field asks for something."""
    known = type(request).model_fields.get(field)
    value = getattr(request, field, None)
    return known is not None and value is not None and value != known.default and (field != "top_k" or value > 0)


def _max_tokens(request: GenerationRequest, num_prompt_tokens: int, max_context: int) -> int:
    room = max_context - num_prompt_tokens
    name, wanted = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        if wanted is not None and wanted != request.max_completion_tokens:
            raise RequestError(
                f"max_tokens is {wanted} and max_completion_tokens {request.max_completion_tokens}; send one of them",
                param="max_tokens",
            )
        name, wanted = "max_completion_tokens", request.max_completion_tokens
    if wanted is None:
        return room if isinstance(request, ChatRequest) else min(room, _DEFAULT_COMPLETION_TOKENS)
    if wanted == 0:
        if not (isinstance(request, CompletionRequest) and request.echo):
            raise RequestError(f"{name} must be at least 1, got 0", param=name)
        return 1  # the prompt alone is wanted; the one token is dropped
    if wanted > room:
        raise RequestError(
            f"{num_prompt_tokens} prompt tokens and {name} {wanted} are {num_prompt_tokens + wanted} tokens; "
            f"the context holds {max_context}, so {name} may be at most {room}",
            param=name,
            code="context_length_exceeded",
        )
    return wanted


def _num_logprobs(request: GenerationRequest) -> tuple[int | None, int | None]:
    if isinstance(request, CompletionRequest):
        return request.logprobs, request.logprobs if request.echo else None
    if not isinstance(request, ChatRequest):
        return None, None
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs set to true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None, None


def _check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise RequestError(f"{param} holds token id {wrong}; this model has ids 0 to {vocab_size - 1}", param=param)


def _vocab_size(deployment: Deployment) -> int:
    return deployment.info.vocab_size if deployment.info is not None else deployment.tokenizer.vocab_size


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
