"""One deployment: a model behind one `submit`, whatever replicas serve it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

from mxn.core.chip import Chip
from mxn.core.model import Model
from mxn.core.request import SamplingParams, SequenceOutput, SequenceRequest
from mxn.engine.messages import ReplicaInfo, ReplicaState
from mxn.engine.stats import EngineStats
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import BackendError, OverloadedError, RequestError, UnavailableError
from mxn.fleet.dispatch import Dispatch, Weighed
from mxn.fleet.keeper import Keeper
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.relay import RelayedStream
from mxn.fleet.spec import DeploymentSpec, PlacementSpec

_BEST_FIRST: tuple[ReplicaState, ...] = ("ready", "loading", "starting", "failed", "draining", "stopped")
_DRAIN_TICK_S = 0.05


class Deployment:
    """A model's replicas, and sequences on their way to them.

    Replicas come and go by `add` and `remove`; `spec.placements` says which there should be, and whoever starts the
    deployment adds them. What is asked of "the deployment" (info, stats, limits) is made of the replicas that are
    ready.
    trouble: why it has fewer replicas than it should, in a person's words; empty when it has what it should have.
    on_chip_lost, on_change: passed on to every keeper.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        tokenizer: Tokenizer,
        launcher: Launcher | None = None,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_chip_lost: Callable[[PlacementSpec, str], None] = lambda placement, reason: None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.created_s = int(time.time())
        self.on_demand: Callable[[], None] | None = None
        self._launcher = launcher or LocalLauncher()
        self._tell_change = on_change
        self._on_chip_lost = on_chip_lost
        self.trouble = ""
        self._is_recovering = False
        self._keepers: dict[str, Keeper] = {}
        self._ending: ReplicaState | None = None
        self._num_past_restarts = 0
        self._changed = asyncio.Event()
        self._infos: list[ReplicaInfo] = []
        self._dispatch = Dispatch(spec, self._keepers.values, lambda: self.accepts)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def model(self) -> Model:
        return self.spec.model

    @property
    def keepers(self) -> list[Keeper]:
        """Those of the placements that were added and not removed, in order."""
        return list(self._keepers.values())

    # ------------------------------------------------------------------ all replicas as one

    @property
    def state(self) -> ReplicaState:
        """The best state that a replica is in; what comes first in ready, loading, starting, failed."""
        if self._ending is not None:
            return self._ending
        states = {keeper.state for keeper in self._keepers.values()}
        if not states and self.trouble:
            return "failed"
        if not states and self.spec.is_on_demand:
            return "unloaded"
        return next((state for state in _BEST_FIRST if state in states), "starting")

    @property
    def reason(self) -> str:
        """Why it is not ready, in a person's words."""
        keeper = self._telling
        return (keeper.reason if keeper is not None else "") or self.trouble

    @property
    def load_phase(self) -> str:
        """What the replica that is furthest is loading."""
        keeper = self._telling
        return keeper.load_phase if keeper is not None else ""

    @property
    def load_fraction(self) -> float:
        """How much of `load_phase` is done."""
        keeper = self._telling
        return keeper.load_fraction if keeper is not None else 0.0

    @property
    def num_restarts(self) -> int:
        return self._num_past_restarts + sum(keeper.num_restarts for keeper in self._keepers.values())

    @property
    def is_ready(self) -> bool:
        """True when requests are served: a replica is ready."""
        return self._ending is None and any(keeper.is_ready for keeper in self._keepers.values())

    @property
    def is_stalled(self) -> bool:
        """True when no replica is ready and one holds work without a step."""
        return not self.is_ready and any(keeper.is_stalled for keeper in self._keepers.values())

    @property
    def infos(self) -> list[ReplicaInfo]:
        """What the ready replicas run and how; of those that were ready last when none is."""
        return self._infos

    @property
    def info(self) -> ReplicaInfo | None:
        """The first of `infos`; None until a replica has been ready."""
        return self._infos[0] if self._infos else None

    @property
    def stats(self) -> EngineStats:
        """The sum of the engines' gauges and counters after their newest steps."""
        return EngineStats.total([keeper.replica.stats for keeper in self._keepers.values() if keeper.replica])

    @property
    def backend(self) -> str:
        """The backends of its replicas, each named once."""
        return "+".join(dict.fromkeys(placement.backend for placement in self._placements))

    @property
    def chips(self) -> list[Chip]:
        """The chips of its replicas, each once."""
        return list({chip.uid: chip for placement in self._placements for chip in placement.chips}.values())

    @property
    def max_num_seqs(self) -> int:
        """Sequences that may take part in steps at once, on the ready replicas together."""
        ready = [keeper for keeper in self._keepers.values() if keeper.is_ready]
        return sum(keeper.placement.settings.max_num_seqs for keeper in ready)

    @property
    def max_context(self) -> int:
        """Prompt + output tokens a sequence may have: what every replica can hold."""
        limit = self.model.spec.max_context
        if self._infos:
            return min(info.max_context for info in self._infos)
        return min((p.settings.context_length or limit for p in self._placements), default=limit)

    @property
    def refused(self) -> list[str]:
        """Request fields that a replica cannot serve, by the names of the API."""
        return sorted({field for info in self._infos for field in info.refused})

    # ------------------------------------------------------------------ sequences

    @property
    def accepts(self) -> bool:
        """True when requests are served, or may wait because they soon will be: a replica that served is being started
        again, one is sought for it elsewhere (`recover`), or `on_demand` is set."""
        if self._ending is not None:
            return False
        is_expected = self.on_demand is not None or self._is_recovering
        return self.is_ready or is_expected or any(k.is_coming_back for k in self._keepers.values())

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a replica to have room."""
        return self._dispatch.num_waiting

    @property
    def num_moves(self) -> int:
        """Sequences that lost their replica and went to look for another, so far."""
        return self._dispatch.num_moves

    def check_line(self, priority: int) -> None:
        """Raises what `submit` would raise now because of the line, so that nobody works on a request in vain."""
        self._dispatch.check(priority)

    def submit(
        self, prompt_token_ids: list[int], sampling: SamplingParams, *, cache_salt: str = "", priority: int = 0
    ) -> RelayedStream:
        """Begins a sequence, or puts it in line: lower priorities are served first, then those that came first.

        Raises: UnavailableError when nothing can serve it, OverloadedError when the line is full or too slow,
        RequestError when it can never be served.
        """
        if len(prompt_token_ids) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens, this model serves at most {self.max_context} "
                "including at least one of output; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        is_drawn = sampling.seed is None and not sampling.is_greedy
        return self._begin(
            SequenceRequest(
                seq_id=self._dispatch.new_seq_id(),
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                cache_salt=cache_salt,
                priority=priority,
                fallback_seed=random.getrandbits(63) if is_drawn else None,
            )
        )

    def weigh(self, prompt_token_ids: list[int], sampling: SamplingParams, *, cache_salt: str = "") -> list[Weighed]:
        """How the router sees every ready replica for such a sequence now. Begins nothing."""
        return self._dispatch.weigh(
            SequenceRequest(seq_id=0, prompt_token_ids=prompt_token_ids, sampling=sampling, cache_salt=cache_salt)
        )

    async def embed(self, texts: Sequence[list[int]], *, max_open: int) -> list[SequenceOutput]:
        """One output with a vector per text, in order. At most `max_open` texts are in line at once, others follow.

        The texts have passed the front door's checks.
        Raises: UnavailableError, OverloadedError as `submit`; BackendError naming a text that has no vector.
        """
        streams: deque[RelayedStream] = deque()
        outputs: list[SequenceOutput] = []
        num_begun = 0
        try:
            while len(outputs) < len(texts):
                while num_begun < len(texts) and len(streams) < max_open:
                    try:
                        request = SequenceRequest(seq_id=self._dispatch.new_seq_id(), prompt_token_ids=texts[num_begun])
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
        for keeper in self._keepers.values():
            if keeper.replica is not None:
                keeper.replica.reset_prefix_cache()

    # ------------------------------------------------------------------ life

    def add(self, placement: PlacementSpec) -> Keeper:
        """Begins to run a replica there; `Keeper.wait_until_settled` tells how it went."""
        if placement.id in self._keepers:
            raise ValueError(f"{placement.id} is there already")
        self._ending = None
        keeper = Keeper(
            self.spec, placement, self._launcher, on_change=self._on_change, on_chip_lost=self._on_chip_lost
        )
        self._keepers[placement.id] = keeper
        keeper.start()
        return keeper

    async def remove(self, placement_id: str, drain_s: float) -> None:
        """Drains a replica for at most `drain_s` seconds and ends it; the others serve on."""
        keeper = self._keepers[placement_id]
        await keeper.stop(drain_s)
        self._keepers.pop(placement_id, None)
        self._num_past_restarts += keeper.num_restarts
        self._on_change()

    async def wait_until_settled(self) -> None:
        """Returns when a replica is ready. Raises: BackendError with the reason when none is on the way to be."""
        while not self.is_ready and not all(keeper.is_settled for keeper in self._keepers.values()):
            await self._changed.wait()
        if not self.is_ready:
            raise BackendError(self.reason or f'deployment "{self.name}" is {self.state}')

    def change_to(self, spec: DeploymentSpec, on_demand: Callable[[], None] | None) -> None:
        """Goes by another specification of the same model from now on.

        on_demand: called when a sequence comes and nothing is ready; with it sequences may wait though nothing is.
        """
        self.spec = self._dispatch.spec = spec
        if (self.on_demand is None) != (on_demand is None):
            self.on_demand = on_demand
            self._on_change()

    def recover(self, is_recovering: bool) -> None:
        """Says that another place is sought for a replica that was lost, or that this has come to an end.

        Until then sequences may wait though nothing is ready.
        """
        if self._is_recovering != is_recovering:
            self._is_recovering = is_recovering
            self._on_change()

    @property
    def is_recovering(self) -> bool:
        """True while another place is sought for a replica that was lost."""
        return self._is_recovering

    def drain(self) -> None:
        """Takes no new sequences from now on; those that are in line are still served."""
        if self._ending is None:
            self._ending = "draining"

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s` seconds and ends all replicas. `add` begins again."""
        self.drain()
        end_s = time.monotonic() + drain_s
        while self._dispatch.num_waiting and time.monotonic() < end_s:
            await asyncio.sleep(_DRAIN_TICK_S)
        self._dispatch.refuse_all(f'model "{self.name}" is shutting down')
        left_s = max(0.0, end_s - time.monotonic())
        await asyncio.gather(*(keeper.stop(left_s) for keeper in self._keepers.values()))
        self._ending = "stopped"

    def _begin(self, request: SequenceRequest) -> RelayedStream:
        if self._ending is not None:
            raise UnavailableError(f'model "{self.name}" cannot serve now: it is shutting down')
        if self.on_demand is not None and not self.is_ready:
            self.on_demand()
        return self._dispatch.submit(request)

    @property
    def _placements(self) -> Sequence[PlacementSpec]:
        return [keeper.placement for keeper in self._keepers.values()] or self.spec.placements

    @property
    def _telling(self) -> Keeper | None:
        """The keeper that speaks for all: the one that is furthest."""
        return min(self._keepers.values(), key=lambda keeper: _BEST_FIRST.index(keeper.state), default=None)

    def _on_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        replicas = [(keeper.is_ready, keeper.replica.info) for keeper in self._keepers.values() if keeper.replica]
        infos = [(is_ready, info) for is_ready, info in replicas if info is not None]
        self._infos = [info for is_ready, info in infos if is_ready] or [info for _, info in infos]
        self._dispatch.refresh()
        self._tell_change()


async def _vector_of(stream: RelayedStream, index: int) -> SequenceOutput:
    """The one output of text number `index`. Raises: MxnError when it holds no vector."""
    async for output in stream:
        if output.error is not None:
            raise BackendError(f"input {index}: {output.error}")
        if output.vector is not None:
            return output
    raise UnavailableError(f"the server ended this request before input {index} was embedded", retry_after_s=1.0)
