"""The backend under test: real replica processes of it, and sequences run on them."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mxn.backends.base import Backend, Capabilities
from mxn.conformance.reference import Reference
from mxn.conformance.result import CheckFailed, NotApplicable
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest, TokenLogprob
from mxn.engine.messages import Load, ReplicaInfo
from mxn.errors import BackendError, MxnError, UnsupportedModelError
from mxn.fleet.calibration.measure import CALIBRATION
from mxn.fleet.launchers.local import launch
from mxn.fleet.replica import Replica, ReplicaLink
from mxn.fleet.stream import SequenceStream

USUAL = LoadSettings(kv_bytes=2**20, max_num_seqs=16, max_step_tokens=48, context_length=512)
"""Small steps, so that prompts are computed in chunks beside sequences that decode."""

STOP_LIMIT_S = 30.0
PRECISE_FIRST = ("fp32", "fp16", "bf16", "int8", "int4")


class WatchedReplica(Replica):
    """A replica that counts how often each sequence is said to have ended; callers see only the first time."""

    def __init__(self, link: ReplicaLink) -> None:
        super().__init__(link)
        self.num_ends: Counter[int] = Counter()

    @property
    def last_words(self) -> str:
        """The end of what the process wrote to its log, to be put after an error."""
        return f'; its log ends with "{self._last_words[-1]}"' if self._last_words else ""

    def _deliver(self, output: SequenceOutput) -> None:
        if output.finish_reason is not None:
            self.num_ends[output.seq_id] += 1
        super()._deliver(output)


@dataclass(slots=True)
class Generated:
    """All that a sequence yielded. A server that does not name its tokens yields text and a count."""

    seq_id: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def answer(self) -> list[int] | str:
        """What must be equal where answers must be."""
        return self.token_ids or self.text


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence to run: its prompt, its tenant, and how its tokens are chosen. Greedy unless told otherwise."""

    prompt: Sequence[int]
    max_tokens: int = 12
    tenant: str = ""
    temperature: float = 0.0
    seed: int | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


class Subject:
    """A backend, a chip of it, and models to run. Checks that harm no replica share one for each set of settings."""

    def __init__(self, backend: Backend, chip: Chip, models: Sequence[Model]) -> None:
        self.backend = backend
        self.chip = chip
        self.models = tuple(models)
        self.capabilities: Capabilities = backend.capabilities(chip)
        self._kept: dict[tuple[str, LoadSettings], WatchedReplica] = {}
        self._seq_ids = itertools.count(1)

    @property
    def runnable(self) -> tuple[Model, ...]:
        """The models that the backend says it can run; at least one.

        Raises: CheckFailed when it says no to all.
        """
        support = {model.name: self.backend.supports(model.spec, self.chip) for model in self.models}
        found = tuple(model for model in self.models if support[model.name].verdict != "no")
        if not found:
            said = "; ".join(f"{name}: {', '.join(s.reasons)}" for name, s in support.items())
            raise CheckFailed(f"it supports none of the models to run ({said}); give it one with --model")
        return found

    @property
    def precise(self) -> LoadSettings:
        """The usual settings at the most precise quantisation that the backend offers."""
        offered = self.capabilities.quantisations
        best = next((name for name in PRECISE_FIRST if name in offered), "auto")
        return replace(USUAL, quantisation=best)  # type: ignore[arg-type]  # one of the names above

    @property
    def profile_settings(self) -> LoadSettings:
        """What a model is measured with: as people serve it, only with a bounded cache."""
        return replace(CALIBRATION, kv_bytes=256 * 2**20)

    def reference(self, model: Model) -> Reference:
        """The oracle for a model. Raises: NotApplicable where there is none."""
        try:
            return Reference(Path(model.folder))
        except (UnsupportedModelError, OSError) as error:
            raise NotApplicable(f"there is no reference for {model.name}: {error}") from error

    async def replica(self, model: Model | None = None, settings: LoadSettings | None = None) -> WatchedReplica:
        """A shared replica, started when there is none alive."""
        key = (model or self.runnable[0], settings or self.precise)
        name = (key[0].name, key[1])
        if name in self._kept and self._kept[name].ended.is_set():
            await self._kept.pop(name).kill()
        if name not in self._kept:
            self._kept[name] = await self._start(*key)
        return self._kept[name]

    @asynccontextmanager
    async def own_replica(
        self, model: Model | None = None, settings: LoadSettings | None = None
    ) -> AsyncIterator[WatchedReplica]:
        """A replica for one check alone, ended with it."""
        replica = await self._start(model or self.runnable[0], settings or self.precise)
        try:
            yield replica
        finally:
            await replica.kill()

    async def close(self) -> None:
        """Ends all replicas that were kept."""
        for replica in self._kept.values():
            await replica.kill()
        self._kept.clear()

    def submit(self, replica: WatchedReplica, ask: Ask) -> SequenceStream:
        """Begins a sequence."""
        sampling = SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            num_logprobs=ask.num_logprobs,
            num_prompt_logprobs=ask.num_prompt_logprobs,
        )
        return replica.submit(
            SequenceRequest(
                seq_id=next(self._seq_ids),
                prompt_token_ids=list(ask.prompt),
                sampling=sampling,
                cache_salt=ask.tenant,
            )
        )

    async def run(self, replica: WatchedReplica, asks: Sequence[Ask], *, may_fail: bool = False) -> list[Generated]:
        """Runs sequences beside each other to their ends.

        Raises: CheckFailed when one ends in an error, unless `may_fail`.
        """
        streams = [self.submit(replica, ask) for ask in asks]
        found = await asyncio.gather(*(_collect(stream) for stream in streams))
        for one in found:
            if one.error is not None and not may_fail:
                raise CheckFailed(f"a sequence ended with an error: {one.error}{replica.last_words}")
        return list(found)

    async def _start(self, model: Model, settings: LoadSettings) -> WatchedReplica:
        load = Load(backend=self.backend.name, model=model, settings=settings, chips=[self.chip], max_waiting=64)
        try:
            return await WatchedReplica.start(await launch(), load, lambda phase, fraction: None)
        except MxnError as error:
            raise CheckFailed(f"{model.name} could not be loaded: {error}") from error


def info_of(replica: Replica) -> ReplicaInfo:
    """What a replica that is ready said of itself."""
    if replica.info is None:
        raise BackendError("the replica is not ready")
    return replica.info


def prompt(length: int, *, salt: int = 0) -> list[int]:
    """A prompt of byte tokens that looks random and is always the same."""
    return [(37 * i * i + 101 * i + 13 * salt) % 251 for i in range(length)]


def require_equal(found: Sequence[Generated], expected: Sequence[Generated], how: str, else_how: str) -> None:
    """Raises: CheckFailed when answers that must be equal are not."""
    for one, other in zip(found, expected, strict=True):
        if one.answer != other.answer:
            pairs = zip(one.answer, other.answer, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.answer), len(other.answer)))
            raise CheckFailed(f"from place {at} on it answers {one.answer!r} {how} and {other.answer!r} {else_how}")


async def _collect(stream: SequenceStream) -> Generated:
    found = Generated(stream.seq_id)
    async for output in stream:
        found.token_ids += output.token_ids
        found.text += output.text or ""
        found.num_tokens += output.num_tokens
        found.logprobs += output.logprobs
        found.prompt_logprobs = output.prompt_logprobs or found.prompt_logprobs
        found.num_cached_tokens = max(found.num_cached_tokens, output.num_cached_tokens)
        found.finish_reason, found.error = output.finish_reason, output.error
    return found
