"""The engine of a model that makes vectors: takes what waits, embeds it, answers. Drives any embedder; one thread."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mxn.backends.base import Embedder
from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.clock import Clock, SystemClock
from mxn.core.request import FinishReason, SequenceOutput, SequenceRequest
from mxn.energy.attribution import StepLedger
from mxn.engine.stats import EngineStats
from mxn.errors import ChipError, RequestError

log = logging.getLogger(__name__)

_BYTES = 4  # of a float32


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """What one step takes: texts and tokens at most. A text that is longer by itself has a step of its own."""

    max_num_seqs: int = 64
    max_step_tokens: int = 512


class EmbeddingEngine:
    """Turns sequence requests into one vector each, in order of arrival.

    add, abort and step are called from one thread. Every sequence ends with exactly one output: a vector, an error or
    an abort. A step computes whole texts, so an abort drops what has not begun and interrupts nothing.
    """

    def __init__(
        self, embedder: Embedder, limits: BatchLimits, clock: Clock | None = None, ledger: StepLedger | None = None
    ) -> None:
        self.embedder = embedder
        self.stats = EngineStats()
        self.max_context = embedder.info.max_context
        self._limits = limits
        self._clock = clock or SystemClock()
        self._ledger = ledger
        self._waiting: dict[int, SequenceRequest] = {}
        self._arrived_s: dict[int, float] = {}

    @property
    def has_work(self) -> bool:
        """True while any text waits."""
        return bool(self._waiting)

    def add(self, request: SequenceRequest) -> None:
        """Puts a text in line.

        Raises: RequestError when it could never be embedded. The front door has checked already; this is the replica's
        own boundary, so that no message can end it.
        """
        ids, vocab_size = request.prompt_token_ids, self.embedder.info.vocab_size
        if request.seq_id in self._waiting:
            raise RequestError(f"sequence {request.seq_id} exists already")
        if not 1 <= len(ids) <= self.max_context:
            raise RequestError(f"the text has {len(ids)} tokens; expected 1 to {self.max_context}", param="input")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(f"token ids must be in 0..{vocab_size - 1}", param="input")
        self._waiting[request.seq_id] = request
        self._arrived_s[request.seq_id] = self._clock.now_s() - request.waited_s

    def abort(self, seq_ids: Iterable[int]) -> list[SequenceOutput]:
        """Takes texts out of the line; unknown or finished ids are ignored."""
        gone = [seq_id for seq_id in seq_ids if self._waiting.pop(seq_id, None) is not None]
        for seq_id in gone:
            del self._arrived_s[seq_id]
        self.stats.num_aborted += len(gone)
        self._refresh_gauges()
        return [SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ABORT) for seq_id in gone]

    def abort_all(self) -> None:
        """Ends every sequence; nobody is there to hear of it."""
        self.abort(list(self._waiting))

    def step(self) -> list[SequenceOutput]:
        """Embeds the texts at the head of the line.

        Raises: ChipError when the chip is lost; every other failure ends at most the texts that cause it.
        """
        taken = self._take()
        if not taken:
            self._refresh_gauges()
            return []
        stats = self.stats
        stats.num_steps += 1
        stats.num_running = len(taken)
        start_s = self._clock.now_s()
        stats.num_started += len(taken)
        stats.queue_s += sum(start_s - self._arrived_s.pop(request.seq_id) for request in taken)
        answers = self._embed(taken)
        end_s = self._clock.now_s()
        if self._ledger is not None:
            self._ledger.step(start_s, end_s, _as_step(stats.num_steps, taken))
        stats.step_s = end_s - start_s
        stats.busy_s += stats.step_s
        outputs = [self._answer(request, answer) for request, answer in zip(taken, answers, strict=True)]
        self._refresh_gauges()
        return outputs

    def change_share(self, chip_share: float) -> None:
        """Answers for another share of the chip's energy from now on."""
        if self._ledger is not None:
            self._ledger.change_share(chip_share)

    def settle_energy(self) -> None:
        """Books the energy since the last reading; called now and then while nothing runs, so that idle counts too."""
        if self._ledger is not None:
            self._ledger.settle()
            self._refresh_gauges()

    def close(self) -> None:
        """Gives the embedder's memory back."""
        self.embedder.close()

    def _take(self) -> list[SequenceRequest]:
        taken: list[SequenceRequest] = []
        num_tokens = 0
        for request in self._waiting.values():
            num_tokens += len(request.prompt_token_ids)
            if taken and (num_tokens > self._limits.max_step_tokens or len(taken) == self._limits.max_num_seqs):
                break
            taken.append(request)
        for request in taken:
            del self._waiting[request.seq_id]
        return taken

    def _embed(self, requests: Sequence[SequenceRequest]) -> list[bytes | str]:
        """A vector for each text, or why there is none; when a batch fails, each of its texts is tried alone."""
        try:
            vectors = self.embedder.embed([request.prompt_token_ids for request in requests])
        except ChipError:
            raise
        except Exception as error:
            if len(requests) == 1:
                log.exception("a text of %d tokens failed", len(requests[0].prompt_token_ids))
                return [f"the backend failed on this text: {type(error).__name__}"]
            log.exception("a step of %d texts failed; trying them one by one", len(requests))
            return [answer for request in requests for answer in self._embed([request])]
        if len(vectors) != len(requests):
            return [f"the backend returned {len(vectors)} vectors for {len(requests)} texts"] * len(requests)
        return [_fault(vector, self.embedder.dimensions) or vector for vector in vectors]

    def _answer(self, request: SequenceRequest, answer: bytes | str) -> SequenceOutput:
        num_tokens, seq_id = len(request.prompt_token_ids), request.seq_id
        energy_j = None if self._ledger is None else self._ledger.finish(seq_id)
        self.stats.num_computed_tokens += num_tokens
        if isinstance(answer, str):
            self.stats.num_failed += 1
            return SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ERROR, error=answer)
        self.stats.num_prompt_tokens += num_tokens
        self.stats.num_finished += 1
        return SequenceOutput(seq_id=seq_id, vector=answer, finish_reason=FinishReason.STOP, energy_j=energy_j)

    def _refresh_gauges(self) -> None:
        if self._ledger is not None:
            totals = self._ledger.totals
            self.stats.chip_energy_j, self.stats.idle_energy_j = totals.chip_j, totals.idle_j
            self.stats.request_energy_j = totals.requests_j
        self.stats.num_running = 0
        self.stats.num_waiting = len(self._waiting)


def _fault(vector: bytes, dimensions: int) -> str | None:
    """What is wrong with an embedder's answer, or None."""
    if not isinstance(vector, bytes) or len(vector) != _BYTES * dimensions:
        return f"the backend returned no vector of {dimensions} numbers"
    return None if np.isfinite(np.frombuffer(vector, dtype="<f4")).all() else "the model's output is not a number"


def _as_step(step_id: int, requests: Sequence[SequenceRequest]) -> StepBatch:
    """The texts as the ledger knows work: prompts computed whole."""
    return StepBatch(
        step_id=step_id,
        sequences=tuple(
            SequenceStep(
                seq_id=request.seq_id,
                token_ids=request.prompt_token_ids,
                start=0,
                block_ids=(),
                is_sampled=False,
                sampling=request.sampling,
                seed=0,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_output_tokens=0,
            )
            for request in requests
        ),
    )
