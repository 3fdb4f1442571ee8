"""Replicas that run nowhere: they load, hold memory and end as a test tells them to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mxn.core.request import FinishReason, SequenceOutput, SequenceRequest
from mxn.engine.messages import Load, ReplicaInfo
from mxn.engine.stats import EngineStats
from mxn.errors import BackendError, ReplicaDiedError
from mxn.fleet.stream import SequenceStream


class ScriptedReplica:
    """A `RunningReplica` that answers nothing by itself. load: what it was started for."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.info: ReplicaInfo | None = ReplicaInfo(
            pid=0,
            backend=load.backend,
            attention="none",
            quantisation="none",
            device="none",
            threads=None,
            weight_bytes=0,
            kv_bytes=0,
            num_blocks=0,
            block_size=0,
            max_context=2048,
            vocab_size=259,
            notes=[],
            load_s={},
        )
        self.stats = EngineStats()
        self.last_message_s = self.last_step_s = time.monotonic()
        self.ended = asyncio.Event()
        self.end_reason = ""
        self.has_lost_chip = False
        self.streams: dict[int, SequenceStream] = {}
        self.stopping = asyncio.Event()

    @property
    def num_streams(self) -> int:
        return len(self.streams)

    def submit(self, request: SequenceRequest) -> SequenceStream:
        if self.ended.is_set():
            raise ReplicaDiedError(self.end_reason)
        stream = self.streams[request.seq_id] = SequenceStream(request.seq_id, lambda seq_id: False)
        return stream

    def finish(self) -> None:
        """Ends all its sequences."""
        streams, self.streams = self.streams, {}
        self.stats.num_finished += len(streams)
        for seq_id, stream in streams.items():
            stream.push(SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.STOP))

    def end(self, reason: str, *, chip_lost: bool = False) -> None:
        """What a crash does."""
        if not self.ended.is_set():
            self.end_reason, self.has_lost_chip = reason, chip_lost
            self.ended.set()
            for stream in self.streams.values():
                stream.fail(ReplicaDiedError(reason))

    def reset_prefix_cache(self) -> None:
        pass

    def watch_blocks(self, listener: Callable[[bytes, bytes], None]) -> None:
        pass

    async def stop(self, timeout_s: float) -> None:
        self.stopping.set()
        deadline_s = time.monotonic() + timeout_s
        while self.streams and time.monotonic() < deadline_s:
            await asyncio.sleep(0.005)
        await self.kill()

    async def kill(self) -> None:
        self.end("the replica was stopped")


@dataclass
class ScriptedLauncher:
    """A `Launcher` of scripted replicas.

    memory_bytes: of each chip; a replica takes its settings' `kv_bytes`, and one that finds no room breaks the test.
    load_s: how long loading takes. failing: names of models that cannot be loaded. log: ("start" | "ready", model).
    """

    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    load_s: float = 0.0
    failing: set[str] = field(default_factory=set)
    started: list[ScriptedReplica] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)

    @property
    def alive(self) -> list[ScriptedReplica]:
        """Replicas that have not ended."""
        return [replica for replica in self.started if not replica.ended.is_set()]

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> ScriptedReplica:
        replica = ScriptedReplica(load)
        self.started.append(replica)
        self.log.append(("start", load.model.name))
        for chip in load.chips:
            on_it = [one for one in self.alive if chip.uid in {other.uid for other in one.load.chips}]
            taken = sum(one.load.settings.kv_bytes or 0 for one in on_it)
            if taken > self.memory_bytes.get(chip.uid, taken):
                raise AssertionError(f"{chip.uid} is promised {taken} bytes, it has {self.memory_bytes[chip.uid]}")
            loading = [one for one in on_it if one is not replica and one in self._loading]
            if loading:
                raise AssertionError(f"two replicas load on {chip.uid} at once")
        self._loading.append(replica)
        try:
            on_phase("weights", 0.5)
            await asyncio.sleep(self.load_s)
            if load.model.name in self.failing:
                raise BackendError(f"{load.model.name}: no such weights")
        except BaseException:
            replica.end("it never ran")
            raise
        finally:
            self._loading.remove(replica)
        self.log.append(("ready", load.model.name))
        return replica

    _loading: list[ScriptedReplica] = field(default_factory=list)
