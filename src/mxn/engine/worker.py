"""The replica process: loads one model through one backend and runs its engine until told to stop.

Started as `python -m mxn.engine.worker FD`, where FD is its end of a socket pair, so nothing listens anywhere and the
process ends when the gateway does; or as `... --door FD SECONDS`, where FD is a Unix socket at which gateways come in,
one after another, and the model stays loaded for so long without one.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from mxn.backends.base import Backend, Embedder, Executor, PagedKV
from mxn.backends.host import peak_resident_bytes
from mxn.backends.registry import load_backend
from mxn.config.environment import log_level
from mxn.core.request import FinishReason, SequenceOutput
from mxn.energy.attribution import StepLedger
from mxn.energy.reader import NullReader
from mxn.energy.together import together
from mxn.energy.window import PROVENANCE
from mxn.engine.channel import ChannelError, ReplicaChannel
from mxn.engine.door import Door
from mxn.engine.embedding import BatchLimits, EmbeddingEngine
from mxn.engine.engine import Engine, EngineSettings
from mxn.engine.heartbeat import Heartbeat
from mxn.engine.messages import (
    ALIVE_S,
    Abort,
    BlocksChanged,
    ChangeShare,
    ChipLost,
    Load,
    LoadFailed,
    LoadPhase,
    Prepare,
    Ready,
    ReplicaInfo,
    ReportBlocks,
    ResetPrefixCache,
    Start,
    StepDone,
    Stop,
    ToGateway,
    ToReplica,
)
from mxn.errors import ChipError, MxnError, RequestError, ServerDiedError

if TYPE_CHECKING:
    from mxn.engine.proxy.replica import ServerReplica

log = logging.getLogger("mxn.worker")

EXIT_CHIP_LOST = 3
EXIT_LOAD_FAILED = 4
EXIT_SERVER_DIED = 5

IDLE_REPORT_S = 5.0
"""How often an idle replica books its chip's energy and reports it."""


class Inbox:
    """Messages from the gateway, filled by a reader thread. None means that the gateway is gone."""

    def __init__(self, channel: ReplicaChannel) -> None:
        self._messages: deque[ToReplica | None] = deque()
        self._arrived = threading.Event()
        self._channel = channel
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, *, wait: bool, at_most_s: float | None = None) -> list[ToReplica | None]:
        """All messages so far; blocks for the first one when `wait`, for `at_most_s` seconds if given."""
        if wait:
            self._arrived.wait(at_most_s)
        self._arrived.clear()
        taken = []
        while self._messages:
            taken.append(self._messages.popleft())
        return taken

    def _read(self) -> None:
        message: ToReplica | None = None
        while True:
            try:
                message = self._channel.receive()
            except (ChannelError, OSError) as error:
                log.error("connection to the gateway lost: %s", error)
                message = None
            self._messages.append(message)
            self._arrived.set()
            if message is None:
                return


def run(channel: ReplicaChannel, door: Door | None = None) -> int:
    """Serves one replica; returns the exit code.

    door: where another gateway may come in when this one has gone; without one the replica ends with its gateway.
    """
    first = channel.receive()
    if isinstance(first, Prepare):
        _import_ahead(first.backend)
        first = channel.receive()
    if not isinstance(first, Load):
        return 0  # the gateway left before it said what to load
    try:
        runner, info = _load(first, channel, door)
    except MxnError as error:
        channel.send(LoadFailed(type(error).__name__, str(error)))
        return EXIT_LOAD_FAILED
    except Exception as error:
        log.exception("loading failed")
        channel.send(LoadFailed(type(error).__name__, f"loading failed: {type(error).__name__}: {error}"))
        return EXIT_LOAD_FAILED
    gateway: ReplicaChannel | None = channel
    try:
        while gateway is not None:
            channel = gateway
            if _serve_gateway(runner, info, channel) or door is None:
                return 0
            channel.close()
            runner.abort_all()
            gateway = door.next_gateway(first)
        return 0
    except ServerDiedError as error:
        log.critical("%s", error)
        return EXIT_SERVER_DIED
    except ChipError as error:
        log.critical("chip lost: %s", error)
        with suppress(OSError):  # the gateway may be gone too
            channel.send(ChipLost(f"chip lost: {error}"))
        return EXIT_CHIP_LOST
    finally:
        runner.close()


def _serve_gateway(
    runner: Engine | EmbeddingEngine | ServerReplica, info: ReplicaInfo, channel: ReplicaChannel
) -> bool:
    """Serves until the gateway says to stop, which is True, or is gone."""
    try:
        channel.send(Ready(info))
        with Heartbeat(channel):
            if isinstance(runner, Engine | EmbeddingEngine):
                channel.send(StepDone([], runner.stats))
                return _serve(runner, Inbox(channel), channel)
            return runner.serve(channel)
    except (ChannelError, OSError) as error:
        log.error("connection to the gateway lost: %s", error)
        return False


def _load(
    message: Load, channel: ReplicaChannel, door: Door | None
) -> tuple[Engine | EmbeddingEngine | ServerReplica, ReplicaInfo]:
    seconds: dict[str, float] = {}
    last = time.monotonic()

    def progress(phase: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[phase] = seconds.get(phase, 0.0) + now - last
        last = now
        tell(LoadPhase(phase, fraction))

    def tell(message: ToGateway) -> None:
        try:
            channel.send(message)
        except OSError:
            if door is None:
                raise  # otherwise another gateway may want the model once it is loaded

    progress("start", 1.0)
    settings = message.settings
    backend = load_backend(message.backend)
    if type(backend).serve is not Backend.serve:
        from mxn.engine.proxy.replica import ServerReplica  # brings an HTTP client that no other replica needs

        is_wanted = partial(_is_wanted, channel, door)
        return ServerReplica.start(backend, message, is_wanted, progress, seconds)
    loaded = backend.load(message.model, settings, message.chips, progress)
    progress("load", 1.0)
    progress("warm-up", 0.0)
    warm_up = loaded.warm_up()
    progress("warm-up", 1.0)
    log.info("warmed up in %.2f s: %s", warm_up.seconds, ", ".join(warm_up.compiled) or "nothing to compile")
    power = together([backend.power(chip) for chip in message.chips])
    log.info("energy of requests: %s (%s)", power.name, power.detail)
    ledger = None if isinstance(power, NullReader) else StepLedger(power, chip_share=message.chip_share)
    progress("power", 1.0)
    described = _describe(message, loaded, seconds)
    described.power_source, described.power_provenance = power.name, PROVENANCE[power.kind]
    described.memory_bytes = backend.memory_used(message.chips[0], os.getpid()).value
    described.load_peak_bytes = peak_resident_bytes() if message.chips[0].uid.startswith("cpu") else None
    if isinstance(loaded, Embedder):
        limits = BatchLimits(max_num_seqs=settings.max_num_seqs, max_step_tokens=settings.max_step_tokens)
        described.dimensions = loaded.dimensions
        return EmbeddingEngine(loaded, limits, ledger=ledger), described
    fingerprint = f"{message.model.revision}/{message.backend}/{loaded.info.quantisation}/{loaded.info.attention}"
    engine = Engine(
        loaded,
        EngineSettings(
            max_num_seqs=settings.max_num_seqs,
            max_step_tokens=settings.max_step_tokens,
            prefix_cache=settings.prefix_cache,
            fingerprint=fingerprint,
            has_mixed_steps=backend.capabilities(message.chips[0]).has_mixed_steps,
        ),
        ledger=ledger,
    )
    described.num_blocks, described.block_size = engine.stats.num_total_blocks, engine.placement.room_tokens
    described.max_context, described.can_continue = engine.max_context, True
    if isinstance(loaded.kv, PagedKV) and settings.prefix_cache:
        described.prefix_fingerprint = fingerprint
    return engine, described


def _describe(message: Load, loaded: Executor | Embedder, load_s: dict[str, float]) -> ReplicaInfo:
    info = loaded.info
    return ReplicaInfo(
        pid=os.getpid(),
        backend=message.backend,
        attention=info.attention,
        quantisation=info.quantisation,
        device=info.device,
        threads=info.threads,
        weight_bytes=info.weight_bytes,
        kv_bytes=info.kv_bytes,
        num_blocks=0,
        block_size=0,
        max_context=info.max_context,
        vocab_size=info.vocab_size,
        program=info.program,
        notes=list(info.notes),
        load_s={phase: round(s, 4) for phase, s in load_s.items()},
    )


def _serve(engine: Engine | EmbeddingEngine, inbox: Inbox, channel: ReplicaChannel) -> bool:
    """Runs the engine until told to stop, which is True, or until the gateway is gone."""
    is_stopping, reported_s = False, time.monotonic()
    while True:
        outputs: list[SequenceOutput] = []
        is_idle = not engine.has_work and not is_stopping
        messages = inbox.take(wait=is_idle, at_most_s=IDLE_REPORT_S)
        if is_idle:
            engine.settle_energy()
        for message in messages:
            if message is None:
                return False
            if isinstance(message, Stop):
                is_stopping = True
            else:
                outputs += _handle(engine, message)
        outputs += engine.step()
        now_s = time.monotonic()
        if outputs or not engine.has_work or now_s - reported_s > ALIVE_S:
            channel.send(StepDone(outputs, engine.stats))
            reported_s = now_s
        if isinstance(engine, Engine) and (changes := engine.placement.take_changes()):
            channel.send(BlocksChanged(*changes))
        if is_stopping and not engine.has_work:
            return True


def _handle(engine: Engine | EmbeddingEngine, message: ToReplica) -> list[SequenceOutput]:
    if isinstance(message, Start):
        try:
            engine.add(message.request)
        except RequestError as error:
            seq_id = message.request.seq_id
            return [SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ERROR, error=str(error))]
    elif isinstance(message, Abort):
        return engine.abort(message.seq_ids)
    elif isinstance(message, ResetPrefixCache) and isinstance(engine, Engine):
        engine.reset_prefix_cache()
    elif isinstance(message, ChangeShare):
        engine.change_share(message.chip_share)
    elif isinstance(message, ReportBlocks) and isinstance(engine, Engine):
        engine.placement.report_changes()
    return []


def _import_ahead(name: str) -> None:
    try:
        load_backend(name).import_ahead()
    except Exception as error:  # told when a model is to be loaded, should it matter then
        log.warning("imports ahead of a model failed: %s: %s", type(error).__name__, error)


def _is_wanted(channel: ReplicaChannel, door: Door | None) -> bool:
    """False once nobody waits for the model to be loaded."""
    return door is not None or not channel.receive_ready()


def _log_level() -> int:
    """What a replica tells: its own notes, and at "debug" all that the gateway would show."""
    return logging.DEBUG if log_level() == "debug" else logging.INFO


def main() -> None:
    """Entry point of the replica process."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.basicConfig(stream=sys.stderr, level=_log_level(), format="%(levelname)s %(name)s: %(message)s")
    if sys.argv[1] != "--door":
        sys.exit(run(ReplicaChannel(socket.socket(fileno=int(sys.argv[1])))))
    door = Door(socket.socket(fileno=int(sys.argv[2])), float(sys.argv[3]))
    channel = door.open()
    sys.exit(0 if channel is None else run(channel, door))


if __name__ == "__main__":
    main()
