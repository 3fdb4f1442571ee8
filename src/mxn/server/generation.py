"""POST /v1/chat/completions and /v1/completions: from the body to the last event."""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mxn.core.request import SamplingParams, SequenceOutput
from mxn.errors import RequestError, UnavailableError
from mxn.server.answer import DONE, EVENT_STREAM_HEADERS, Answer, ChatAnswer, CompletionAnswer, Usage, error_event
from mxn.server.body import read_json
from mxn.server.choice import Choice, Scored, chat_logprobs, completion_logprobs, score_prompt
from mxn.server.disconnect import ClientGoneError, StopWhenGone
from mxn.server.errors import answer_for, send_json
from mxn.server.gateway import MODEL, Gateway, Served, require_ready
from mxn.server.openai import ChatRequest, CompletionRequest, GenerationRequest, check
from mxn.server.sampling import check_prompt_ids, for_choice, to_sampling

if TYPE_CHECKING:
    from mxn.engine.tokenizer import Tokenizer

Outcome = Literal["stop", "length", "client_gone", "refused", "failed"]


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One prompt of a request. echo: text to put before each of its completions, with its logprobs when asked for."""

    token_ids: list[int]
    sampling: SamplingParams
    echo: str = ""
    scored: list[Scored] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Job:
    """One request in work: its prompts and, per prompt, `n` completions."""

    served: Served
    request: GenerationRequest
    prompts: list[Prompt]
    answer: Answer
    started_s: float
    choices: list[Choice] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)

    @property
    def is_prompt_only(self) -> bool:
        """True when only the echoed prompt is wanted; the one token that the engine draws is dropped."""
        return self.request.max_tokens == 0

    def prompt_of(self, choice: Choice) -> Prompt:
        """The prompt that a completion continues."""
        return self.prompts[choice.index // (self.request.n or 1)]

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, whatever `n` is."""
        n = self.request.n or 1
        return Usage(
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            num_output_tokens=sum(choice.num_output_tokens for choice in self.choices),
            num_cached_tokens=sum(choice.num_cached_tokens for choice in self.choices[::n]),
            mxn=self._energy() if self.request.include_energy else None,
        )

    async def settle(self) -> None:
        """Waits until the joules of all completions are known, or known to be unknown."""
        for choice in self.choices:
            await choice.settle()

    @property
    def energy_j(self) -> float | None:
        """Joules of all completions; None when those of one are not known."""
        known = [choice.energy_j for choice in self.choices if choice.energy_j is not None]
        return sum(known) if len(known) == len(self.choices) else None

    def _energy(self) -> dict[str, Any]:
        return {"energy_j": self.energy_j, "source": self.served.power_source}


class GenerationEndpoint(ABC):
    """An ASGI endpoint that answers with completions; children say what the two APIs differ in."""

    request_kind: ClassVar[type[GenerationRequest]]
    answer_kind: ClassVar[type[Answer]]
    id_prefix: ClassVar[str]

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        started_s = time.perf_counter()
        body = await read_json(scope["headers"], receive, self._gateway.settings)
        request = check(self.request_kind, body)
        served = self._gateway.served(self._gateway.deployment_for("generate", request.model))
        scope[MODEL] = served.deployment.name
        outcome: Outcome = "failed"
        choices: list[Choice] = []
        try:
            async with StopWhenGone(receive):
                job = await self._prepare(request, served, started_s)
                choices = job.choices
                self._submit(job, self._gateway.cache_salt(scope))
                if request.stream:
                    await self._send_stream(job, send)
                else:
                    await self._send_whole(job, send)
            if all(choice.finish_reason is not None for choice in choices):
                outcome = "length" if any(choice.finish_reason == "length" for choice in choices) else "stop"
                await job.settle()
                _observe_end(job)
        except ClientGoneError:
            outcome = "client_gone"
            raise
        except RequestError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        finally:
            served.metrics.count(outcome)
            for choice in choices:
                if choice.finish_reason is None:
                    choice.stream.abort()

    # ------------------------------------------------------------------ what the two APIs differ in

    @abstractmethod
    async def _prompts(self, request: Any, served: Served) -> list[Prompt]:
        """The request's prompts as token ids, each with its sampling."""

    @abstractmethod
    def _logprobs(self, request: Any, scored: Sequence[Scored], tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Logprobs in the API's shape, None when they were not asked for."""

    # ------------------------------------------------------------------ before the first token

    async def _prepare(self, request: GenerationRequest, served: Served, started_s: float) -> Job:
        limits = self._gateway.settings
        n = request.n or 1
        if n > limits.max_n:
            raise RequestError(f"n is {n}, the limit is {limits.max_n} (server setting max_n)", param="n")
        if request.stream_options is not None and not request.stream:
            raise RequestError("stream_options needs stream set to true", param="stream_options")
        if isinstance(request, CompletionRequest) and len(request.prompt) * n > limits.max_sequences:
            raise RequestError(
                f"{len(request.prompt)} prompts with {n} completions each are more than the limit of "
                f"{limits.max_sequences} sequences (server setting max_sequences)",
                param="prompt",
            )
        require_ready(served.deployment)
        served.deployment.check_line(request.priority or 0)
        answer = self.answer_kind(
            answer_id=self.id_prefix + secrets.token_hex(16),
            created_s=int(time.time()),
            model=request.model,
            fingerprint=served.fingerprint,
            has_usage=bool(request.stream_options and request.stream_options.include_usage),
        )
        prompts = await self._prompts(request, served)
        return Job(served=served, request=request, prompts=prompts, answer=answer, started_s=started_s)

    def _submit(self, job: Job, cache_salt: str) -> None:
        """Starts every completion or none."""
        deployment, request = job.served.deployment, job.request
        for prompt in job.prompts:
            for i in range(request.n or 1):
                sampling = for_choice(prompt.sampling, i)
                stream = deployment.submit(
                    prompt.token_ids, sampling, cache_salt=cache_salt, priority=request.priority or 0
                )
                choice = Choice(len(job.choices), stream, request, sampling, deployment.tokenizer, prompt.token_ids)
                choice.start_at(len(prompt.echo))
                job.choices.append(choice)

    # ------------------------------------------------------------------ answers

    async def _send_whole(self, job: Job, send: Any) -> None:
        texts: list[list[str]] = [[] for _ in job.choices]
        async with aclosing(_outputs(job.choices)) as steps:
            async for outputs in steps:
                for choice, output in outputs:
                    texts[choice.index].append(self._take(job, choice, output))
        _check_ended(job.choices)
        choices = []
        for choice in job.choices:
            prompt = job.prompt_of(choice)
            text = prompt.echo + "".join(texts[choice.index])
            logprobs = self._logprobs(job.request, [*prompt.scored, *choice.scored], job.served.deployment.tokenizer)
            choices.append(self.answer_kind.choice(choice.index, text, logprobs, choice.finish_reason))
        if job.request.include_energy:
            await job.settle()
        await send_json(send, job.answer.whole(choices, job.usage()))

    async def _send_stream(self, job: Job, send: Any) -> None:
        """One write per step of the engine. After the first, an error is an event and no [DONE] follows it."""
        num_open = len(job.choices)
        has_begun = False
        try:
            async with aclosing(_outputs(job.choices)) as steps:
                async for outputs in steps:
                    events = []
                    for choice, output in outputs:
                        events.append(self._events(job, choice, output))
                        num_open -= choice.finish_reason is not None
                    if not num_open:
                        break
                    data = b"".join(events)
                    if data:
                        if not has_begun:
                            has_begun = True
                            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            _check_ended(job.choices)
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            if not has_begun:
                raise
            await send({"type": "http.response.body", "body": error_event(answer_for(error)), "more_body": False})
            return
        if job.request.stream_options and job.request.stream_options.include_usage:
            if job.request.include_energy:
                await job.settle()
            events.append(job.answer.usage_event(job.usage()))
        events.append(DONE)
        if not has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": False})

    def _events(self, job: Job, choice: Choice, output: SequenceOutput) -> bytes:
        """The bytes that one output of one choice adds to a stream."""
        begin = b""
        is_first = choice.index not in job.begun
        text = self._take(job, choice, output)
        scored = choice.take_scored()
        if is_first:
            job.begun.add(choice.index)
            prompt = job.prompt_of(choice)
            begin = job.answer.first_event(choice.index)
            text = prompt.echo + text
            scored = [*prompt.scored, *scored]
        if not text and not scored and choice.finish_reason is None:
            return begin
        logprobs = self._logprobs(job.request, scored, job.served.deployment.tokenizer) if scored else None
        return begin + job.answer.event(choice.index, text, logprobs, choice.finish_reason)

    def _take(self, job: Job, choice: Choice, output: SequenceOutput) -> str:
        """Text of one output, with its times observed."""
        now_s = time.perf_counter()
        if output.token_ids or output.text:
            if choice.last_token_s:
                job.served.metrics.itl_s.observe(now_s - choice.last_token_s)
            elif choice.index == 0:
                job.served.metrics.ttft_s.observe(now_s - job.started_s)
            choice.last_token_s = now_s
        if output.prompt_logprobs is not None:
            prompt = job.prompt_of(choice)
            if not prompt.scored:
                prompt.scored = score_prompt(prompt.token_ids, output.prompt_logprobs, job.served.deployment.tokenizer)
        if job.is_prompt_only:
            output = replace(output, token_ids=[], text=None, num_counted_tokens=None, logprobs=[])
        return choice.take(output)


class ChatEndpoint(GenerationEndpoint):
    """POST /v1/chat/completions."""

    request_kind = ChatRequest
    answer_kind = ChatAnswer
    id_prefix = "chatcmpl-"

    async def _prompts(self, request: ChatRequest, served: Served) -> list[Prompt]:
        ids = await served.encoder.encode_chat(request.messages, request.chat_template_kwargs)
        check_prompt_ids(ids, served.deployment, "messages")
        return [Prompt(token_ids=ids, sampling=to_sampling(request, served.deployment, len(ids)))]

    def _logprobs(self, request: ChatRequest, scored: Sequence[Scored], tokenizer: Tokenizer) -> dict[str, Any] | None:
        return chat_logprobs(scored, tokenizer, request.top_logprobs or 0) if request.logprobs else None


class CompletionEndpoint(GenerationEndpoint):
    """POST /v1/completions."""

    request_kind = CompletionRequest
    answer_kind = CompletionAnswer
    id_prefix = "cmpl-"

    async def _prompts(self, request: CompletionRequest, served: Served) -> list[Prompt]:
        deployment = served.deployment
        prompts = []
        for given in request.prompt:
            if isinstance(given, str):
                add = request.add_special_tokens is not False
                ids = await served.encoder.encode_text(given, add_special_tokens=add)
                text = given
            else:
                ids, text = given, ""
            check_prompt_ids(ids, deployment, "prompt")
            if request.echo and not isinstance(given, str):
                text = deployment.tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens is not False)
            sampling = to_sampling(request, deployment, len(ids))
            prompts.append(Prompt(token_ids=ids, sampling=sampling, echo=text if request.echo else ""))
            await asyncio.sleep(0)  # many prompts must not hold up other requests
        return prompts

    def _logprobs(
        self, request: CompletionRequest, scored: Sequence[Scored], tokenizer: Tokenizer
    ) -> dict[str, Any] | None:
        return None if request.logprobs is None else completion_logprobs(scored, tokenizer, request.logprobs)


def _observe_end(job: Job) -> None:
    metrics, usage = job.served.metrics, job.usage()
    metrics.e2e_s.observe(time.perf_counter() - job.started_s)
    metrics.prompt_tokens.inc(usage.num_prompt_tokens)
    metrics.output_tokens.inc(usage.num_output_tokens)
    metrics.cached_tokens.inc(usage.num_cached_tokens)
    metrics.prompt_length.observe(usage.num_prompt_tokens)
    metrics.output_length.observe(usage.num_output_tokens)
    if (energy_j := job.energy_j) is not None:
        metrics.energy_j.observe(energy_j)


def _check_ended(choices: Sequence[Choice]) -> None:
    if any(choice.finish_reason is None for choice in choices):
        raise UnavailableError("the server ended this request before the answer was complete", retry_after_s=1.0)


async def _outputs(choices: Sequence[Choice]) -> AsyncGenerator[list[tuple[Choice, SequenceOutput]], None]:
    """Outputs of all choices as they come, those of one step together.

    Raises: what a stream raises, as soon as it does.
    """
    if len(choices) == 1:
        async for output in choices[0].stream:
            yield [(choices[0], output)]
        return
    queue: asyncio.Queue[tuple[Choice, SequenceOutput | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(choice, queue)) for choice in choices]
    try:
        num_open = len(choices)
        while num_open:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            outputs = []
            for choice, item in found:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    outputs.append((choice, item))
            if outputs:
                yield outputs
    finally:
        for task in tasks:
            task.cancel()


async def _pump(choice: Choice, queue: asyncio.Queue[tuple[Choice, SequenceOutput | Exception | None]]) -> None:
    try:
        async for output in choice.stream:
            queue.put_nowait((choice, output))
        queue.put_nowait((choice, None))
    except Exception as error:
        queue.put_nowait((choice, error))
