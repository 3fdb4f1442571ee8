"""One deployment: a model, how it is to be served, and the replica that does so, restarted when it dies."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import SamplingParams, SequenceOutput, SequenceRequest
from mxn.engine.messages import Load, ReplicaInfo, ReplicaState
from mxn.engine.stats import EngineStats
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import BackendError, MxnError, OverloadedError, ReplicaDiedError, RequestError, UnavailableError
from mxn.fleet.replica import Replica, SequenceStream

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentSpec:
    """What a deployment should be.

    max_queue: sequences that may wait beside those that run; more are refused with 429.
    stall_s: a replica that holds work and reports nothing for so long is no longer ready.
    chip_share: the share of its chips' energy that it answers for, when other deployments run on them too.
    restart_delays_s: waits before each restart in a row; after the last one the deployment stays failed.
    """

    name: str
    model: Model
    backend: str
    chips: Sequence[Chip]
    settings: LoadSettings = field(default_factory=LoadSettings)
    max_queue: int = 256
    stall_s: float = 60.0
    restart_delays_s: tuple[float, ...] = (0.0, 1.0, 5.0, 20.0)
    environment: dict[str, str] = field(default_factory=dict)
    chip_share: float = 1.0


class Deployment:
    """Keeps one replica running and lets sequences in.

    state: starting -> loading -> ready -> (draining -> stopped | loading again after a crash | failed).
    reason: why it is not ready, in a person's words. load_phase, load_fraction: progress while loading.
    """

    def __init__(self, spec: DeploymentSpec, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.state: ReplicaState = "starting"
        self.reason = ""
        self.load_phase = ""
        self.load_fraction = 0.0
        self.num_restarts = 0
        self.created_s = int(time.time())
        self._replica: Replica | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._seq_ids = itertools.count(1)
        self._finish_times: deque[float] = deque(maxlen=64)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def model(self) -> Model:
        return self.spec.model

    @property
    def settings(self) -> LoadSettings:
        return self.spec.settings

    @property
    def backend(self) -> str:
        return self.spec.backend

    @property
    def chips(self) -> list[Chip]:
        return list(self.spec.chips)

    @property
    def info(self) -> ReplicaInfo | None:
        """What the replica runs; None until it has been ready once."""
        return self._replica.info if self._replica else None

    @property
    def stats(self) -> EngineStats:
        """The engine's gauges and counters after its newest step."""
        return self._replica.stats if self._replica else EngineStats()

    @property
    def is_stalled(self) -> bool:
        """True when the replica holds work and has reported no step for `stall_s`."""
        replica = self._replica
        if replica is None or not replica.num_streams:
            return False
        return time.monotonic() - replica.last_message_s > self.spec.stall_s

    @property
    def is_ready(self) -> bool:
        """True when requests are served: loaded, not draining, and idle or making progress."""
        replica = self._replica
        return self.state == "ready" and replica is not None and not replica.ended.is_set() and not self.is_stalled

    @property
    def max_context(self) -> int:
        """Prompt + output tokens a sequence may have."""
        if self.info is not None:
            return self.info.max_context
        return min(self.settings.context_length or self.model.spec.max_context, self.model.spec.max_context)

    def submit(
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, cache_salt: str = "", priority: int = 0
    ) -> SequenceStream:
        """Begins a sequence.

        Raises: UnavailableError when nothing can serve it now, OverloadedError when the queue is full, RequestError
        when it can never be served.
        """
        if len(prompt_token_ids) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens, this model serves at most {self.max_context} "
                "including at least one of output; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        return self._begin(
            SequenceRequest(
                seq_id=next(self._seq_ids),
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                cache_salt=cache_salt,
                priority=priority,
            )
        )

    async def embed(self, texts: Sequence[list[int]], *, max_open: int) -> list[SequenceOutput]:
        """One output with a vector per text, in order. At most `max_open` texts are in line at once, others follow.

        The texts have passed the front door's checks.
        Raises: UnavailableError, OverloadedError as `submit`; BackendError naming a text that has no vector.
        """
        streams: deque[SequenceStream] = deque()
        outputs: list[SequenceOutput] = []
        num_begun = 0
        try:
            while len(outputs) < len(texts):
                while num_begun < len(texts) and len(streams) < max_open:
                    try:
                        request = SequenceRequest(seq_id=next(self._seq_ids), prompt_token_ids=texts[num_begun])
                        streams.append(self._begin(request))
                    except OverloadedError:
                        if not streams:
                            raise
                        break  # others fill the line: go on when one of ours has left it
                    num_begun += 1
                outputs.append(await _vector_of(streams[0], len(outputs)))
                streams.popleft()
        finally:
            for stream in streams:
                stream.abort()
        return outputs

    async def reset_prefix_cache(self) -> None:
        """Forgets cached prefixes, for measurements without reuse."""
        if self._replica is not None:
            self._replica.reset_prefix_cache()

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Starts loading in the background; `wait_until_settled` tells how it went."""
        self._keeper = asyncio.create_task(self._keep_running())

    async def wait_until_settled(self) -> None:
        """Returns when the deployment is ready. Raises: BackendError with the reason when it failed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state in ("ready", "failed", "stopped"))
        if self.state != "ready":
            raise BackendError(self.reason or f'deployment "{self.name}" is {self.state}')

    async def drain(self) -> None:
        """Takes no new sequences from now on."""
        if self.state != "stopped":
            await self._set_state("draining", "it is shutting down")

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s` seconds and ends the replica."""
        was_ready = self.state in ("ready", "draining")
        await self.drain()
        if self._replica is not None and was_ready:
            await self._replica.stop(drain_s)
        if self._keeper is not None:
            self._keeper.cancel()  # a replica that is still loading is killed by this
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._set_state("stopped", "it was stopped")

    async def _keep_running(self) -> None:
        """Runs replicas one after another until told to stop or until too many in a row have died young."""
        has_been_ready, num_failures = False, 0
        while True:
            started_s = time.monotonic()
            try:
                await self._run_once()
                has_been_ready = True
            except MxnError as error:
                self.reason = str(error)
            if self.state == "draining":
                return
            log.error("deployment %s: %s", self.name, self.reason)
            if time.monotonic() - started_s > self.spec.stall_s:
                num_failures = 0
            if not has_been_ready or num_failures >= len(self.spec.restart_delays_s):
                await self._set_state("failed", self.reason)
                return
            await self._set_state("starting", self.reason)
            await asyncio.sleep(self.spec.restart_delays_s[num_failures])
            num_failures += 1
            self.num_restarts += 1

    async def _run_once(self) -> None:
        """Starts a replica and returns when it has ended. Raises: MxnError when it could not be started."""
        await self._set_state("loading", self.reason)
        load = Load(
            backend=self.backend,
            model=self.model,
            settings=self.settings,
            chips=list(self.spec.chips),
            max_waiting=self.spec.max_queue,
            chip_share=self.spec.chip_share,
        )
        started_s = time.monotonic()
        self._replica = await Replica.start(load, self._on_phase, self.spec.environment)
        log.info("deployment %s is ready after %.1f s", self.name, time.monotonic() - started_s)
        await self._set_state("ready", "")
        await self._replica.ended.wait()
        self.reason = self._replica.end_reason
        await self._replica.kill()

    def _begin(self, request: SequenceRequest) -> SequenceStream:
        replica = self._replica
        if not self.is_ready or replica is None:
            why = self.reason or ("the replica is stalled" if self.is_stalled else f"it is {self.state}")
            raise UnavailableError(f'model "{self.name}" cannot serve now: {why}')
        limit = self.settings.max_num_seqs + self.spec.max_queue
        if replica.num_streams >= limit:
            raise OverloadedError(
                f'model "{self.name}" has {replica.num_streams} sequences in line, the limit is {limit}; retry later',
                retry_after_s=self._retry_after_s(replica),
            )
        try:
            return replica.submit(request)
        except ReplicaDiedError as error:
            raise UnavailableError(f'model "{self.name}" cannot serve now: {error}') from error

    def _on_phase(self, phase: str, fraction: float) -> None:
        self.load_phase, self.load_fraction = phase, fraction

    async def _set_state(self, state: ReplicaState, reason: str) -> None:
        async with self._changed:
            self.state, self.reason = state, reason
            self._changed.notify_all()

    def _retry_after_s(self, replica: Replica) -> float:
        """Seconds until about half of the line has been served, judged by what the engine finished so far."""
        stats = replica.stats
        if not stats.num_finished or not stats.busy_s:
            return 1.0
        return min(60.0, math.ceil(0.5 * replica.num_streams * stats.busy_s / stats.num_finished))


async def _vector_of(stream: SequenceStream, index: int) -> SequenceOutput:
    """The one output of text number `index`. Raises: MxnError when it holds no vector."""
    async for output in stream:
        if output.error is not None:
            raise BackendError(f"input {index}: {output.error}")
        if output.vector is not None:
            return output
    raise UnavailableError(f"the server ended this request before input {index} was embedded", retry_after_s=1.0)
