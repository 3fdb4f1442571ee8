"""A backend without hardware: real block bookkeeping, scripted speed, memory, power and faults.

Its "KV cache" stores the token ids themselves and the next token is a hash of all ids read back through the block
table. A block that is handed out twice, freed too early or wrongly shared therefore changes the output, so tests of
the engine above it can fail.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mxn.backends.base import (
    Backend,
    Capabilities,
    Embedder,
    Executor,
    ExecutorInfo,
    KVCopy,
    LoadProgress,
    MemoryEstimate,
    PagedKV,
    PendingStep,
    Probe,
    SlotKV,
    Support,
    WarmUp,
)
from mxn.backends.host import resident_bytes
from mxn.config.environment import fake_chips
from mxn.core.batch import PENDING, SampledToken, SequenceStep, StepBatch, StepResult
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.core.request import TokenLogprob
from mxn.energy.reader import PowerReader
from mxn.energy.replay import ConstantReader
from mxn.errors import ChipError, ModelError, OutOfMemoryError

FAKE_W = 10.0
FAKE_DIMENSIONS = 8
_BYTES_PER_TOKEN = 4


class FakeOptions:
    """What a fake executor does, from `LoadSettings.options`; unknown keys are refused.

    step_ms, token_us: time of a step, plus time per token computed. load_ms: time to load.
    script: comma-separated token ids to answer with, repeated; without it the hash decides.
    raise_on, nan_on, oom_on: a token id that makes the step raise, fails its sequence, or does not fit.
    die_after, hang_after, lose_chip_after: after so many steps the process ends, sleeps for ever, or loses its chip.
    lost_chip_file: a file that may come to be; the chip whose uid it holds is lost from then on.
    fail_load: text of an error to raise while loading.
    ahead: "on" takes steps ahead, as a chip does that works apart from the host.
    """

    def __init__(self, options: tuple[tuple[str, str], ...], chip: str = "fake-0") -> None:
        values = dict(options)
        self.chip = chip
        self.step_s = float(values.pop("step_ms", 0)) / 1e3
        self.token_s = float(values.pop("token_us", 0)) / 1e6
        self.load_s = float(values.pop("load_ms", 0)) / 1e3
        self.script = [int(t) for t in values.pop("script", "").split(",") if t]
        self.raise_on = int(values.pop("raise_on", -1))
        self.nan_on = int(values.pop("nan_on", -1))
        self.oom_on = int(values.pop("oom_on", -1))
        self.die_after = int(values.pop("die_after", 0))
        self.hang_after = int(values.pop("hang_after", 0))
        self.lose_chip_after = int(values.pop("lose_chip_after", 0))
        self.lost_chip_file = Path(file) if (file := values.pop("lost_chip_file", "")) else None
        self.fail_load = values.pop("fail_load", "")
        self.takes_steps_ahead = values.pop("ahead", "off") == "on"
        if values:
            raise ModelError(f"the fake backend does not know the options {', '.join(sorted(values))}")

    def misbehave(self, num_steps: int, texts: Sequence[Sequence[int]]) -> None:
        """Does what a step with these tokens, the `num_steps`-th, is scripted to do instead of its work."""
        if self.die_after and num_steps > self.die_after:
            import os

            os._exit(17)
        if self.hang_after and num_steps > self.hang_after:
            time.sleep(3600)
        if (self.lose_chip_after and num_steps > self.lose_chip_after) or self._is_chip_lost():
            raise ChipError(f"chip {self.chip} is lost: it stopped answering")
        for text in texts:
            if self.raise_on in text:
                raise RuntimeError(f"the fake chip cannot compute token {self.raise_on}")
            if self.oom_on in text:
                raise OutOfMemoryError("the step needs 2 GiB; the fake chip has 1 GiB free")

    def _is_chip_lost(self) -> bool:
        file = self.lost_chip_file
        return file is not None and file.exists() and file.read_text().strip() == self.chip

    def seconds(self, num_tokens: int) -> float:
        """How long a step of so many tokens takes."""
        return self.step_s + self.token_s * num_tokens

    def take_time(self, num_tokens: int) -> None:
        """Sleeps as long as a step of so many tokens takes."""
        if self.step_s or self.token_s:
            time.sleep(self.seconds(num_tokens))


class FakeExecutor(Executor):
    """Hashes token ids instead of running a model; see the module's first lines."""

    kv: PagedKV | SlotKV

    def __init__(self, *, num_blocks: int, block_size: int, vocab_size: int, max_context: int, options: FakeOptions):
        self.kv = PagedKV(num_blocks=num_blocks, block_size=block_size)
        self.info = ExecutorInfo(
            attention="none",
            quantisation="none",
            device="fake",
            threads=None,
            weight_bytes=0,
            kv_bytes=num_blocks * block_size * _BYTES_PER_TOKEN,
            max_context=max_context,
            vocab_size=vocab_size,
            notes=("simulated chip: tokens, timing and power are scripted",),
        )
        self._options = options
        self._cache = np.full((num_blocks, block_size), -1, dtype=np.int32)
        self._num_steps = 0

    def warm_up(self) -> WarmUp:
        return WarmUp(compiled=(), seconds=0.0, memory_bytes=self.info.kv_bytes)

    def execute(self, batch: StepBatch) -> StepResult:
        result = self._compute(batch)
        self._options.take_time(batch.num_tokens)
        return result

    def _compute(self, batch: StepBatch) -> StepResult:
        options = self._options
        self._num_steps += 1
        options.misbehave(self._num_steps, [step.token_ids for step in batch.sequences])
        tokens, failed = [], []
        for step in batch.sequences:
            context = self._write(step)
            if options.nan_on in step.token_ids:
                failed.append((step.seq_id, "the model's output is not a number"))
            elif step.is_sampled:
                tokens.append(self._draw(step, context))
        return StepResult(tokens=tuple(tokens), failed=tuple(failed))

    def copy_kv(self, copies: Sequence[KVCopy]) -> None:
        for copy in copies:
            self._cache[copy.destination, : copy.num_tokens] = self._cache[copy.source, : copy.num_tokens]

    def close(self) -> None:
        self._cache = np.empty((0, 0), dtype=np.int32)

    def _rooms(self, step: SequenceStep) -> Sequence[int]:
        """The rooms of the cache that hold the sequence, in order."""
        return step.block_ids

    def _write(self, step: SequenceStep) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Stores the new ids and returns slots of the whole context in order."""
        size = self._cache.shape[1]
        end = step.start + len(step.token_ids)
        blocks = np.asarray(self._rooms(step), dtype=np.int64)
        if len(blocks) * size < end:
            raise ValueError(f"block table covers {len(blocks) * size} tokens, the step needs {end}")
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)[:end]
        self._cache.reshape(-1)[slots[step.start :]] = step.token_ids
        return slots

    def _draw(self, step: SequenceStep, slots: np.ndarray[tuple[int], np.dtype[np.int32]]) -> SampledToken:
        sampling = step.sampling
        if self._options.script:
            token_id = self._options.script[step.num_output_tokens % len(self._options.script)]
        else:
            salt = 0 if sampling.is_greedy else step.seed * 1_000_003 + step.num_output_tokens
            token_id = fake_next_token(self._cache.reshape(-1)[slots], salt, self.info.vocab_size)
        logprob = None
        if sampling.num_logprobs is not None:
            top = tuple(((token_id + i) % self.info.vocab_size, -float(i) - 0.5) for i in range(sampling.num_logprobs))
            logprob = TokenLogprob(token_id=token_id, logprob=-0.5, top=top)
        return SampledToken(seq_id=step.seq_id, token_id=token_id, logprob=logprob)


class FakeAheadExecutor(FakeExecutor):
    """The same on a chip that works apart from the host: steps run late and in order, draws stay for the next.

    Refuses what `Executor.submit` does not allow.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._waiting: deque[FakePendingStep] = deque()
        self._newest: FakePendingStep | None = None
        self._drawn: dict[int, int] = {}
        self._free_s = 0.0

    def submit(self, batch: StepBatch) -> PendingStep:
        self._check(batch)
        kept = StepBatch(step_id=batch.step_id, sequences=tuple(map(_kept, batch.sequences)))
        self._free_s = max(self._free_s, time.monotonic()) + self._options.seconds(batch.num_tokens)
        self._newest = FakePendingStep(kept, self._run_through, self._free_s)
        self._waiting.append(self._newest)
        return self._newest

    def execute(self, batch: StepBatch) -> StepResult:
        return self.submit(batch).result()

    def _check(self, batch: StepBatch) -> None:
        before = self._waiting[-1].batch.sequences if self._waiting else ()
        if len(self._waiting) > 1 or not all(step.is_plain for step in before):
            raise ValueError("a step was submitted before the result of one that it may not pass")
        newest = self._newest.batch.sequences if self._newest else ()
        known = {step.seq_id for step in newest if step.is_sampled}
        for step in batch.sequences:
            if PENDING in step.token_ids and (len(step.token_ids) > 1 or step.seq_id not in known):
                raise ValueError(f"sequence {step.seq_id} waits for a token that no step draws")

    def _run_through(self, last: FakePendingStep) -> None:
        """Runs what waits, up to and with `last`."""
        while last in self._waiting:
            step = self._waiting.popleft()
            drawn, self._drawn = self._drawn, {}
            sequences = tuple(
                replace(one, token_ids=(drawn.get(one.seq_id, 0),)) if PENDING in one.token_ids else one
                for one in step.batch.sequences
            )
            try:
                step.outcome = self._compute(StepBatch(step_id=step.batch.step_id, sequences=sequences))
                self._drawn = {token.seq_id: token.token_id for token in step.outcome.tokens}
            except Exception as error:
                step.outcome = error


class FakePendingStep(PendingStep):
    """A step that waits for the simulated chip, which is through with it at `end_s`."""

    def __init__(self, batch: StepBatch, run_through: Callable[[FakePendingStep], None], end_s: float) -> None:
        self.batch = batch
        self.outcome: StepResult | Exception | None = None
        self._run_through, self._end_s = run_through, end_s

    def result(self) -> StepResult:
        self._run_through(self)
        time.sleep(max(0.0, self._end_s - time.monotonic()))
        if not isinstance(self.outcome, StepResult):
            raise self.outcome or ValueError("the result of this step was taken before")
        return self.outcome


def _kept(step: SequenceStep) -> SequenceStep:
    """A copy of what is valid during a call only."""
    return replace(step, token_ids=tuple(step.token_ids), block_ids=tuple(step.block_ids))


class FakeSlotExecutor(FakeExecutor):
    """The same over whole-sequence slots; refuses steps in which prompt chunks and decoding sequences are mixed."""

    def __init__(self, *, num_slots: int, max_tokens: int, vocab_size: int, options: FakeOptions):
        super().__init__(
            num_blocks=num_slots, block_size=max_tokens, vocab_size=vocab_size, max_context=max_tokens, options=options
        )
        self.kv = SlotKV(num_slots=num_slots, max_tokens=max_tokens)

    def execute(self, batch: StepBatch) -> StepResult:
        slots = sorted(step.slot for step in batch.sequences)
        has_chunk = any(len(step.token_ids) > 1 for step in batch.sequences)
        has_decode = any(len(step.token_ids) == 1 and step.is_sampled for step in batch.sequences)
        if min(slots) < 0 or len(set(slots)) < len(slots):
            raise ValueError(f"the step's sequences are in slots {slots}; expected one each")
        if has_chunk and has_decode:
            raise ValueError("prompt chunks and decoding sequences may not share a step")
        return super().execute(batch)

    def _rooms(self, step: SequenceStep) -> Sequence[int]:
        return (step.slot,)


class FakeEmbedder(Embedder):
    """Makes vectors of length 1 out of a hash of the token ids."""

    def __init__(self, *, vocab_size: int, max_context: int, options: FakeOptions):
        self.dimensions = FAKE_DIMENSIONS
        self.info = ExecutorInfo(
            attention="none",
            quantisation="none",
            device="fake",
            threads=None,
            weight_bytes=0,
            kv_bytes=0,
            max_context=max_context,
            vocab_size=vocab_size,
            notes=("simulated chip: vectors, timing and power are scripted",),
        )
        self._options = options
        self._num_steps = 0

    def warm_up(self) -> WarmUp:
        return WarmUp(compiled=(), seconds=0.0, memory_bytes=0)

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        self._num_steps += 1
        self._options.misbehave(self._num_steps, batch)
        self._options.take_time(sum(map(len, batch)))
        nothing = np.full(FAKE_DIMENSIONS, np.nan, dtype="<f4").tobytes()
        return [nothing if self._options.nan_on in text else fake_vector(text) for text in batch]

    def close(self) -> None:
        pass


def fake_vector(token_ids: Sequence[int]) -> bytes:
    """The vector a correct engine must answer for a text."""
    seed = zlib.crc32(np.asarray(token_ids, dtype=np.int32).tobytes())
    vector = np.random.default_rng(seed).standard_normal(FAKE_DIMENSIONS)
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


def fake_next_token(context: np.ndarray[tuple[int], np.dtype[np.int32]], salt: int, vocab_size: int) -> int:
    """The token a correct engine must draw after `context` (all ids so far)."""
    return zlib.crc32(context.tobytes(), salt & 0xFFFFFFFF) % vocab_size


class FakeBackend(Backend):
    """Always there, never quick by accident: for tests, demos of the control plane and gateway benchmarks."""

    name = "fake"

    def probe(self) -> Probe:
        return Probe(state="active", reason="simulated chips for tests; every figure it yields is marked simulated")

    def chips(self) -> Sequence[Chip]:
        kinds = fake_chips() or (None,)
        name, gib = "Simulated chip", 1 << 30
        return [
            Chip(uid=f"fake-{index}", kind=kind, name=name, vendor="mxn", memory_bytes=gib, cores=1)
            for index, kind in enumerate(kinds)
        ]

    def capabilities(self, chip: Chip) -> Capabilities:
        return Capabilities(
            kv="paged",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=False,
            can_share_chip=True,
            is_scripted=True,
            tasks=("generate", "embed"),
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        return Support(verdict="yes", reasons=("a simulated chip runs anything",), max_context=model.max_context)

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        zero = Quantity(value=0.0, unit="bytes", provenance=Provenance.SIMULATED, source="fake backend")
        kv = Quantity(
            value=float(self._num_blocks(model, settings) * settings.block_size * _BYTES_PER_TOKEN),
            unit="bytes",
            provenance=Provenance.SIMULATED,
            source="4 bytes per token",
        )
        return MemoryEstimate(weights=zero, kv_cache=kv, activations=zero, overhead=zero)

    def power(self, chip: Chip) -> PowerReader:
        return ConstantReader(FAKE_W, detail=f"a simulated chip that draws {FAKE_W:g} W whatever it does")

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        return resident_bytes(pid)

    def load(
        self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress
    ) -> Executor | Embedder:
        options = FakeOptions(settings.options, chips[0].uid)
        for i in range(1, 5):
            time.sleep(options.load_s / 4)
            progress("weights", i / 4)
        if options.fail_load:
            raise ModelError(options.fail_load)
        vocab_size = model.spec.vocab_size
        max_context = min(settings.context_length or model.spec.max_context, model.spec.max_context)
        if model.spec.task == "embed":
            return FakeEmbedder(vocab_size=vocab_size, max_context=max_context, options=options)
        make = FakeAheadExecutor if options.takes_steps_ahead else FakeExecutor
        return make(
            num_blocks=self._num_blocks(model.spec, settings),
            block_size=settings.block_size,
            vocab_size=vocab_size,
            max_context=max_context,
            options=options,
        )

    def _num_blocks(self, model: ModelSpec, settings: LoadSettings) -> int:
        budget = settings.kv_bytes if settings.kv_bytes is not None else 1 << 20
        return max(1, budget // (_BYTES_PER_TOKEN * settings.block_size))
