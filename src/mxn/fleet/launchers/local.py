"""Starts replicas as processes of this machine: some end with this one, others can be taken over by the next gateway.

A child for good is joined by a socket pair: nothing listens anywhere. One that may outlive its gateway listens at a
Unix socket in a folder that only its user can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mxn.config.environment import child_environment
from mxn.engine.channel import pack
from mxn.engine.messages import Load, Prepare, Stop, load_key
from mxn.errors import BackendError, MxnError
from mxn.fleet.launchers.lasting import AdoptedProcess, LogTail, StartedProcess, connect, end_process
from mxn.fleet.replica import Replica, ReplicaLink
from mxn.fleet.state import ReplicaRecord, RuntimeFolder, process_start

log = logging.getLogger(__name__)

ENVIRONMENT = {
    # libgomp's caller otherwise spins for threads the system is not running; on two cores with a busy neighbour that
    # made steps of torch's own operators 10 to 20 times slower. It is read when torch is imported.
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that a process with an engine in it gets unless this process's own environment says otherwise."""

ADOPTION_S = 10.0
"""A replica that is taken over must answer within this time; it holds its model already."""


class LocalLauncher:
    """A `Launcher` whose replicas are processes of this machine, and end with it.

    folder: makes them last instead: they keep their models for `adopt_s` seconds after this gateway's end, and those
    that an earlier gateway left in the folder are taken over by `start` where they run just what is asked for.
    With `keep_spares`, processes without a model wait that have imported all it takes to load one.
    """

    def __init__(self, folder: RuntimeFolder | None = None, *, adopt_s: float = 30.0) -> None:
        self._folder = folder
        self._adopt_s = adopt_s
        self._orphans = {record.pid: record for record in folder.state.replicas} if folder is not None else {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._spares: dict[str, asyncio.Task[_Begun]] = {}
        self._spare_backends: frozenset[str] = frozenset()
        if folder is not None:
            _tidy(folder)

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> Replica:
        if self._folder is None:
            return await Replica.start(await launch(environment), load, on_phase)
        key = _key(load, environment)
        record = next((record for record in self._orphans.values() if record.key == key), None)
        if record is not None:
            adopted = await self._adopt(self._folder, record, load, on_phase)
            if adopted is not None:
                return adopted
        begun = await self._begin(self._folder, load.backend, environment)
        self._enter(self._folder, begun, load, key)
        try:
            return await Replica.start(begun.link, load, on_phase)
        finally:
            self._fill_spares()

    def keep_spares(self, backends: Iterable[str]) -> None:
        """Has one process wait for each of these backends, for starts with no environment of their own."""
        self._spare_backends = frozenset(backends)
        self._fill_spares()

    async def close(self) -> None:
        """Ends the spare processes."""
        self._spare_backends = frozenset()
        spares, self._spares = list(self._spares.values()), {}
        for spare in spares:
            with contextlib.suppress(MxnError, OSError):
                begun = await spare
                begun.process.kill()
                await begun.process.wait()
                begun.link.writer.close()
        if self._watchers:
            await asyncio.wait(self._watchers, timeout=ADOPTION_S)

    def holds(self, load: Load, environment: Mapping[str, str]) -> bool:
        """True when an earlier gateway left a replica that `start` would take over for this."""
        key = _key(load, environment)
        return any(record.key == key for record in self._orphans.values())

    async def keep_only(self, wanted: Iterable[tuple[Load, Mapping[str, str]]]) -> None:
        """Ends what an earlier gateway left and none of these starts would take over; returns when it is gone."""
        keys = [_key(load, environment) for load, environment in wanted]
        leaving = []
        for record in self._orphans.values():
            if record.key in keys:
                keys.remove(record.key)
            else:
                leaving.append(record)
        if self._folder is not None:
            await asyncio.gather(*(self._end(self._folder, record) for record in leaving))

    async def _adopt(
        self, folder: RuntimeFolder, record: ReplicaRecord, load: Load, on_phase: Callable[[str, float], None]
    ) -> Replica | None:
        """The replica of an earlier gateway; None when it cannot be had. One that answered, but not well, was ended."""
        del self._orphans[record.pid]
        tail = LogTail(folder.path / record.log, from_end=True)
        try:
            process = AdoptedProcess(record, tail)
            link = ReplicaLink(process, *await connect(folder.path, record))
            replica = await asyncio.wait_for(Replica.start(link, load, on_phase), ADOPTION_S)
        except (MxnError, TimeoutError) as error:
            log.warning("replica %d of %s is not taken over: %s", record.pid, record.model, error or "no answer")
            await tail.finish()
            _forget(folder, record)
            return None
        replica.change_share(load.chip_share)  # its neighbours may be others than when it was started
        log.info("replica %d of %s was taken over with its model", record.pid, record.model)
        self._watch(folder, record, process)
        return replica

    async def _begin(self, folder: RuntimeFolder, backend: str, environment: Mapping[str, str]) -> _Begun:
        """A process that may be told what to load: a spare one if there is one, else a new one."""
        if not environment and backend in self._spares:
            with contextlib.suppress(MxnError, OSError):
                spare = await self._spares.pop(backend)
                if spare.process.returncode is None:
                    return spare
        return await _begin(folder, environment, self._adopt_s)

    def _enter(self, folder: RuntimeFolder, begun: _Begun, load: Load, key: str) -> None:
        """Puts a process that gets a model into the state, until it ends."""
        record = ReplicaRecord(
            pid=begun.process.pid,
            started=process_start(begun.process.pid) or "",
            key=key,
            model=load.model.name,
            socket=f"{begun.name}.sock",
            log=f"{begun.name}.log",
        )
        folder.state.replicas.append(record)
        folder.save()
        self._watch(folder, record, begun.process)

    def _fill_spares(self) -> None:
        if self._folder is None:
            return
        for backend in self._spare_backends - self._spares.keys():
            self._spares[backend] = asyncio.create_task(_begin_spare(self._folder, backend, self._adopt_s))

    async def _end(self, folder: RuntimeFolder, record: ReplicaRecord) -> None:
        """Ends a process that an earlier gateway left: politely, then not; and never one that is not that process."""
        self._orphans.pop(record.pid, None)
        try:
            _, writer = await connect(folder.path, record)
        except BackendError as error:
            log.warning("%s; what an earlier gateway left of %s is let be", error, record.model)
        else:
            writer.write(pack(Stop()))
            try:
                await asyncio.wait_for(_until_gone(record), ADOPTION_S)
                log.info("replica %d of %s, which an earlier gateway left, was stopped", record.pid, record.model)
            except TimeoutError:
                log.warning("replica %d of %s did not stop and is killed", record.pid, record.model)
                end_process(record)
                await _until_gone(record)
            writer.close()
        _forget(folder, record)

    def _watch(self, folder: RuntimeFolder, record: ReplicaRecord, process: StartedProcess | AdoptedProcess) -> None:
        """Takes the record out of the state when the process has ended."""

        async def watch() -> None:
            await process.wait()
            _forget(folder, record)

        task = asyncio.create_task(watch())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A lasting process and the gateway's end of its connection. name: of its socket and log."""

    name: str
    process: StartedProcess
    link: ReplicaLink


async def _begin(folder: RuntimeFolder, environment: Mapping[str, str], adopt_s: float) -> _Begun:
    name = os.urandom(4).hex()
    tail = LogTail(folder.path / f"{name}.log", from_end=False)
    listener = socket.socket(socket.AF_UNIX)
    ours = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(folder.path / f"{name}.sock"))
        listener.listen(1)
        ours.connect(str(folder.path / f"{name}.sock"))  # the kernel holds it until the process takes it
        ours.setblocking(False)
        arguments = ["--door", str(listener.fileno()), str(adopt_s)]
        process = StartedProcess(await _start(arguments, environment, listener, tail.fileno), tail)
    except BaseException:
        ours.close()
        await tail.finish()
        raise
    finally:
        listener.close()
    return _Begun(name, process, ReplicaLink(process, *await asyncio.open_connection(sock=ours)))


async def _begin_spare(folder: RuntimeFolder, backend: str, adopt_s: float) -> _Begun:
    begun = await _begin(folder, {}, adopt_s)
    begun.link.writer.write(pack(Prepare(backend)))
    return begun


async def launch(environment: Mapping[str, str] | None = None) -> ReplicaLink:
    """Starts a replica process that ends with this one.

    environment: variables to set in the child beside this process's own, which stand above mxn's defaults.
    """
    ours, theirs = socket.socketpair()
    try:
        process = await _start([str(theirs.fileno())], environment or {}, theirs, asyncio.subprocess.PIPE)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    return ReplicaLink(process, reader, writer)


async def _start(
    arguments: list[str], environment: Mapping[str, str], inherited: socket.socket, stderr: int
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mxn.engine.worker",
        *arguments,
        pass_fds=[inherited.fileno()],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=stderr,
        env=child_environment(environment, defaults=ENVIRONMENT),
        start_new_session=True,  # Ctrl-C reaches the gateway only, which then drains its replicas
    )


def _key(load: Load, environment: Mapping[str, str]) -> str:
    """What a replica was started for, in one word."""
    text = "\n".join((load_key(load), sys.executable, *(f"{k}={v}" for k, v in sorted(environment.items()))))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


async def _until_gone(record: ReplicaRecord) -> None:
    while process_start(record.pid) == record.started:
        await asyncio.sleep(0.02)


def _tidy(folder: RuntimeFolder) -> None:
    """Removes sockets and logs that belong to no replica, such as those of an earlier gateway's spare processes."""
    known = {name for record in folder.state.replicas for name in (record.socket, record.log)}
    for path in (*folder.path.glob("*.sock"), *folder.path.glob("*.log")):
        if path.name not in known:
            path.unlink(missing_ok=True)


def _forget(folder: RuntimeFolder, record: ReplicaRecord) -> None:
    folder.state.replicas = [one for one in folder.state.replicas if one.pid != record.pid]
    for name in (record.socket, record.log):
        (folder.path / name).unlink(missing_ok=True)
    folder.save()
