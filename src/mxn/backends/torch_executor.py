"""Puts a torch runner behind the executor interface. Imports no torch, so that backends stay light to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mxn.backends.base import Executor, ExecutorInfo, KVCopy, PagedKV, PendingStep, WarmUp
from mxn.core.batch import StepBatch, StepResult


class StepRunner(Protocol):
    """What `mxn.runner.torch_runner.TorchRunner` offers."""

    device: str
    quantisation: str
    threads: int | None
    attention_name: str
    num_blocks: int
    block_size: int
    vocab_size: int
    program: str
    max_context: int
    weight_bytes: int
    kv_bytes: int
    notes: tuple[str, ...]

    def execute(self, batch: StepBatch) -> StepResult: ...
    def copy_kv(self, moves: Sequence[tuple[int, int]]) -> None: ...
    def warm_up(self) -> tuple[tuple[str, ...], float]: ...
    def close(self) -> None: ...


class TorchExecutor(Executor):
    """A model that torch runs; the same for every kind of torch device."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.kv = PagedKV(num_blocks=runner.num_blocks, block_size=runner.block_size)
        self.info = ExecutorInfo(
            attention=runner.attention_name,
            quantisation=runner.quantisation,
            device=runner.device,
            threads=runner.threads,
            weight_bytes=runner.weight_bytes,
            kv_bytes=runner.kv_bytes,
            max_context=runner.max_context,
            vocab_size=runner.vocab_size,
            program=runner.program,
            notes=runner.notes,
        )

    def warm_up(self) -> WarmUp:
        shapes, seconds = self._runner.warm_up()
        return WarmUp(compiled=shapes, seconds=seconds, memory_bytes=self.info.weight_bytes + self.info.kv_bytes)

    def execute(self, batch: StepBatch) -> StepResult:
        return self._runner.execute(batch)

    def copy_kv(self, copies: Sequence[KVCopy]) -> None:
        self._runner.copy_kv([(copy.source, copy.destination) for copy in copies])

    def close(self) -> None:
        self._runner.close()


class AheadRunner(StepRunner, Protocol):
    """What `mxn.runner.gpu_runner.GpuRunner` offers."""

    takes_steps_ahead: bool

    def submit(self, batch: StepBatch) -> PendingStep: ...


class TorchAheadExecutor(TorchExecutor):
    """The same on a chip that works apart from the host: steps are taken ahead."""

    def __init__(self, runner: AheadRunner) -> None:
        super().__init__(runner)
        self._ahead = runner

    def submit(self, batch: StepBatch) -> PendingStep:
        return self._ahead.submit(batch)


def chip_executor(runner: AheadRunner) -> Executor:
    """The executor of a runner on a chip: one that takes steps ahead, unless that was switched off."""
    return TorchAheadExecutor(runner) if runner.takes_steps_ahead else TorchExecutor(runner)
