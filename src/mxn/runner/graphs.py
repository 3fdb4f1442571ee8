"""Decode steps as captured graphs: one per padded number of sequences, captured in the background.

A replay costs the host one launch where the same step costs hundreds. A graph's inputs lie at fixed addresses, are
filled on the host and sent in one copy; rows beyond the batch write nothing and see nothing. A step for which there is
no graph yet runs eagerly: nobody waits for a capture.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mxn.attention.base import AttentionMetadata
from mxn.core.batch import SequenceStep
from mxn.runner.accelerator import Accelerator, Captured
from mxn.runner.chip_sampler import RULES, draw, fill_rules
from mxn.runner.drawn import DrawnTokens
from mxn.runner.forward import ForwardProgram
from mxn.runner.inputs import StepInputs
from mxn.runner.staging import Staging

log = logging.getLogger(__name__)


class CapturedAttention(Protocol):
    """An attention backend's part in captured decode steps (see `mxn.attention.triton.CapturedDecode`).

    parts: what it wants staged beside the metadata, by name: dtype and length.
    """

    parts: Mapping[str, tuple[torch.dtype, int]]

    def find_groups(self, seq_ids: Sequence[int], meta: AttentionMetadata) -> Sequence[Any]:
        """Groups of rows whose shared prefix is better read once; empty for a plain step."""

    def fill(self, staged: Mapping[str, np.ndarray], groups: Sequence[Any]) -> None:
        """Writes groups into the arrays of its parts."""

    def metadata(
        self, meta: AttentionMetadata, staged: Mapping[str, torch.Tensor], *, shares_prefix: bool
    ) -> AttentionMetadata:
        """Metadata for a step to be captured, over tensors that change under the graph."""


class Key(NamedTuple):
    """What tells graphs apart: the padded number of sequences, and whether prefixes are read once for groups."""

    size: int
    shares_prefix: bool = False


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Padded batch sizes: 15 up to 256, each at most 1.5 times the one before from 4 on, the largest last."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        last = sizes[-1]
        sizes.append(last + last // 2 if last.bit_count() == 1 else last // 3 * 4)
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


class DecodeGraphs:
    """Graphs of `forward` and the draw of tokens, for steps in which every sequence has one new token."""

    def __init__(
        self,
        accelerator: Accelerator,
        forward: ForwardProgram,
        attention: CapturedAttention,
        *,
        max_num_seqs: int,
        max_context: int,
        block_size: int,
        drawn: DrawnTokens,
        sampler: str | None = None,
    ) -> None:
        """Args: attention: its backend's part. drawn: gives the tokens of the step before, and takes this one's.
        sampler: implementation of the `sample` op, None for the chip's own.
        """
        self.sizes = graph_sizes(max_num_seqs)
        self.failures: dict[Key, str] = {}
        self._accelerator, self._forward, self._attention = accelerator, forward, attention
        self._drawn, self._sampler = drawn, sampler
        self._graphs: dict[Key, Captured] = {}
        self._wanted: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._asked: set[Key] = set()
        self._is_idle = threading.Event()
        rows = {name: torch.int64 for name in ("token_ids", "sources", "positions")}
        rows["context_lens"] = torch.int32
        rows |= {"slot_mapping": torch.int32, **RULES}
        parts = {name: (dtype, (max_num_seqs,)) for name, dtype in rows.items()}
        parts |= {name: (dtype, (length,)) for name, (dtype, length) in attention.parts.items()}
        width = -(-max_context // block_size)
        self._staging = Staging(accelerator, {**parts, "block_table": (torch.int32, (max_num_seqs, width))})
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=accelerator.device)
        self._rows = torch.arange(max_num_seqs, dtype=torch.int64, device=accelerator.device)
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def captured(self) -> tuple[Key, ...]:
        """Graphs that can be replayed by now."""
        return tuple(sorted(self._graphs))

    def start(self) -> None:
        """Captures all sizes in a thread, the largest first: smaller ones then fit into memory that it left behind.

        Variants that share prefixes are captured when the first step wants one.
        """
        for size in reversed(self.sizes):
            self._ask(Key(size))
        self._thread = threading.Thread(target=self._capture_wanted, name="graphs", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when nothing is left to capture."""
        if self._thread is not None:
            self._is_idle.wait(timeout_s)

    def close(self) -> None:
        """Ends the thread after the capture it is in, and drops the graphs."""
        self._is_closed = True
        self._wanted.put(None)
        if self._thread is not None:
            self._thread.join()
        self._graphs.clear()

    def choose(self, num_seqs: int, *, shares_prefix: bool = False) -> Key | None:
        """The captured graph with the fewest spare rows; None where there is none.

        One that shares prefixes is asked for when it is missing; until it is there, a plain one does the work.
        """
        size = min((size for size in self.sizes if size >= num_seqs), default=None)
        if size is None:
            return None
        if shares_prefix:
            key = Key(size, True)
            if key in self._graphs:
                return key
            self._ask(key)
        return min((key for key in self._graphs if key.size >= num_seqs and not key.shares_prefix), default=None)

    def run(
        self, key: Key, inputs: StepInputs, steps: Sequence[SequenceStep], groups: Sequence[Any] = ()
    ) -> torch.Tensor:
        """Replays a captured graph, which leaves the tokens it draws in the first rows of `drawn.ids`.

        Args: inputs: on the host; every sequence has one token. groups: of `find_groups`, for one that shares prefixes.
        Returns: logits (sequences, vocabulary) on the chip, overwritten by the next replay.
        """
        graph, count = self._graphs[key], len(steps)
        self._fill(inputs, steps, key.size)
        if key.shares_prefix:
            self._attention.fill(self._staging.host, groups)
        self._staging.send(count)
        graph.replay()
        return graph.output[:count]

    def _fill(self, inputs: StepInputs, steps: Sequence[SequenceStep], size: int) -> None:
        host, meta, count = self._staging.host, inputs.attention, len(steps)
        token_ids = inputs.token_ids[0].numpy()
        sources = self._drawn.sources(token_ids, meta.query_starts.numpy(), steps, size)
        host["sources"][:size] = np.arange(size) if sources is None else sources
        host["token_ids"][:count] = token_ids
        host["positions"][:count] = inputs.positions[0].numpy()
        host["context_lens"][:count] = meta.context_lens.numpy()
        host["slot_mapping"][:count] = meta.slot_mapping.numpy()
        host["context_lens"][count:size] = 0  # a spare row attends over nothing
        host["slot_mapping"][count:size] = -1  # and writes nothing
        host["token_ids"][count:size] = 0
        host["positions"][count:size] = 0
        table = meta.block_table.numpy()
        host["block_table"][:count, : table.shape[1]] = table
        fill_rules(host, steps)

    # ------------------------------------------------------------------ capturing

    def _ask(self, key: Key) -> None:
        if key not in self._asked:
            self._asked.add(key)
            self._is_idle.clear()
            self._wanted.put(key)

    @torch.inference_mode()
    def _capture_wanted(self) -> None:
        self._accelerator.select()
        while (key := self._wanted.get()) is not None and not self._is_closed:
            begin_s = time.monotonic()
            try:
                self._graphs[key] = self._capture(key)
                log.info("captured decode of %d sequences in %.2f s", key.size, time.monotonic() - begin_s)
            except Exception as error:  # whatever a model's code does that cannot be captured; its steps stay eager
                self.failures[key] = f"{type(error).__name__}: {error}"
                log.warning("decode of %d sequences stays eager: it could not be captured: %s", key.size, error)
            if self._wanted.empty():
                self._is_idle.set()
        self._is_idle.set()

    def _capture(self, key: Key) -> Captured:
        # Inputs of its own for the warm-up: the staged ones may belong to a step that runs right now.
        parts = self._staging.device
        staged = {name: parts[name] if name in self._attention.parts else parts[name][: key.size] for name in parts}
        spare = {name: torch.full_like(tensor, -1 if name == "slot_mapping" else 0) for name, tensor in staged.items()}
        ids = torch.empty_like(self._drawn.ids[: key.size])
        return self._accelerator.capture(
            lambda: self._compute(staged, self._drawn.ids, key), lambda: self._compute(spare, ids, key)
        )

    def _compute(self, tensors: dict[str, torch.Tensor], ids: torch.Tensor, key: Key) -> torch.Tensor:
        size = key.size
        meta = AttentionMetadata(
            query_starts=self._starts[: size + 1],
            context_lens=tensors["context_lens"],
            block_table=tensors["block_table"],
            slot_mapping=tensors["slot_mapping"],
            max_query_len=1,
        )
        logits = self._forward(
            StepInputs(
                token_ids=self._drawn.chosen(tensors["token_ids"], tensors["sources"]).unsqueeze(0),
                positions=tensors["positions"].unsqueeze(0),
                logit_rows=self._rows[:size],
                row_ranges=tuple((row, row + 1) for row in range(size)),
                attention=self._attention.metadata(meta, tensors, shares_prefix=key.shares_prefix),
            )
        )
        ids[:size].copy_(draw(logits, tensors, self._sampler))
        return logits
