"""The sides of the CPU comparison: each loads its model in processes of its own and holds still outside its turn.

A peer is a library in an environment of its own, driven through `peers/worker.py`, or a server with OpenAI's
completions API, started here or found at a URL. What is started here is stopped (SIGSTOP) while another side runs,
since threads that wait by spinning would otherwise take its cores.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec

from mxn.bench.arms import Arm, HttpArm, describe
from mxn.bench.client import RequestResult
from mxn.bench.records import Subject
from mxn.bench.workloads import PromptMaker
from mxn.cli.power import local_readers
from mxn.config.environment import child_environment
from mxn.energy.reader import PowerReader
from mxn.engine.http_stream import TransportError
from mxn.errors import ConfigError, MxnError

WORKERS = Path(__file__).resolve().parent / "peers"
LOOPBACK = "http://127.0.0.1"
LINE_BYTES = 2**26
END_S = 15.0
READ_FACTOR = 5
WARM_UP, WARM_UP_TOKENS = " time year people way day man thing woman", 16


class PeerError(MxnError):
    """A peer does not start or ended while it was needed."""


class Peer(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One side. Either `worker` (with `python` and `model`), or `url` (with `command` when it is started here).

    worker: a script of benchmarks/peers without "_peer.py"; options are its command line after the model.
    workloads: what it runs; empty means all.
    """

    label: str
    quantisation: str = "unknown"
    worker: str | None = None
    python: str = sys.executable
    model: str = ""
    options: tuple[str, ...] = ()
    url: str | None = None
    command: tuple[str, ...] = ()
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    workloads: tuple[str, ...] = ()
    start_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0

    def __post_init__(self) -> None:
        if (self.worker is None) == (self.url is None):
            raise ValueError(f"{self.label} needs either worker (with python and model) or url (with command)")

    @property
    def missing(self) -> str | None:
        """Why it cannot run on this machine; None when its files are there."""
        if self.worker is not None:
            needed = [self.python, str(WORKERS / f"{self.worker}_peer.py")]
            needed += [self.model] if self.model.startswith("/") else []
        else:
            needed = list(self.command[:1])
        absent = [path for path in needed if not Path(path).exists()]
        return f"there is no {absent[0]}" if absent else None


class Setup(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a YAML file says: the model as mxn is told of it, and the peers that have been given the same weights."""

    model: str
    peers: tuple[Peer, ...] = ()


def load_setup(path: Path) -> Setup:
    """Raises: ConfigError when the file is not a setup."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Setup)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is not a list of peers: {error}; benchmarks/README.md shows one") from error


class Turn:
    """An arm of which nothing runs outside `run`, and whose run ends in time: once it was late, it is out.

    A turn begins with a short request that is not counted: meanwhile the others took the caches, and the system may
    have taken pages of files that nobody read.
    """

    def __init__(self, arm: Arm, *, pid: int | None, limit_s: float) -> None:
        self.subject = arm.subject
        self.readers: tuple[PowerReader, ...] = arm.readers
        self._arm = arm
        self.pid = pid
        self._limit_s = limit_s
        self._fault: str | None = None

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        """As the arm does; every request fails once the arm was late or broke."""
        return await self._run(prompts, max_tokens, concurrency, self._limit_s)

    async def read(self, prompts: Sequence[str]) -> None:
        """Lets the side fill its prefix cache, for which it may take longer."""
        await self._run(prompts, 1, len(prompts), READ_FACTOR * self._limit_s)

    async def _run(
        self, prompts: Sequence[str], max_tokens: int, concurrency: int, limit_s: float
    ) -> list[RequestResult]:
        if self._fault is None:
            self._signal(signal.SIGCONT)
            try:
                async with asyncio.timeout(limit_s):
                    await self._arm.run([WARM_UP], WARM_UP_TOKENS, 1)
                    return await self._arm.run(prompts, max_tokens, concurrency)
            except TimeoutError:
                self._fault = f"not done after {limit_s:g} s; it was not asked again"
            except PeerError as error:
                self._fault = str(error)
            finally:
                self.pause()
        now_s = time.monotonic()
        failed = RequestResult(start_s=now_s, end_s=now_s, chunk_times_s=(), num_output_tokens=0, error=self._fault)
        return [failed] * len(prompts)

    def pause(self) -> None:
        """Stops the processes until the next turn."""
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Closes the arm; its processes belong to whoever started them."""
        self._signal(signal.SIGCONT)
        self._arm.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            family = _family(self.pid)
            # A parent that watches its children never runs while they are stopped.
            _send(family if number == signal.SIGSTOP else family[::-1], number)


class WorkerArm:
    """A library behind `peers/worker.py`."""

    def __init__(
        self, subject: Subject, process: asyncio.subprocess.Process, encode: Callable[[str], list[int]]
    ) -> None:
        self.subject = subject
        self.readers = local_readers(LOOPBACK)
        self._process = process
        self._encode = encode

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        """All prompts, `concurrency` at a time. Raises: PeerError when the worker ended."""
        ids = [self._encode(prompt) for prompt in prompts]
        assert self._process.stdin is not None
        task = {"prompts": ids, "max_tokens": max_tokens, "concurrency": concurrency}
        self._process.stdin.write(msgspec.json.encode(task) + b"\n")
        answer = msgspec.json.decode(await _line(self._process, self.subject.label), type=_Answer)
        if answer.error is not None:
            raise PeerError(f"{self.subject.label}: {answer.error}")
        return [
            RequestResult(
                start_s=r.start_s,
                end_s=r.end_s,
                chunk_times_s=r.times_s,
                num_output_tokens=r.num_output_tokens,
                num_prompt_tokens=len(prompt),
                num_cached_tokens=r.num_cached_tokens,
                error=r.error,
            )
            for r, prompt in zip(answer.requests, ids, strict=True)
        ]

    def close(self) -> None:
        """Closes the readers; the process ends with its context."""
        for reader in self.readers:
            reader.close()


class _Request(msgspec.Struct):
    start_s: float
    end_s: float
    times_s: tuple[float, ...]
    num_output_tokens: int
    num_cached_tokens: int | None = None
    error: str | None = None


class _Answer(msgspec.Struct):
    requests: list[_Request] = msgspec.field(default_factory=list)
    error: str | None = None


class _About(msgspec.Struct):
    backend: str = "unknown"
    attention: str = "unknown"
    quantisation: str | None = None
    program: str = "unknown"
    threads: int | None = None
    notes: tuple[str, ...] = ()


@asynccontextmanager
async def started(peer: Peer, model: str, prompts: PromptMaker, *, limit_s: float) -> AsyncIterator[Turn]:
    """The peer, loaded and paused; what was started ends with the context.

    limit_s: seconds for one run of one workload.
    Raises: PeerError when it does not start in time; TransportError when nobody answers at the URL.
    """
    argv = [peer.python, str(WORKERS / f"{peer.worker}_peer.py"), peer.model, *peer.options]
    argv = argv if peer.worker is not None else list(peer.command)
    async with _process(peer, argv) as process:
        async with asyncio.timeout(peer.start_limit_s) as limit:
            try:
                if peer.worker is not None:
                    assert process is not None
                    about = msgspec.json.decode(await _line(process, peer.label), type=_About)
                    arm: Arm = WorkerArm(_subject(peer, model, about), process, prompts.encode)
                else:
                    arm = await _answering(peer, process)
            except asyncio.CancelledError:
                if limit.expired():
                    raise PeerError(f"{peer.label} was not ready after {peer.start_limit_s:g} s") from None
                raise
        turn = Turn(arm, pid=process.pid if process else None, limit_s=limit_s)
        turn.pause()
        try:
            yield turn
        finally:
            turn.close()


@asynccontextmanager
async def _process(peer: Peer, argv: list[str]) -> AsyncIterator[asyncio.subprocess.Process | None]:
    """The peer's process, None for one that runs already. Ends its whole tree; a failure quotes its last words."""
    if not argv:
        yield None
        return
    environment = {"PYTHONUNBUFFERED": "1", **peer.environment}
    with tempfile.TemporaryFile() as words:
        pipe = asyncio.subprocess.PIPE if peer.worker is not None else None
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=pipe or asyncio.subprocess.DEVNULL,
            stdout=pipe or words,
            stderr=words,
            limit=LINE_BYTES,
            env=child_environment(environment),
            start_new_session=True,  # Ctrl-C reaches us only, and we end it in order
        )
        try:
            yield process
        except PeerError as error:
            words.seek(max(0, words.seek(0, os.SEEK_END) - 2000))
            raise PeerError(f"{error}; its last words:\n{words.read().decode(errors='replace')}") from error
        finally:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    family = _family(process.pid)
    for number in (signal.SIGCONT, signal.SIGTERM):
        _send(family, number)
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), END_S)
    _send(family, signal.SIGKILL)
    await process.wait()


async def _line(process: asyncio.subprocess.Process, label: str) -> bytes:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise PeerError(f"{label} ended with exit code {await process.wait()}")
    return line


async def _answering(peer: Peer, process: asyncio.subprocess.Process | None) -> HttpArm:
    """The server, once it completes a prompt; one that was not started here must do so at once."""
    assert peer.url is not None
    while True:
        try:
            subject = await describe(peer.url, peer.label)
            if subject.quantisation == "unknown":
                subject = replace(subject, quantisation=peer.quantisation)
            arm = HttpArm(subject, peer.url, readers=local_readers(peer.url))
            fault = (await arm.run([" the"], 1, 1))[0].error
            if fault is None:
                return arm
            arm.close()
        except (TransportError, ConfigError) as error:
            fault = str(error)
        if process is None:
            raise PeerError(f"{peer.label} at {peer.url}: {fault}")
        if process.returncode is not None:
            raise PeerError(f"{peer.label} ended with exit code {process.returncode}")
        await asyncio.sleep(0.5)


def _subject(peer: Peer, model: str, about: _About) -> Subject:
    return Subject(
        label=peer.label,
        model=model,
        interface="in process",
        backend=about.backend,
        attention=about.attention,
        quantisation=about.quantisation or peer.quantisation,
        program=about.program,
        threads=about.threads,
        notes=about.notes,
    )


def _family(pid: int) -> list[int]:
    """The process and all that descend from it, parents first."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def _send(family: Sequence[int], number: signal.Signals) -> None:
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
