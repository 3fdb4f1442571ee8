"""Runs steps on a GPU: inputs made on the host, decode replayed as graphs, tokens drawn on the chip, one copy back."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mxn.attention.base import AttentionMetadata
from mxn.core.batch import SampledToken, SequenceStep, StepBatch, StepResult
from mxn.errors import ConfigError
from mxn.runner.accelerator import Accelerator, chip_errors
from mxn.runner.chip_sampler import MAX_VOCABULARY, RULES, draw, fill_rules, is_plain
from mxn.runner.graphs import CapturedAttention, DecodeGraphs
from mxn.runner.inputs import StepInputs, build_inputs
from mxn.runner.sampler import NOT_FINITE, Sampled, sample
from mxn.runner.torch_runner import TorchRunner, dummy_batch, finish_step

log = logging.getLogger(__name__)

_HOST = torch.device("cpu")

PlanStep = Callable[[AttentionMetadata], AttentionMetadata]
"""Puts a step's metadata on the chip, with what the attention backend decides on the host."""


class GpuRunner(TorchRunner):
    """A model on an accelerator. A decode step replays a graph where one is captured; every other step is eager."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        plan_step: PlanStep,
        captured: CapturedAttention | None,
        max_num_seqs: int,
        sampler: str | None = None,
        waits_for_graphs: bool = False,
        **parts: Any,
    ) -> None:
        """Args: captured: the attention backend's part in graphs, None to run everything eagerly. sampler: the
        implementation of the `sample` op. waits_for_graphs: whether `warm_up` ends only when all are captured.
        parts: as `TorchRunner` takes them.
        """
        super().__init__(**parts)
        self.notes += getattr(self._attention, "notes", ())
        self._accelerator, self._plan_step, self._sampler = accelerator, plan_step, sampler
        self._draws_on_chip = self.vocab_size <= MAX_VOCABULARY
        self._waits_for_graphs = waits_for_graphs
        self.num_eager = self.num_replayed = self.num_shared = 0
        self.graphs: DecodeGraphs | None = None
        self._captured = captured
        if captured is not None and self._draws_on_chip:
            self.graphs = DecodeGraphs(
                accelerator,
                self._forward,
                captured,
                max_num_seqs=max_num_seqs,
                max_context=self.max_context,
                block_size=self.block_size,
                sampler=sampler,
            )

    @torch.inference_mode()
    def execute(self, batch: StepBatch) -> StepResult:
        if self._forward is None:
            raise ConfigError("the model was closed; load it again")
        if not batch.sequences:
            return StepResult(tokens=())
        inputs = build_inputs(batch, self.block_size, _HOST)
        with chip_errors(f"a step of {batch.num_tokens} tokens"):
            groups: Sequence[Any] = ()
            key = None
            if self._can_replay(inputs, batch.sequences):
                groups = self._captured.find_groups([step.seq_id for step in batch.sequences], inputs.attention)
                key = self.graphs.choose(len(batch.sequences), shares_prefix=bool(groups))
            if key is None:
                self.num_eager += 1
                return self._run_eagerly(inputs, batch.sequences)
            self.num_replayed += 1
            self.num_shared += key.shares_prefix
            logits, token_ids = self.graphs.run(key, inputs, batch.sequences, groups)
            return self._result(logits, token_ids, batch.sequences)

    def copy_kv(self, moves: Sequence[tuple[int, int]]) -> None:
        with chip_errors("a copy of KV blocks"):
            super().copy_kv(moves)

    def warm_up(self) -> tuple[tuple[str, ...], float]:
        started_s = time.perf_counter()
        shapes, _ = super().warm_up()
        batch = dummy_batch(2, 2, self.block_size) if self.num_blocks > 1 else dummy_batch(1, 2, self.block_size)
        self.execute(batch)
        if self.graphs is not None:
            self.graphs.start()
            if self._waits_for_graphs:
                self.graphs.wait()
                shapes += tuple(f"graph of {key.size}" for key in self.graphs.captured)
            else:
                shapes += (f"graphs of {', '.join(map(str, self.graphs.sizes))}: being captured",)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk a model's modules again while serving
        return shapes, time.perf_counter() - started_s

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.close()
        super().close()
        # All of these hold the model or its cache.
        self.graphs = self._captured = self._plan_step = None
        gc.unfreeze()
        gc.collect()
        self._accelerator.release()

    # ------------------------------------------------------------------ parts of a step

    def _can_replay(self, inputs: StepInputs, steps: Sequence[SequenceStep]) -> bool:
        """Whether the step is one that graphs are for: one new token for each sequence, and a draw for all of them."""
        return (
            self.graphs is not None
            and inputs.attention.max_query_len == 1
            and inputs.logit_rows.shape[0] == len(steps)
            and all(step.sampling.num_prompt_logprobs is None for step in steps)
        )

    def _run_eagerly(self, inputs: StepInputs, steps: Sequence[SequenceStep]) -> StepResult:
        device = self._accelerator.device
        logits = self._forward(
            StepInputs(
                token_ids=inputs.token_ids.to(device, non_blocking=True),
                positions=inputs.positions.to(device, non_blocking=True),
                logit_rows=inputs.logit_rows.to(device, non_blocking=True),
                row_ranges=inputs.row_ranges,
                attention=self._plan_step(inputs.attention),
            )
        )
        sampled = [step for step in steps if step.is_sampled]
        if not self._draws_on_chip or any(step.sampling.num_prompt_logprobs is not None for step in steps):
            return finish_step(logits, inputs, steps)
        if not sampled:
            self._accelerator.wait()  # so that a fault of the chip belongs to this step
            return StepResult(tokens=())
        return self._result(logits, self._draw(logits, sampled), sampled)

    def _draw(self, logits: torch.Tensor, steps: Sequence[SequenceStep]) -> np.ndarray:
        """One token per row by the rules that the op knows."""
        rules = {name: torch.zeros(len(steps), dtype=dtype) for name, dtype in RULES.items()}
        fill_rules({name: tensor.numpy() for name, tensor in rules.items()}, steps)
        device = self._accelerator.device
        on_chip = {name: tensor.to(device, non_blocking=True) for name, tensor in rules.items()}
        return draw(logits, on_chip, self._sampler).cpu().numpy()

    def _result(self, logits: torch.Tensor, token_ids: np.ndarray, steps: Sequence[SequenceStep]) -> StepResult:
        """Tokens by row: what the op drew, or what the torch sampler draws where a row asks for more."""
        special = [row for row, step in enumerate(steps) if not is_plain(step)]
        tokens = [SampledToken(seq_id=s.seq_id, token_id=t) for s, t in zip(steps, token_ids.tolist(), strict=True)]
        if not special and (token_ids >= 0).all():
            return StepResult(tokens=tuple(tokens))
        rest = sample(logits[special], [steps[row] for row in special]) if special else Sampled(tokens=())
        own = {steps[row].seq_id for row in special}
        tokens = [token for token in tokens if token.seq_id not in own and token.token_id >= 0] + list(rest.tokens)
        drawn = {token.seq_id: token for token in tokens}
        return StepResult(
            tokens=tuple(drawn[step.seq_id] for step in steps if step.seq_id in drawn),
            failed=tuple((step.seq_id, NOT_FINITE) for step in steps if step.seq_id not in drawn),
        )
