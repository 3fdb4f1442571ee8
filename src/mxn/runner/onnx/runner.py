"""Runs a decoder graph one step at a time over KV slots, in plain ONNX Runtime.

Per layer one buffer [slots, heads, tokens, size] is bound as past and as present, so a step writes keys and values in
place. A run takes either one sequence's prompt chunk or one token each for neighbouring slots: GroupQueryAttention on a
CPU refuses several rows with several tokens each. Bindings are made once; a step only writes its numbers into buffers
that are bound already.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from mxn.core.batch import SequenceStep, StepBatch, StepResult
from mxn.core.host_sampler import NOT_FINITE, prompt_logprobs, sample
from mxn.core.request import SamplingParams
from mxn.errors import ConfigError, OutOfMemoryError
from mxn.runner.onnx.graph import CacheInput, DecoderGraph

MAX_IDLE_ROWS = 3
"""Between decoding slots, up to this many others run along as idle rows: a row costs a quarter of a run of its own."""


@dataclass(frozen=True, kw_only=True)
class DecodeProgram:
    """A session and what its graph takes; `prefill` and `decode` may be two of them over the same slots."""

    session: ort.InferenceSession
    graph: DecoderGraph
    name: str


class _Run:
    """A bound run over slots `first` to `first + num_rows`: the numbers of a step go into its buffers."""

    def __init__(self, program: DecodeProgram, caches: Sequence[np.ndarray], first: int, num_rows: int) -> None:
        self.lengths = np.zeros(num_rows, np.int32)
        self.total = np.zeros((), np.int32)
        self._program = program
        self._num_rows = num_rows
        self._binding = program.session.io_binding()
        self._bound = (0, 0, 0)
        self._bind_input("seqlens_k", self.lengths)
        self._bind_input("total_sequence_length", self.total)
        for cache, names in zip(caches, program.graph.caches, strict=True):
            shape = (num_rows, *cache.shape[1:])
            address = cache[first].ctypes.data
            self._binding.bind_input(names.past, "cpu", 0, names.dtype.type, shape, address)
            self._binding.bind_output(names.present, "cpu", 0, names.dtype.type, shape, address)

    def execute(self, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray, logits: np.ndarray) -> None:
        """Args: tokens (rows, tokens each) int64; starts (rows,) int32; rows: flat token indices to give logits of;
        logits (len(rows), vocabulary): filled."""
        num_tokens = tokens.shape[1]
        if self._bound != (num_tokens, len(rows), logits.ctypes.data):
            self._bind(num_tokens, len(rows), logits)
        self.tokens[:] = tokens
        self.rows[:] = rows
        np.add(starts, num_tokens - 1, out=self.lengths)
        self.total[...] = self.lengths.max() + 1
        if self._program.graph.takes_positions:
            self.positions[:] = starts[:, None] + np.arange(num_tokens)
        self._program.session.run_with_iobinding(self._binding)

    def _bind(self, num_tokens: int, num_logits: int, logits: np.ndarray) -> None:
        self._bound, self._logits = (num_tokens, num_logits, logits.ctypes.data), logits
        self.tokens = np.zeros((self._num_rows, num_tokens), np.int64)
        self.rows = np.zeros(num_logits, np.int64)
        self._bind_input("input_ids", self.tokens)
        self._bind_input("logit_rows", self.rows)
        if self._program.graph.takes_positions:
            self.positions = np.zeros((self._num_rows, num_tokens), np.int64)
            self._bind_input("position_ids", self.positions)
        self._binding.bind_output("logits", "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)

    def _bind_input(self, name: str, buffer: np.ndarray) -> None:
        self._binding.bind_input(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)


class OnnxRunner:
    """A decoder over KV slots. Keeps nothing about sequences but what the slots hold."""

    def __init__(self, decode: DecodeProgram, prefill: DecodeProgram, *, num_slots: int, max_tokens: int) -> None:
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.vocab_size = decode.graph.vocab_size
        self._decode: DecodeProgram | None = decode
        self._prefill: DecodeProgram | None = prefill
        try:
            self._caches = [np.zeros(slot_shape(c, num_slots, max_tokens), c.dtype) for c in decode.graph.caches]
        except MemoryError as error:
            raise OutOfMemoryError(f"a KV cache of {num_slots} slots of {max_tokens} tokens did not fit") from error
        self._decode_logits = np.zeros((num_slots, self.vocab_size), decode.graph.logits_dtype)
        self._one_logit = np.zeros((1, self.vocab_size), prefill.graph.logits_dtype)
        self._decode_runs: dict[tuple[int, int], _Run] = {}
        self._prefill_runs: dict[int, _Run] = {}

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def execute(self, batch: StepBatch) -> StepResult:
        """Computes one step; see `mxn.backends.base.Executor.execute`."""
        if self._decode is None:
            raise ConfigError("the model was closed; load it again")
        parts: list[StepResult] = []
        decoding = [step for step in batch.sequences if len(step.token_ids) == 1 and not _wants_prompt(step)]
        chunks = [step for step in batch.sequences if len(step.token_ids) > 1 or _wants_prompt(step)]
        try:
            parts += [self._run_chunk(step) for step in chunks]
            parts += [self._run_tokens(group) for group in _neighbours(decoding)]
        except Exception as error:
            if "alloc" in str(error).lower():
                raise OutOfMemoryError(f"a step of {batch.num_tokens} tokens did not fit: {error}") from error
            raise
        return _in_batch_order(parts, batch)

    def copy_kv(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copies (source slot, destination slot, tokens) in order, over all layers."""
        for source, destination, num_tokens in copies:
            for cache in self._caches:
                cache[destination, :, :num_tokens] = cache[source, :, :num_tokens]

    def warm_up(self, max_step_tokens: int) -> tuple[tuple[str, ...], float]:
        """Runs the shapes that requests will bring, over slots nobody holds yet. Returns names and seconds."""
        started_s = time.perf_counter()
        longest = min(max_step_tokens, self.max_tokens)
        for num_rows in sorted({1, self.num_slots}):
            for _ in range(2):
                self.execute(_dummy_batch(range(num_rows), 1))
        self.execute(_dummy_batch(range(1), longest))
        names = (f"{self._decode.name}: 1 and {self.num_slots} tokens", f"{self._prefill.name}: {longest} tokens")
        return names, time.perf_counter() - started_s

    def close(self) -> None:
        """Drops sessions and slots. Safe to call twice."""
        self._decode_runs, self._prefill_runs = {}, {}
        self._decode = self._prefill = None
        self._caches = []

    def _run_chunk(self, step: SequenceStep) -> StepResult:
        """One sequence's next tokens, with logits of the last one, or of all when prompt logprobs are asked for."""
        run = self._prefill_runs.get(step.slot)
        if run is None:
            run = self._prefill_runs[step.slot] = _Run(self._prefill, self._caches, step.slot, 1)
        count = len(step.token_ids)
        wants_prompt = _wants_prompt(step)
        rows = np.arange(count) if wants_prompt else np.array([count - 1])
        logits = np.empty((count, self.vocab_size), self._one_logit.dtype) if wants_prompt else self._one_logit
        tokens = np.fromiter(step.token_ids, np.int64, count)[None]
        run.execute(tokens, np.array([step.start], np.int32), rows, logits)
        prompts: tuple = ()
        if wants_prompt:
            if not np.isfinite(logits.max(-1)).all():
                return StepResult(tokens=(), failed=((step.seq_id, NOT_FINITE),))
            prompts = ((step.seq_id, prompt_logprobs(logits, step)),)
        if not step.is_sampled:
            return StepResult(tokens=(), prompt_logprobs=prompts)
        drawn = sample(logits[-1:], [step])
        return StepResult(tokens=drawn.tokens, prompt_logprobs=prompts, failed=drawn.failed)

    def _run_tokens(self, steps: Sequence[SequenceStep]) -> StepResult:
        """One token each for sequences in ascending slots; slots between them run along and stay as they are."""
        first, num_rows = steps[0].slot, steps[-1].slot - steps[0].slot + 1
        run = self._decode_runs.get((first, num_rows))
        if run is None:
            run = _Run(self._decode, self._caches, first, num_rows)
            self._decode_runs[first, num_rows] = run
        rows = np.fromiter((step.slot - first for step in steps), np.int64, len(steps))
        tokens, starts = np.zeros((num_rows, 1), np.int64), np.zeros(num_rows, np.int32)
        tokens[rows, 0] = [step.token_ids[0] for step in steps]
        starts[rows] = [step.start for step in steps]
        logits = self._decode_logits[: len(steps)]
        idle = sorted({*range(first, first + num_rows)} - {step.slot for step in steps})
        kept = [cache[idle, :, 0] for cache in self._caches] if idle else []  # where an idle row writes
        run.execute(tokens, starts, rows, logits)
        if idle:
            for cache, first_tokens in zip(self._caches, kept, strict=True):
                cache[idle, :, 0] = first_tokens
        sampled = [row for row, step in enumerate(steps) if step.is_sampled]
        if len(sampled) < len(steps):
            return sample(logits[sampled], [steps[row] for row in sampled])
        return sample(logits, steps)


def slot_shape(cache: CacheInput, num_slots: int, max_tokens: int) -> tuple[int, int, int, int]:
    """Shape of one KV buffer."""
    return (num_slots, cache.num_heads, max_tokens, cache.dim)


def slot_bytes(graph: DecoderGraph, max_tokens: int) -> int:
    """Bytes of one slot over all layers."""
    return sum(int(np.prod(slot_shape(cache, 1, max_tokens))) * cache.dtype.itemsize for cache in graph.caches)


def _neighbours(steps: Sequence[SequenceStep]) -> Iterator[list[SequenceStep]]:
    """Groups of sequences whose slots lie so close together that one run is cheaper than two."""
    group: list[SequenceStep] = []
    for step in sorted(steps, key=lambda step: step.slot):
        if group and step.slot - group[-1].slot > MAX_IDLE_ROWS + 1:
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def _wants_prompt(step: SequenceStep) -> bool:
    return step.sampling.num_prompt_logprobs is not None and step.start < step.num_prompt_tokens


def _in_batch_order(parts: Sequence[StepResult], batch: StepBatch) -> StepResult:
    if len(parts) == 1:
        return parts[0]
    tokens = {token.seq_id: token for part in parts for token in part.tokens}
    return StepResult(
        tokens=tuple(tokens[step.seq_id] for step in batch.sequences if step.seq_id in tokens),
        prompt_logprobs=tuple(entry for part in parts for entry in part.prompt_logprobs),
        failed=tuple(entry for part in parts for entry in part.failed),
    )


def _dummy_batch(slots: range, num_tokens: int) -> StepBatch:
    return StepBatch(
        step_id=0,
        sequences=tuple(
            SequenceStep(
                seq_id=slot,
                token_ids=[0] * num_tokens,
                start=0,
                block_ids=(),
                slot=slot,
                is_sampled=True,
                sampling=SamplingParams(temperature=0.0),
                seed=0,
                num_prompt_tokens=num_tokens,
                num_output_tokens=0,
            )
            for slot in slots
        ),
    )
