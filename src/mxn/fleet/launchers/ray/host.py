"""A replica of Ray Serve: one of mxn's own replica processes, spoken to by any number of gateways.

A gateway opens one stream per replica. It carries the frames that the replica process itself would send, for all
sequences of that gateway together, so that Ray's cost is paid once per step and not once per token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import ray
from ray import serve

from mxn.backends.host import usable_cores
from mxn.backends.registry import load_backend
from mxn.core.request import FinishReason, SequenceOutput
from mxn.engine.channel import messages_of, pack
from mxn.engine.messages import (
    ALIVE_S,
    Abort,
    Alive,
    BlocksChanged,
    ChipLost,
    Load,
    Ready,
    ReportBlocks,
    ResetPrefixCache,
    Start,
    StepDone,
    Stop,
    ToGateway,
)
from mxn.engine.prefix_cache import HEAD_BYTES
from mxn.errors import BackendError, ReplicaDiedError, UnavailableError
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.launchers.ray.group import ReplicaGroup, Welcome
from mxn.fleet.launchers.ray.lease import ChipLease
from mxn.fleet.launchers.ray.scaling import LatencyWindow
from mxn.fleet.ray_inventory import NODE_LABEL
from mxn.fleet.replica import Replica
from mxn.fleet.stream import SequenceStream

log = logging.getLogger(__name__)

_REPORT_S = ALIVE_S / 2
"""How often a gateway hears of a replica that has nothing for it."""

_HUNG_S = 4 * ALIVE_S
"""Silence of a process after which it is taken for hung, and ended."""

_LAST_WORDS_S = 0.5
"""Time that gateways get to hear why a replica ended before its actor does, too."""


class ReplicaHost:
    """What Serve starts, checks, scales and stops. Its replica process ends with it, kill -9 included.

    group: a `ReplicaGroup` as msgspec's builtins, since Serve keeps it.
    """

    _watch: asyncio.Task[None] | None = None

    async def __init__(self, group: dict[str, object]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._group = msgspec.convert(group, ReplicaGroup)
        self._gateways: dict[str, _Gateway] = {}
        self._seq_ids = itertools.count(1)
        self._latencies = LatencyWindow(self._group.ttft_s, self._group.tpot_s)
        context = ray.get_runtime_context()
        load, self._lease = await asyncio.to_thread(_prepare, self._group, context.get_node_id())
        self._replica = await LocalLauncher().start(load, _log_phase, _variables(self._group))
        if self._replica.info is not None:
            chips = ", ".join(chip.uid for chip in load.chips)
            self._replica.info.notes.append(f"node {_node_name(context)}, chips {chips}")
        self._blocks: set[bytes] = set()
        self._replica.watch_blocks(self._note_blocks)
        welcome = Welcome(serve.get_replica_context().replica_id.unique_id, os.getpid(), _node_name(context))
        self._welcome = msgspec.msgpack.encode(welcome)
        self._watch = asyncio.create_task(self._end_with_replica())

    async def connect(self, taken: list[str], name: str) -> AsyncIterator[bytes]:
        """A `Welcome`, then what the sequences of one gateway bring, as frames joined; the first is `Ready`.

        taken: replicas that the gateway has already, which `AddressedRouter` avoids.
        Ends after `Stop`, once the gateway's last sequence has. Raises: ReplicaDiedError when the process has ended.
        """
        gateway = self._gateways[name] = _Gateway()
        replica = self._replica
        ticking = asyncio.create_task(gateway.tick(_REPORT_S))
        try:
            if replica.info is None:
                raise ReplicaDiedError(replica.end_reason)
            yield self._welcome
            yield pack(Ready(replica.info))
            while not gateway.is_done and not replica.ended.is_set():
                await gateway.wait()
                if frames := b"".join(pack(message) for message in gateway.take(replica)):
                    yield frames
            if replica.has_lost_chip:
                yield pack(ChipLost(replica.end_reason))
            if replica.ended.is_set():
                raise ReplicaDiedError(replica.end_reason)
        finally:
            ticking.cancel()
            self._gateways.pop(name, None)
            gateway.abort_all()

    async def send(self, address: str, name: str, frames: bytes) -> None:
        """What a gateway tells its replica, frames in order.

        address: this replica's id, which `AddressedRouter` goes by.
        """
        gateway = self._gateways.get(name)
        if gateway is None:
            raise UnavailableError(f"no gateway is connected to replica {address} under the name {name}")
        for message in messages_of(frames):
            if isinstance(message, Start):
                self._begin(gateway, message)
            elif isinstance(message, Abort):
                gateway.abort(message.seq_ids)
            elif isinstance(message, ResetPrefixCache):
                self._replica.reset_prefix_cache()
            elif isinstance(message, ReportBlocks):
                gateway.tell_blocks(b"".join(self._blocks), b"")
                gateway.wants_blocks = True
            elif isinstance(message, Stop):
                gateway.stop()

    def _note_blocks(self, stored: bytes, evicted: bytes) -> None:
        """Keeps what is held for gateways that come later, and tells those that are there."""
        for heads, change in ((stored, self._blocks.add), (evicted, self._blocks.discard)):
            for start in range(0, len(heads), HEAD_BYTES):
                change(heads[start : start + HEAD_BYTES])
        for gateway in self._gateways.values():
            if gateway.wants_blocks:
                gateway.tell_blocks(stored, evicted)

    def _begin(self, gateway: _Gateway, message: Start) -> None:
        theirs = message.request.seq_id
        try:
            stream = self._replica.submit(replace(message.request, seq_id=next(self._seq_ids)))
        except ReplicaDiedError:
            return  # the gateway hears of it by the end of its stream
        gateway.streams[theirs] = stream
        task = asyncio.create_task(self._forward(gateway, theirs, stream))
        gateway.tasks.add(task)
        task.add_done_callback(gateway.tasks.discard)

    async def _forward(self, gateway: _Gateway, seq_id: int, stream: SequenceStream) -> None:
        """Takes a sequence's outputs to its gateway; of one that was aborted the last, with its joules."""
        timing = self._latencies.begin()
        has_ended = False
        try:
            async for output in stream:
                timing.add(output.num_tokens)
                has_ended = output.finish_reason is not None
                gateway.put(replace(output, seq_id=seq_id))
            if not has_ended:
                joules = await stream.aborted_joules()
                gateway.put(SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ABORT, energy_j=joules))
        except ReplicaDiedError:
            pass
        finally:
            timing.end()
            del gateway.streams[seq_id]
            gateway.wake()

    # ------------------------------------------------------------------ what Serve asks

    def check_health(self) -> None:
        """Raises when the process has ended; Serve then starts another replica."""
        if self._replica.ended.is_set():
            raise ReplicaDiedError(self._replica.end_reason)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ScalingPolicy` goes by."""
        return {"sequences": float(self._replica.num_streams), "missed_share": self._latencies.missed_share()}

    async def _end_with_replica(self) -> None:
        """Ends the actor when its process has ended or hangs: Serve notices at once and starts another."""
        replica = self._replica
        silent_s, heard_s = 0.0, replica.last_message_s
        while not replica.ended.is_set() and silent_s < _HUNG_S:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.ended.wait(), _REPORT_S)
            # Counted in looks, so that a pause of this process is not taken for one of the other.
            silent_s = 0.0 if replica.last_message_s != heard_s else silent_s + _REPORT_S
            heard_s = replica.last_message_s
        if not replica.ended.is_set():
            log.error("%s: its process has been silent for %.0f s and is ended", self._group.app, _HUNG_S)
            await replica.kill()
        log.error("%s: %s", self._group.app, replica.end_reason)
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)

    async def __del__(self) -> None:  # Serve awaits it when it stops a replica
        if self._watch is None:
            return  # it never came up
        self._watch.cancel()
        await self._replica.stop(_LAST_WORDS_S)
        self._lease.release()


class _Gateway:
    """One gateway's connection: its sequences and the outputs that wait to be taken to it."""

    def __init__(self) -> None:
        self.streams: dict[int, SequenceStream] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.outputs: list[SequenceOutput] = []
        self.wants_blocks = False
        self._changes: list[BlocksChanged] = []
        self._told_s = 0.0
        self._is_stopping = False
        self._event = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """True when it will bring no more sequences and has been told all of those that it brought."""
        return self._is_stopping and not self.streams and not self.outputs

    def put(self, output: SequenceOutput) -> None:
        self.outputs.append(output)
        self._event.set()

    def take(self, replica: Replica) -> list[ToGateway]:
        """What there is to tell: blocks before the outputs that they came with, else that the process lives."""
        messages: list[ToGateway] = list(self._changes)
        self._changes.clear()
        if self.outputs or replica.last_step_s > self._told_s:
            messages.append(StepDone(self.outputs, replica.stats))
            self.outputs, self._told_s = [], replica.last_step_s
        elif not messages and time.monotonic() - replica.last_message_s < _HUNG_S / 2:
            messages.append(Alive())
        return messages

    def tell_blocks(self, stored: bytes, evicted: bytes) -> None:
        if stored or evicted:
            self._changes.append(BlocksChanged(stored, evicted))
            self._event.set()

    async def wait(self) -> None:
        """Returns when there is something to do."""
        await self._event.wait()
        self._event.clear()

    async def tick(self, period_s: float) -> None:
        """Makes `wait` return now and then although there is nothing. Costs less than a time limit on every wait."""
        while True:
            await asyncio.sleep(period_s)
            self._event.set()

    def wake(self) -> None:
        self._event.set()

    def stop(self) -> None:
        self._is_stopping = True
        self._event.set()

    def abort(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self.streams:
                self.streams[seq_id].abort()

    def abort_all(self) -> None:
        """Ends what a gateway left behind."""
        self.abort(list(self.streams))


def _prepare(group: ReplicaGroup, node: str) -> tuple[Load, ChipLease]:
    """The model's files on this node, and chips of it that nobody else uses."""
    from mxn.store.fetch import fetch

    model = fetch(group.model)
    backend = load_backend(group.backend)
    probe = backend.probe()
    if probe.state != "active":
        raise BackendError(f"{group.backend} is {probe.state} on this node: {probe.reason}")
    here = [chip for chip in backend.chips() if chip.kind in group.chip_names or chip.name in group.chip_names]
    lease = ChipLease.take(node, [chip.uid for chip in here], group.chips)
    load = Load(
        backend=group.backend,
        model=replace(model, name=group.deployment),
        settings=group.settings,
        chips=[chip for chip in here if chip.uid in lease.uids],
        max_waiting=group.max_queue,
        chip_share=min(1.0, group.chips),
    )
    return load, lease


def _variables(group: ReplicaGroup) -> dict[str, str]:
    """Ray gives its processes one OpenMP thread; the replica decides for itself how many of the cores it takes."""
    own = group.runtime_env.get("env_vars")
    return {"OMP_NUM_THREADS": str(usable_cores()), **(own if isinstance(own, dict) else {})}


def _node_name(context: Any) -> str:
    return str(context.get_node_labels().get(NODE_LABEL) or context.get_node_id()[:8])


def _log_phase(phase: str, fraction: float) -> None:
    if fraction >= 1.0:
        log.info("loading: %s", phase)
